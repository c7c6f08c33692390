"""Tables of what was measured beside the paper's, from result files alone."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Protocol

from crosslore_eval.errors import unknown_name
from reproduction.grids import (
    MEASURED,
    PAPER,
    column_head,
    grid_of,
    metric_of,
    paper_value,
    printed,
)
from reproduction.keys import CellKey
from reproduction.paper import Column, Paper
from reproduction.render import Grid, Head, Line, Value, measured, rounded
from reproduction.results import Result, ResultError
from reproduction.settings import Ablation

ABOUT_PROFILES = {
    "paper": "the paper's settings.",
    "small": "short runs of a small model on the real data.",
    "smoke": "a function test, its numbers are no result.",
}
PROFILES = tuple(ABOUT_PROFILES)
WORDS = {"ok": "ok", "oom": "out of memory", "failed": "failed", "not run": "not run"}
# Order of methods within a rank.
METHODS = ("lora", "dora", "galore_stock", "galore", "crosslore", "crosslore_plus", "full")
# The paper's score of E2E in table 10, by our reading (docs/reproduction.md), and what it is the mean of.
MEAN_ROUGE, ROUGES = "mean_ROUGE", ("ROUGE_1", "ROUGE_2", "ROUGE_L")
# The score that stands in a column; others have the column's name.
SCORES = {"accuracy": "accuracy_flexible"}
HOW_MEASURED = (
    "Measured: time is that of training alone, on one CPU thread the processor's; memory is in GiB, reserved by "
    "PyTorch on a GPU and of the whole process on a CPU; Acc. is accuracy_flexible; texts are scored against one "
    "reference at a time (protocol paper)."
)
ABOUT_SEEDS = "± is the deviation over n seeds."
ABOUT_INTERVALS = (
    "[low, high] is the 95 % bootstrap interval over test examples; where no example scores, as in 0.00 [0.00, 0.00], "
    "a bootstrap cannot say how wide it is; of several seeds, the means of their bounds."
)
# The paper's GB may be either; what is measured is not printed under them without a word.
BOTH_UNITS = "GB; measured: GiB"


class Planned(Protocol):
    """A cell of the plan, or one that was run."""

    @property
    def table(self) -> str: ...  # noqa: D102
    @property
    def profile(self) -> str: ...  # noqa: D102
    @property
    def model(self) -> str: ...  # noqa: D102
    @property
    def method(self) -> str: ...  # noqa: D102
    @property
    def dataset(self) -> str: ...  # noqa: D102
    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def column(self) -> str | None: ...  # noqa: D102


def table_grid(
    paper: Paper, number: int, results: Iterable[Result], *, profile: str, planned: Iterable[Planned] = ()
) -> Grid:
    """Return a table with the paper's values and the measured ones of a profile.

    Args:
        paper: what `load_paper` returns.
        number: the table's number, 1 to 10.
        results: of all tables and profiles; those of others are passed over.
        profile: "paper", "small" or "smoke"; only that of the paper has differences.
        planned: the cells that should be there: those without a result say "not run".

    Raises:
        ResultError: if a result is of no cell that the table can have, or one cell has two of the same seed.
        ValueError: if there is no such table.
    """
    name, results = f"table{number}", list(results)
    if number not in paper.tables:
        return grid_of(paper, number)
    values = measured_values(paper, results, table=name, profile=profile, planned=planned)
    theirs = ", ".join(paper.names.models[model] for model in {k.model: 0 for k in paper.by_key if k.table == name})
    grid = grid_of(paper, number, measured=values, compare=profile == "paper")
    mine = [r for r in results if (r.experiment.table, r.experiment.profile) == (name, profile)]
    caption = _caption(paper, values, grid.caption, profile=profile, theirs=theirs, results=mine)
    return replace(grid, caption=caption, heads=_both_units(grid.heads) if values else grid.heads)


def ablation_grid(
    paper: Paper, name: str, results: Iterable[Result], *, profile: str, planned: Iterable[Planned] = ()
) -> Grid:
    """Return the table of an ablation: variants by rank; arguments and errors as of `table_grid`."""
    if name not in paper.ablations:
        raise unknown_name("ablation", name, paper.ablations)
    ablation, table, results = paper.ablations[name], f"ablation-{name}", list(results)
    values = measured_values(paper, results, table=table, profile=profile, planned=planned)
    columns = [Column(dataset=dataset, metric=m) for dataset, metrics in ablation.columns.items() for m in metrics]
    mine = [r for r in results if (r.experiment.table, r.experiment.profile) == (table, profile)]
    lines = []
    for model, rank, method in dict.fromkeys((key.model, key.rank, key.method) for key in values):
        labels = (printed("model", model, paper.names), printed("rank", rank, paper.names), _label(ablation, method))
        theirs = _whole_method(paper, ablation, (model, rank, method), columns) if profile == "paper" else ()
        lines += [Line(labels=labels, source=PAPER, values=theirs)] if any(theirs) else []
        keys = [CellKey(table, model, method, str(c.dataset), rank, str(c.metric)) for c in columns]
        lines.append(Line(labels=labels, source=MEASURED, values=tuple(map(values.get, keys))))
    return Grid(
        name=f"{ablation.title} ({ablation.action} the {ablation.part})",
        caption=_caption(paper, values, "The paper has no such table.", profile=profile, results=mine),
        labels=("Model", "Rank", "Variant"),
        heads=_both_units(column_head(column, paper.names) for column in columns),
        lines=tuple(lines),
    )


def _both_units(heads: Iterable[Head]) -> tuple[Head, ...]:
    """Return heads with the unit of what is measured beside the paper's."""
    return tuple(replace(head, text=head.text.replace("(GB)", f"({BOTH_UNITS})")) for head in heads)


