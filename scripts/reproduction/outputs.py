"""What a run leaves for its reader: tables in three formats, figures in two, one report; all from result files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from reproduction.cells import TUNING
from reproduction.configs import config_hash, training_config
from reproduction.experiments import experiments
from reproduction.figures import draw, save
from reproduction.panels import Sources
from reproduction.paper import Paper
from reproduction.render import render
from reproduction.report import write_report
from reproduction.results import Result
from reproduction.tables import ablation_grid, table_grid
from reproduction.tuning import TuningError, with_lr
from reproduction.whole_file import write_whole

BENCHMARKS = Path(__file__).parents[2] / "results" / "benchmarks"
# Names in a line.
SHOWN = 5
SUFFIXES = {"md": "md", "csv": "csv", "latex": "tex"}


def write_outputs(
    paper: Paper, results: Sequence[Result], folder: Path, *, profile: str, targets: Sequence[str], seeds: int | None
) -> Iterator[Path]:
    """Yield the files that are written for some targets, the report of the whole profile last.

    Args:
        paper: what `load_paper` returns.
        results: what `read_results` returns for `folder`.
        folder: the results folder; tables and figures go into `<folder>/report-<profile>/`.
        profile: "paper", "small" or "smoke".
        targets: names as of `experiments`.
        seeds: how many there should be, as of `experiments`.
    """
    planned = experiments("all", profile=profile, seeds=seeds)
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


def of_other_settings(results: Sequence[Result], folder: Path, *, profile: str, seeds: int | None) -> list[str]:
    """Return a line that names the results whose cells would be trained or scored otherwise now; none if all fit."""
    there, names = {result.experiment: result for result in results}, []
    for cell in experiments("all", profile=profile, seeds=seeds):
        result = there.get(cell.identity)
        if result is None:
            continue
        try:
            known = cell if cell.table == TUNING else with_lr(cell, folder)
        except TuningError:
            continue  # no rate is chosen now: nothing to hold it against
        config = training_config(known, model="", data="", output="")
        if config_hash(config, exp=known) != result.config_hash:
            names.append(f"{cell.table}/{cell.name}")
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    line = f"{len(names)} results are of other settings than the profile's now, and stand in tables all the same"
    return [f"{line}: {', '.join(names[:SHOWN])}{more}. Run their targets again, or remove them."] if names else []


def of_several_commits(results: Sequence[Result], *, profile: str) -> list[str]:
    """Return a line for each table of a profile whose results are of several commits: a method may differ by them."""
    found: dict[str, dict[str, None]] = {}
    for result in results:
        if result.experiment.profile == profile and result.reused_from is None:
            found.setdefault(result.experiment.table, {})[result.commit] = None
    return [
        f"results of {table} are of {len(commits)} commits of the code ({', '.join(commits)}). If a method was changed "
        "between them, remove the older ones and run the target again."
        for table, commits in found.items()
        if len(commits) > 1
    ]


def _parts(target: str, paper: Paper, profile: str) -> list[str]:
    """Return the tables and figures that a target stands for."""
    if target == "all":
        tables = sorted({cell.table for cell in experiments("all", profile=profile)} - {"tuning"})
        return [*tables, *(f"figure{number}" for number in paper.figures)]
    if target == "ablations":
        return [f"ablation-{name}" for name in paper.ablations]
    return [] if target == "tuning" else [target]
