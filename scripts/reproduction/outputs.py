"""What a run leaves for its reader: tables in three formats, figures in two, one report; all from result files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from reproduction.experiments import experiments
from reproduction.figures import draw, save
from reproduction.panels import Sources
from reproduction.paper import Paper
from reproduction.render import render
from reproduction.report import write_report
from reproduction.results import Result, write_whole
from reproduction.tables import ablation_grid, table_grid

BENCHMARKS = Path(__file__).parents[2] / "results" / "benchmarks"
SUFFIXES = {"md": "md", "csv": "csv", "latex": "tex"}


def write_outputs(
    paper: Paper, results: Sequence[Result], folder: Path, *, profile: str, targets: Sequence[str]
) -> Iterator[Path]:
    """Yield the files that are written for some targets, the report of the whole profile last.

    Args:
        paper: what `load_paper` returns.
        results: what `read_results` returns for `folder`.
        folder: the results folder; tables and figures go into `<folder>/<profile>/`.
        profile: "paper", "small" or "smoke".
        targets: names as of `experiments`.
    """
    planned = experiments("all", profile=profile)
    target_folder = folder / f"report-{profile}"
    target_folder.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for target in targets for name in _parts(target, paper, profile))
    for name in names:
        if name.startswith("figure"):
            sources = Sources(paper=paper, results=results, profile=profile, benchmarks=BENCHMARKS)
            yield from save(draw(name.removeprefix("figure"), sources), target_folder / name)
            continue
        if name.startswith("ablation-"):
            grid = ablation_grid(paper, name.removeprefix("ablation-"), results, profile=profile, planned=planned)
        else:
            grid = table_grid(paper, int(name.removeprefix("table")), results, profile=profile, planned=planned)
        for form, suffix in SUFFIXES.items():
            path = target_folder / f"{name}.{suffix}"
            write_whole(path, render(grid, form))
            yield path
    yield write_report(
        folder / f"report-{profile}.html", paper=paper, results=results, folder=folder, profile=profile,
        planned=planned, benchmarks=BENCHMARKS,
    )  # fmt: skip


def _parts(target: str, paper: Paper, profile: str) -> list[str]:
    """Return the tables and figures that a target stands for."""
    if target == "all":
        tables = sorted({cell.table for cell in experiments("all", profile=profile)} - {"tuning"})
        return [*tables, *(f"figure{number}" for number in paper.figures)]
    if target == "ablations":
        return [f"ablation-{name}" for name in paper.ablations]
    return [] if target == "tuning" else [target]
