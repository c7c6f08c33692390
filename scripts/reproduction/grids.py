"""The paper's tables as grids, with measured values beside the paper's where there are any."""

from collections.abc import Mapping, Sequence

from crosslore_eval.errors import unknown_name
from reproduction.keys import CellKey, Metric, Names
from reproduction.paper import Cell, Column, Paper, Row, Table
from reproduction.render import Grid, Head, Line, Value, difference
from reproduction.settings import PARAMETERS, Hyperparameters, HyperparameterTable

PAPER, MEASURED, DIFFERENCE = "paper", "measured", "difference"
LABELS = {"model": "Model", "method": "Method", "dataset": "Dataset", "rank": "Rank", "metric": "Metric"}


def grid_of(paper: Paper, number: int, *, measured: Mapping[CellKey, Value] | None = None) -> Grid:
    """Return a table of the paper, each row followed by what was measured for it and by the difference.

    Args:
        paper: what `load_paper` returns.
        number: the table's number, 1 to 10.
        measured: values by key; rows without one have the paper's line only. Not used for tables 3 and 4.

    Raises:
        ValueError: if there is no such table, or a key of this table that is measured is not a cell of it.
    """
    if number in paper.hyperparameter_tables:
        return _hyperparameter_grid(paper.hyperparameter_tables[number], paper.names)
    if number not in paper.tables:
        known = ", ".join(str(n) for n in paper.table_numbers)
        raise ValueError(f"table must be one of {known}, got {number}. Choose one of these.")
    table, values = paper.tables[number], dict(measured or {})
    _refuse_foreign(table, values)
    keys = tuple(table.rows[0].labels) if table.rows else ()
    lines = [line for row in table.rows for line in _lines(row, values, paper.names)]
    return Grid(
        name=f"Table {number}",
        caption=table.caption,
        labels=tuple(LABELS[key] for key in keys),
        heads=tuple(_head(column, paper.names) for column in table.columns),
        lines=tuple(lines),
    )


def paper_value(cell: Cell) -> Value | None:
    """Return a figure of the paper as an entry of a table."""
    return None if cell.figure is None else Value(number=cell.figure, std=cell.std, seeds=cell.seeds)


def _lines(row: Row, measured: Mapping[CellKey, Value], names: Names) -> Sequence[Line]:
    labels = tuple(_label(kind, value, names) for kind, value in row.labels.items())
    theirs = tuple(paper_value(cell) for cell in row.cells)
    ours = tuple(measured.get(cell.key) for cell in row.cells)
    lines = [Line(labels=labels, source=PAPER, values=theirs)]
    if any(ours):
        lines.append(Line(labels=labels, source=MEASURED, values=ours))
    apart = tuple(difference(mine, their) for mine, their in zip(ours, theirs, strict=True))
    if any(apart):
        lines.append(Line(labels=labels, source=DIFFERENCE, values=apart))
    return lines


def _label(kind: str, value: str | int, names: Names) -> str:
    return str(value) if kind == "rank" else names.printed(kind, str(value))


def _head(column: Column, names: Names) -> Head:
    if column.residual_ratio is not None:
        return Head(text=column.residual_ratio, group="Residual ratio (%)")
    metric: Metric = names.metrics[str(column.metric)]
    group = names.datasets[column.dataset] if column.dataset else ""
    return Head(text=metric.title, group=group, arrow=metric.arrow)


def _refuse_foreign(table: Table, measured: Mapping[CellKey, Value]) -> None:
    cells = {cell.key for row in table.rows for cell in row.cells}
    columns = dict.fromkeys(key.column for key in cells)
    for key in measured:
        if key.table == table.name and key not in cells:
            raise ValueError(
                f"a measured value must be of a cell of table {table.number}, got {tuple(key)}. "
                f"{unknown_name('column', key.column, columns) if key.column not in columns else 'Correct its key.'}"
            )


def _hyperparameter_grid(table: HyperparameterTable, names: Names) -> Grid:
    heads = tuple(Head(text=f"rank {entry.rank}", group=names.datasets[entry.dataset]) for entry in table.entries)
    lines = [
        Line(labels=(printed,), source=PAPER, values=tuple(_setting(entry, name) for entry in table.entries))
        for name, _, printed in PARAMETERS
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