def _caption(
    paper: Paper, keys: Iterable[CellKey], caption: str, *, profile: str, results: Sequence[Result], theirs: str = ""
) -> str:
    """Return a caption with profile and models in front and how it was measured behind."""
    models = ", ".join(printed("model", model, paper.names) for model in dict.fromkeys(key.model for key in keys))
    parts = [f"Profile {profile}, {models or 'nothing planned or run'}: {ABOUT_PROFILES[profile]}"]
    if theirs and profile != "paper":
        parts.append(f"The paper's rows are of {theirs}; they stand here as printed and cannot be compared with.")
    devices = dict.fromkeys(f"{r.device.name}, {r.device.kind}, threads: {r.device.threads}" for r in results)
    about = [
        HOW_MEASURED,
        *(f"On {device}." for device in devices),
        ABOUT_SEEDS,
        *([ABOUT_INTERVALS] if profile != "paper" else []),
    ]
    return " ".join([*parts, caption, *(about if models else [])])


def measured_values(
    paper: Paper, results: Iterable[Result], *, table: str, profile: str, planned: Iterable[Planned] = ()
) -> dict[CellKey, Value]:
    """Return what a table of a profile shows by key: means over seeds, or why there is none."""
    found: dict[CellKey, dict[int, Result | None]] = {}
    for cell in planned:
        if (cell.table, cell.profile) == (table, profile):
            found.setdefault(_key(cell), {}).setdefault(cell.seed, None)
    for result in results:
        cell = result.experiment
        if (cell.table, cell.profile) == (table, profile):
            seeds = found.setdefault(_key(cell), {})
            if seeds.get(cell.seed) is not None:
                raise ResultError(
                    f"{cell.table}/{cell.name} must be the only result of its cell and seed, there is another one of "
                    f"a different method. Remove one of the files."
                )
            seeds[cell.seed] = result
    values = {}
    for key in sorted(found, key=_order(paper, table)):
        for column, metric in _columns(paper, key):
            like = _like(paper, key._replace(column=column))
            runs = list(found[key].values())
            values[key._replace(column=column)] = _value(runs, metric, like=like, intervals=profile != "paper")
    return values


def number_of(result: Result, metric: str) -> float | None:
    """Return what a result has for a metric of the paper's columns."""
    if metric in ("time", "memory"):
        return result.time if metric == "time" else result.peak
    if metric == MEAN_ROUGE:
        parts = [number_of(result, name) for name in ROUGES]
        known = [part for part in parts if part is not None]
        return sum(known) / len(known) if len(known) == len(parts) else None
    score = result.scores.get(SCORES.get(metric, metric))
    return None if score is None else score.value


