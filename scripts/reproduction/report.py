"""One HTML file with all that was measured in a profile: `write_report(path, ...)`. It loads nothing from elsewhere."""

import base64
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

from reproduction.figures import DRAWINGS, draw
from reproduction.grids import printed
from reproduction.panels import Sources
from reproduction.paper import Paper
from reproduction.render import Grid, in_words
from reproduction.results import Identity, Result, Score, result_path
from reproduction.tables import WORDS, Planned, ablation_grid, table_grid
from reproduction.whole_file import write_whole

TEMPLATE = Path(__file__).with_name("report.html.j2")
BANNERS = {
    "paper": "Profile paper: the paper's models and settings. Differences are measured minus paper.",
    "small": "Profile small: a small model and short runs on the real data. This is no reproduction of the paper's "
    "numbers: its rows belong to other models and stand here unchanged.",
    "smoke": "Profile smoke: A FUNCTION TEST AND NO RESULT. It shows that every step runs; its scores mean nothing.",
}
# Packages that the summary names; a cell's details have all.
PACKAGES = ("torch", "transformers", "llamafactory", "peft", "crosslore")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A line of the list of cells, as texts."""

    result: Result
    model: str
    method: str
    dataset: str
    rank: str
    column: str
    seed: int
    status: str
    hours: str
    peak: str
    scores: tuple[tuple[str, str, str], ...]
    details: tuple[tuple[str, str], ...]
    link: str
    file: str


def write_report(
    path: Path,
    *,
    paper: Paper,
    results: Sequence[Result],
    folder: Path,
    profile: str,
    planned: Sequence[Planned] = (),
    benchmarks: Path | None = None,
) -> Path:
    """Write the report of a profile, whole or not at all, and return its path.

    Args:
        path: the HTML file.
        paper: what `load_paper` returns.
        results: what `read_results` returns for `folder`; those of other profiles are passed over.
        folder: the results folder, for links to its files.
        profile: "paper", "small" or "smoke".
        planned: the cells that should be there.
        benchmarks: folder of the benchmark suite, for figures 2a and 2b; without it they are left out.
    """
    html = report_html(
        paper, results, profile=profile, planned=planned, benchmarks=benchmarks, folder=folder, base=path.parent
    )
    write_whole(path, html)
    return path


def report_html(
    paper: Paper,
    results: Sequence[Result],
    *,
    profile: str,
    planned: Sequence[Planned],
    benchmarks: Path | None,
    folder: Path,
    base: Path,
) -> str:
    """Return the report as a text; `base` is the folder that links start from, the rest as in `write_report`."""
    import jinja2

    # Sanitised by the template: every value that is not marked is escaped.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    mine = [result for result in results if result.experiment.profile == profile]
    plan = [cell for cell in planned if cell.profile == profile]
    sources = Sources(paper=paper, results=results, profile=profile, benchmarks=benchmarks or base)
    return template.render(
        title=f"CrossLore: the paper's tables and figures, profile {profile}",
        banner=BANNERS[profile],
        profile=profile,
        paper=paper,
        summary=_summary(mine, plan),
        tables=_tables(paper, mine, profile=profile, planned=plan),
        pictures=_pictures(sources, with_benchmarks=benchmarks is not None),
        cells=_by_table(mine, paper=paper, folder=folder, base=base),
        missing=_missing(mine, plan),
        planned=Counter(cell.table for cell in plan),
        in_words=in_words,
    )


def _summary(results: Sequence[Result], planned: Sequence[Planned]) -> list[tuple[str, str]]:
    states = Counter(result.status for result in results)
    missing = sum(len(names) for _, names in _missing(results, planned))
    counts = [f"{states[state]} {WORDS[state]}" for state in ("ok", "oom", "failed")]
    devices = [f"{r.device.name} ({r.device.kind}, {r.device.threads} threads)" for r in results]
    packages = [f"{name} {r.packages[name]}" for r in results for name in PACKAGES if name in r.packages]
    ends = sorted(result.finished for result in results)
    return [
        ("Cells", ", ".join([*counts, f"{missing} not run"])),
        ("Hours of training", f"{sum(result.hours or 0.0 for result in results if not result.reused_from):.2f}"),
        ("Devices", _distinct(devices)),
        ("Versions", _distinct(packages)),
        ("Commits", _distinct(result.commit for result in results)),
        ("Seeds", _distinct(str(result.experiment.seed) for result in results)),
        ("From, until", " to ".join(dict.fromkeys(ends[:1] + ends[-1:])) or "nothing was run"),
    ]


def _distinct(texts: Iterable[str]) -> str:
    return ", ".join(sorted(set(texts))) or "none"


def _tables(
    paper: Paper, results: Sequence[Result], *, profile: str, planned: Sequence[Planned]
) -> list[dict[str, Any]]:  # Any: what the template takes
    grids = [
        (f"Table {n}", table_grid(paper, n, results, profile=profile, planned=planned)) for n in paper.table_numbers
    ]
    for name in paper.ablations:
        grid = ablation_grid(paper, name, results, profile=profile, planned=planned)
        grids.append((f"Ablation {name}", grid))
    return [
        {"short": short, "anchor": short.lower().replace(" ", "-"), "grid": grid, "groups": _groups(grid)}
        for short, grid in grids
    ]


def _groups(grid: Grid) -> list[tuple[str, int]]:
    groups = [(group, len(list(heads))) for group, heads in groupby(grid.heads, key=lambda head: head.group)]
    return groups if any(group for group, _ in groups) else []


def _pictures(sources: Sources, *, with_benchmarks: bool) -> list[dict[str, str]]:
    pictures = []
    for number in DRAWINGS:
        if number.startswith("2") and not with_benchmarks:
            continue
        file = io.BytesIO()
        draw(number, sources).savefig(file, format="png", dpi=110)
        uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
        pictures.append({"number": number, "uri": uri, "caption": sources.paper.figures[number].caption})
    return pictures


def _by_table(results: Sequence[Result], *, paper: Paper, folder: Path, base: Path) -> list[tuple[str, list[Cell]]]:
    tables = groupby(results, key=lambda result: result.experiment.table)
    return [(table, [_cell(result, paper, folder=folder, base=base) for result in some]) for table, some in tables]


def _cell(result: Result, paper: Paper, *, folder: Path, base: Path) -> Cell:
    cell, path = result.experiment, result_path(folder, result.experiment)
    names = [variant for ablation in paper.ablations.values() for variant in ablation.variants]
    variants = {variant.name: variant.label for variant in names if variant.settings}
    return Cell(
        result=result,
        model=printed("model", cell.model, paper.names),
        method=variants.get(cell.method) or printed("method", cell.method, paper.names),
        dataset=printed("dataset", cell.dataset, paper.names),
        rank=printed("rank", cell.rank, paper.names),
        column=cell.column or "",
        seed=cell.seed,
        status=WORDS[result.status] + (f", from {result.reused_from}" if result.reused_from else ""),
        hours="" if result.hours is None else f"{result.hours:.4g}",
        peak="" if result.peak is None else f"{result.peak:.2f}",
        scores=tuple((name, _score(score), score.signature) for name, score in result.scores.items()),
        details=tuple(_details(result).items()),
        link=quote(Path(os.path.relpath(path, base)).as_posix()),
        file=path.name,
    )


def _score(score: Score) -> str:
    if score.value is None:
        return f"not computed ({score.reason})"
    between = "" if score.low is None or score.high is None else f" [{score.low:.4g}, {score.high:.4g}]"
    return f"{score.value:.4g}{between}"


def _details(result: Result) -> Mapping[str, str]:
    device = result.device
    return {
        "finished": result.finished,
        "commit": result.commit,
        "configuration": f"{result.config_hash}: {json.dumps(result.config, ensure_ascii=False)}",
        "device": f"{device.name}, {device.kind}, {device.threads} threads",
        "packages": ", ".join(f"{name} {version}" for name, version in result.packages.items()),
        **{f"data, {name}": f"{file.rows} rows, sha256 {file.sha256}" for name, file in result.data.items()},
        "peaks in GiB": ", ".join(f"{name} {peak:.3f}" for name, peak in result.peak_gib.items()),
        "training": ", ".join(f"{name} {number:.10g}" for name, number in result.train.items()),
        **{f"score {name}": score.signature for name, score in result.scores.items() if score.signature},
    }


def _missing(results: Sequence[Result], planned: Sequence[Planned]) -> list[tuple[str, list[str]]]:
    """Return the names of planned cells without a result, by table."""
    there = {result.experiment for result in results}
    found: dict[str, list[str]] = {}
    for cell in planned:
        identity = Identity(**{field.name: getattr(cell, field.name) for field in fields(Identity)})
        if identity not in there:
            found.setdefault(cell.table, []).append(identity.name)
    return sorted(found.items())
