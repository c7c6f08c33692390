"""The paper's tables as grids, with measured values beside the paper's where there are any."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from crosslore_eval.errors import unknown_name
from reproduction.keys import CellKey, Metric, Names
from reproduction.paper import Cell, Column, Paper, Row, Table
from reproduction.render import DASH, Grid, Head, Line, Value, difference
from reproduction.settings import PARAMETERS, Hyperparameters, HyperparameterTable

PAPER, MEASURED, DIFFERENCE = "paper", "measured", "difference"
LABELS = {"model": "Model", "method": "Method", "dataset": "Dataset", "rank": "Rank", "metric": "Metric"}
# Methods that are measured -> the paper's of the same row. Its GaLore is the one that LLaMA-Factory has.
PAPER_METHODS = {"lora": "lora", "dora": "dora", "galore_stock": "galore", "crosslore": "crosslore"}
# What the paper has no name for.
OWN_NAMES = {
    "method": {
        "galore_stock": "GaLore",
        "galore": "GaLore (this code)",
        "crosslore_plus": "CrossLore+ (this code)",
        "full": "Full fine-tuning",
    },
    "model": {"smollm2-135m": "SmolLM2-135M", "tiny-llama": "Tiny Llama, random weights"},
}
# What is measured where the paper does not say which score it reports. Table 10's 54.04 of E2E is near the mean of
# ROUGE-1, -2 and -L that table 7 has for rank 256, 54.00; its other scores are near those of that rank too.
IN_PLACE_OF_NOT_STATED = "mean_ROUGE"


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row by its coordinates, with the paper's and the measured values by column."""

    at: dict[str, str | int | None]
    paper: tuple[Value | None, ...] = ()
    ours: tuple[Value | None, ...] = ()


def grid_of(
    paper: Paper,
    number: int,
    *,
    measured: Mapping[CellKey, Value] | None = None,
    compare: bool = True,
) -> Grid:
    """Return a table of the paper, each row followed by what was measured for it and by the difference.

    Args:
        paper: what `load_paper` returns.
        number: the table's number, 1 to 10.
        measured: values by key, with this repository's names of methods; what the paper has no row for gets a row of
            its own. Values of other tables are passed over. Not used for tables 3 and 4.
        compare: whether measured rows stand below the paper's of the same model, with differences; else they are
            rows of their own.

    Raises:
        ValueError: if there is no such table, or a key of this table has a column that it does not have.
    """
    if number in paper.hyperparameter_tables:
        return _hyperparameter_grid(paper.hyperparameter_tables[number], paper.names)
    if number not in paper.tables:
        known = ", ".join(str(n) for n in paper.table_numbers)
        raise ValueError(f"table must be one of {known}, got {number}. Choose one of these.")
    table = paper.tables[number]
    keys = tuple(table.rows[0].labels) if table.rows else ()
    rows = [_Row(at=_paper_place(row, keys), paper=tuple(map(paper_value, row.cells))) for row in table.rows]
    for at, values in _own_rows(table, {k: v for k, v in (measured or {}).items() if k.table == table.name}):
        _add(rows, at, values, keys=keys, compare=compare)
    keys = (*_varying(rows, keys), *keys)
    lines = [line for row in rows for line in _lines(row, keys, paper.names)]
    return Grid(
        name=f"Table {number}",
        caption=table.caption,
        labels=tuple(LABELS[key] for key in keys),
        heads=tuple(column_head(column, paper.names) for column in table.columns),
        lines=tuple(lines),
    )


def paper_value(cell: Cell) -> Value | None:
    """Return a figure of the paper as an entry of a table."""
    return None if cell.figure is None else Value(number=cell.figure, std=cell.std, seeds=cell.seeds)


def printed(kind: str, value: str | int | None, names: Names, *, own: bool = True) -> str:
    """Return what a table shows for a coordinate; a name that nothing is printed for stands as it is.

    Args:
        kind: "model", "method", "dataset", "metric" or "rank".
        value: its identifier; a rank of 0 or None is a dash.
        names: what the paper prints.
        own: whether it is of a measured row: "galore" is then this repository's, else the paper's.
    """
    if kind == "rank":
        return str(value) if value else DASH
    known = {**getattr(names, f"{kind}s"), **(OWN_NAMES.get(kind, {}) if own else {})}
    found = known.get(value, str(value))
    return found.head if isinstance(found, Metric) else str(found)


def metric_of(table: Table, dataset: str) -> str:
    """Return which metric is measured for a dataset in a table whose columns are residual ratios."""
    stated = {str(row.labels["dataset"]): str(row.labels["metric"]) for row in table.rows}
    metric = stated.get(dataset, "not_stated")
    return IN_PLACE_OF_NOT_STATED if metric == "not_stated" else metric


def column_head(column: Column, names: Names) -> Head:
    """Return the head of a column."""
    if column.residual_ratio is not None:
        return Head(text=column.residual_ratio, group="Residual ratio (%)")
    metric: Metric = names.metrics[str(column.metric)]
    group = names.datasets[column.dataset] if column.dataset else ""
    return Head(text=metric.title, group=group, arrow=metric.arrow)