def _value(runs: Sequence[Result | None], metric: str, *, like: Decimal, intervals: bool) -> Value:
    states = ["not run" if run is None else run.status for run in runs]
    counts = {state: states.count(state) for state in ("oom", "failed", "not run") if state in states}
    done = [run for run in runs if run is not None and run.status == "ok"]
    if not done:
        return Value(text=WORDS[next(iter(counts))])
    numbers = [number for number in (number_of(run, metric) for run in done) if number is not None]
    if not numbers:
        return Value(text="not measured")
    if metric == "time" and (intervals or max(numbers) < 0.1):
        like = Decimal("0.0001")  # a third of a second; runs of minutes, but for the paper's
    note = ", ".join(f"{count} {WORDS[state]}" for state, count in counts.items())
    value = replace(measured(numbers, like=like), note=note)
    scores = [run.scores.get(SCORES.get(metric, metric)) for run in done]
    bounds = [(s.low, s.high) for s in scores if s is not None and s.low is not None and s.high is not None]
    if intervals and len(bounds) == len(numbers):
        low, high = (rounded(sum(side) / len(bounds), like=like) for side in zip(*bounds, strict=True))
        value = replace(value, interval=(low, high))
    return value


def _key(cell: Planned) -> CellKey:
    """Return the key of a cell; its column is the residual ratio, or empty where columns are metrics."""
    method = "crosslore" if cell.column is not None else cell.method
    return CellKey(cell.table, cell.model, method, cell.dataset, cell.rank, cell.column or "")


def _columns(paper: Paper, key: CellKey) -> list[tuple[str, str]]:
    """Return the columns that a cell fills, each with its metric."""
    kind, _, name = key.table.replace("table", "table-").partition("-")
    found: list[tuple[str, str]] = []
    if kind == "ablation" and name in paper.ablations:
        found = [(metric, metric) for metric in paper.ablations[name].columns.get(key.dataset, ())]
    elif kind == "table" and (table := paper.tables.get(int(name))):
        ratios = [column.residual_ratio for column in table.columns if column.residual_ratio]
        if not ratios and not key.column:
            cells = table.rows[0].cells
            found = [(cell.key.column, cell.metric.name) for cell in cells if cell.key.dataset == key.dataset]
        elif key.column in ratios:
            found = [(key.column, metric_of(table, key.dataset))]
    if not found:
        raise ResultError(
            f"a result of {key.table} must be of a data set and a column of it, got {tuple(key)}. Remove its file."
        )
    return found


def _like(paper: Paper, key: CellKey) -> Decimal:
    """Return a figure of the paper in the same column, for the number of decimals."""
    figures = (
        cell.figure
        for theirs, cell in paper.by_key.items()
        if (theirs.table, theirs.dataset, theirs.column) == (key.table, key.dataset, key.column)
    )
    return next((figure for figure in figures if figure is not None), Decimal("0.01"))


def _order(paper: Paper, table: str) -> Callable[[CellKey], tuple[bool, int, int, str]]:
    """Return the order of rows: by rank, those without one at the end, then by method or variant."""
    ablation = paper.ablations.get(table.removeprefix("ablation-"))
    names = [variant.name for variant in ablation.variants] if ablation else list(METHODS)

    def place(key: CellKey) -> tuple[bool, int, int, str]:
        index = names.index(key.method) if key.method in names else len(names)
        return not key.rank, key.rank or 0, index, key.method

    return place


def _label(ablation: Ablation, method: str) -> str:
    return next((variant.label for variant in ablation.variants if variant.name == method), method)


def _whole_method(
    paper: Paper, ablation: Ablation, place: tuple[str, int | None, str], columns: Sequence[Column]
) -> tuple[Value | None, ...]:
    """Return what tables 1, 2 and 5 to 8 have for the variant that is the method itself."""
    model, rank, method = place
    if any(variant.name == method and variant.settings for variant in ablation.variants):
        return ()
    places = {(k.model, k.method, k.rank, k.dataset, k.column): cell for k, cell in paper.by_key.items()}
    cells = [places.get((model, "crosslore", rank, str(c.dataset), str(c.metric))) for c in columns]
    return tuple(None if cell is None else paper_value(cell) for cell in cells)