def _paper_place(row: Row, keys: Sequence[str]) -> dict[str, str | int | None]:
    key = row.cells[0].key
    return {"model": key.model, "method": key.method, "rank": key.rank} | {name: row.labels[name] for name in keys}


def _own_rows(
    table: Table, values: Mapping[CellKey, Value]
) -> Iterable[tuple[dict[str, str | int | None], tuple[Value | None, ...]]]:
    """Yield the coordinates and values of every row that was measured, in the order of the keys."""
    ratios = any(column.residual_ratio for column in table.columns)
    places: dict[tuple[str, str | int | None], int] = {}
    for index, column in enumerate(table.columns):
        fixed = str(table.rows[0].cells[index].key.dataset)
        places["" if ratios else fixed, column.residual_ratio or column.metric] = index
    found: dict[tuple[object, ...], tuple[dict[str, str | int | None], list[Value | None]]] = {}
    for key, value in values.items():
        at: dict[str, str | int | None] = {"model": key.model, "method": key.method, "rank": key.rank}
        if ratios:
            at |= {"method": "crosslore", "dataset": key.dataset, "metric": metric_of(table, key.dataset)}
        place = ("" if ratios else key.dataset, key.column)
        if place not in places:
            columns = [str(column) for _, column in places]
            hint = unknown_name("column", key.column, columns) if key.column not in columns else "Correct its key."
            raise ValueError(f"a measured value must be of a cell of table {table.number}, got {tuple(key)}. {hint}")
        row = found.setdefault(tuple(at.values()), (at, [None] * len(table.columns)))
        row[1][places[place]] = value
    return [(at, tuple(row)) for at, row in found.values()]


def _add(
    rows: list[_Row],
    at: dict[str, str | int | None],
    values: tuple[Value | None, ...],
    *,
    keys: Sequence[str],
    compare: bool,
) -> None:
    """Put measured values below the paper's of the same row, else after the rows that have most in common."""
    theirs = at | {"method": PAPER_METHODS.get(str(at["method"]))}
    for index, row in enumerate(rows):
        same = all(row.at[name] in (value, None) for name, value in theirs.items())
        if compare and same and row.paper and not row.ours:
            rows[index] = replace(row, at=row.at | {"rank": at["rank"]}, ours=values)
            return
    order = ("rank", "method", "model") if tuple(keys) == ("method", "rank") else (*keys, "method", "model", "rank")
    shared = [_shared(row, theirs, order) for row in rows]
    most = max(shared, default=0)
    place = len(shared) - shared[::-1].index(most) if most else len(rows)
    rows.insert(place, _Row(at=at, ours=values))


def _shared(row: _Row, theirs: Mapping[str, str | int | None], order: Sequence[str]) -> int:
    mine = row.at if row.paper else row.at | {"method": PAPER_METHODS.get(str(row.at["method"]))}
    count = 0
    for name in order:
        if mine.get(name) != theirs.get(name) or theirs.get(name) is None:
            break
        count += 1
    return count


def _varying(rows: Sequence[_Row], keys: Sequence[str]) -> list[str]:
    """Return the coordinates that the table does not lead its rows with, but that differ between them."""
    found = {name: {row.at[name] for row in rows} - {None} for name in ("model", "rank") if name not in keys}
    return [name for name, values in found.items() if len(values) > 1]


def _lines(row: _Row, keys: Sequence[str], names: Names) -> Sequence[Line]:
    labels = tuple(printed(key, row.at[key], names, own=not row.paper) for key in keys)
    lines = [Line(labels=labels, source=PAPER, values=row.paper)] if row.paper else []
    if any(row.ours):
        lines.append(Line(labels=labels, source=MEASURED, values=row.ours))
    if row.paper and row.ours:
        apart = tuple(difference(mine, their) for mine, their in zip(row.ours, row.paper, strict=True))
        lines += [Line(labels=labels, source=DIFFERENCE, values=apart)] if any(apart) else []
    return lines


def _hyperparameter_grid(table: HyperparameterTable, names: Names) -> Grid:
    heads = tuple(Head(text=f"rank {entry.rank}", group=names.datasets[entry.dataset]) for entry in table.entries)
    lines = [
        Line(labels=(shown,), source=PAPER, values=tuple(_setting(entry, name) for entry in table.entries))
        for name, _, shown in PARAMETERS
    ]
    return Grid(
        name=f"Table {table.number}",
        caption=table.caption,
        labels=("Hyperparameter",),
        heads=heads,
        lines=tuple(lines),
    )


def _setting(entry: Hyperparameters, name: str) -> Value:
    value = getattr(entry, name)
    if name == "learning_rate":
        return Value(text=f"{value:.0E}")
    return Value(text=f"{value:g}%" if name == "residual_ratio_percent" else str(value))
