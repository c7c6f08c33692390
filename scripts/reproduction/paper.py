"""The paper's tables as data: `load_paper()` reads and checks `scripts/paper_tables.toml`."""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path

from crosslore_eval.errors import shown
from reproduction.keys import CellKey, Metric, Names, read_names
from reproduction.reading import PaperDataError, Section, typed
from reproduction.settings import (
    Ablation,
    Figure,
    Hyperparameters,
    HyperparameterTable,
    Protocol,
    read_ablation,
    read_figure,
    read_hyperparameters,
    read_protocol,
)

DATA = Path(__file__).parents[1] / "paper_tables.toml"
# In place of a figure that the paper does not give.
MISSING = "-"
# What a row, a column or a whole table may fix.
COORDINATES = ("model", "method", "dataset", "rank", "metric")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure of the paper."""

    key: CellKey
    metric: Metric
    # None: the paper gives none; else with the digits that the paper prints
    figure: Decimal | None
    # standard deviation over seeds, where given
    std: Decimal | None = None
    seeds: int | None = None


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of figures: of a metric, or of a residual ratio in percent."""

    dataset: str | None = None
    metric: str | None = None
    residual_ratio: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row: what leads it, by coordinate, and its figures."""

    labels: dict[str, str | int]
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of results: 1, 2 or 5 to 10."""

    number: int
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """The table's name in keys and result folders."""
        return f"table{self.number}"


@dataclass(frozen=True, kw_only=True)
class Paper:
    """All that the data file holds."""

    title: str
    id: str
    names: Names
    tables: dict[int, Table]
    hyperparameter_tables: dict[int, HyperparameterTable]
    protocol: Protocol
    figures: dict[str, Figure]
    ablations: dict[str, Ablation]

    def cells(self) -> Iterator[Cell]:
        """Yield every figure of the tables of results, in their order."""
        for table in self.tables.values():
            for row in table.rows:
                yield from row.cells

    @cached_property
    def by_key(self) -> dict[CellKey, Cell]:
        """The figures by key."""
        return {cell.key: cell for cell in self.cells()}

    @cached_property
    def table_numbers(self) -> tuple[int, ...]:
        """The numbers of all tables, of results and of hyper-parameters."""
        return tuple(sorted([*self.tables, *self.hyperparameter_tables]))

    def hyperparameters(self, *, model: str, dataset: str, rank: int) -> Hyperparameters:
        """Return the settings of tables 3-4.

        Raises:
            LookupError: if the paper gives none for this combination.
        """
        entries = [entry for table in self.hyperparameter_tables.values() for entry in table.entries]
        for entry in entries:
            if (entry.model, entry.dataset, entry.rank) == (model, dataset, rank):
                return entry
        given = ", ".join(dict.fromkeys(f"{entry.model} on {entry.dataset}" for entry in entries))
        ranks = ", ".join(str(r) for r in sorted({entry.rank for entry in entries}))
        raise LookupError(
            f"tables 3-4 have no settings for {model} on {dataset} at rank {rank}. They have: {given}, at ranks "
            f"{ranks}. Take the settings of one of these and say so in the result."
        )


def load_paper(path: Path = DATA) -> Paper:
    """Return the paper's data.

    Raises:
        PaperDataError: if the file is not there, is no TOML, or something in it does not fit; names table and row.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except OSError as error:
        raise PaperDataError(
            f"{path} cannot be read: {error.strerror}. It belongs to the repository: restore it."
        ) from None
    except ValueError as error:
        raise PaperDataError(f"{path} is not TOML: {error}. Correct the file.") from None
    root = Section(content, place=path.name)
    names, about = read_names(root), root.section("paper")
    tables = [_table(_numbered(root, "tables", n), names) for n in range(len(root.take("tables", list)))]
    hyper = [
        read_hyperparameters(_numbered(root, "hyperparameters", n), names)
        for n in range(len(root.take("hyperparameters", list)))
    ]
    figures = [read_figure(_numbered(root, "figures", n), names) for n in range(len(root.take("figures", list)))]
    paper = Paper(
        title=about.take("title", str),
        id=about.take("id", str),
        names=names,
        tables={table.number: table for table in tables},
        hyperparameter_tables={table.number: table for table in hyper},
        protocol=read_protocol(root.section("protocol"), names),
        figures={figure.number: figure for figure in figures},
        ablations={name: read_ablation(name, values, names) for name, values in root.sections("ablations")},
    )
    root.done()
    _refuse_twice([*(table.number for table in tables), *(table.number for table in hyper)])
    return paper


def _numbered(root: Section, name: str, index: int) -> Section:
    return Section(root.take(name, list)[index], place=f"[[{name}]] {index + 1}")


def _refuse_twice(numbers: list[int]) -> None:
    for number in numbers:
        if numbers.count(number) > 1:
            raise PaperDataError(f"table {number} is there {numbers.count(number)} times, must be once. Remove one.")


def _table(section: Section, names: Names) -> Table:
    number, caption = section.take("number", int), section.take("caption", str)
    section.place = f"table {number}"
    seeds = section.take("seeds", int, default=0) or None
    fixed, keys = section.take("fixed", dict), section.take_list("row_keys", str)
    by = section.take("column_key", str, default="metric")
    columns = tuple(_column(n, by, names=names, place=section.place) for n in section.take_list("columns", str))
    rows: list[Row] = []
    for index, entries in enumerate(section.take_list("rows", list), 1):
        place = f"table {number}, row {index} ({', '.join(str(entry) for entry in entries[: len(keys)])})"
        if len(entries) != len(keys) + len(columns):
            raise PaperDataError(
                f"{place} must have {len(keys)} labels ({', '.join(keys)}) and {len(columns)} figures, "
                f"got {len(entries)} entries. Add or remove some."
            )
        labels = dict(zip(keys, entries[: len(keys)], strict=True))
        if labels in [row.labels for row in rows]:
            raise PaperDataError(f"{place} must be there once, got it twice. Correct its labels or remove it.")
        cells = tuple(
            _cell(entry, column, number=number, at={**fixed, **labels}, names=names, seeds=seeds, place=place)
            for column, entry in zip(columns, entries[len(keys) :], strict=True)
        )
        rows.append(Row(labels=labels, cells=cells))
    section.done()
    return Table(number=number, caption=caption, columns=columns, rows=tuple(rows))


def _column(name: str, by: str, *, names: Names, place: str) -> Column:
    if by == "residual_ratio":
        return Column(residual_ratio=name)
    if by != "metric":
        raise PaperDataError(f"{place}, `column_key` must be 'metric' or 'residual_ratio', got {by!r}. Correct it.")
    dataset, dot, metric = name.rpartition(".")
    place = f"{place}, column {name!r}"
    names.check("metric", metric, place=place)
    return Column(dataset=names.check("dataset", dataset, place=place) if dot else None, metric=metric)


def _cell(
    entry: object,
    column: Column,
    *,
    number: int,
    at: dict[str, str | int],
    names: Names,
    seeds: int | None,
    place: str,
) -> Cell:
    if column.dataset:
        at = {**at, "dataset": column.dataset}
    if column.metric:
        at = {**at, "metric": column.metric}
    for name in at:
        if name not in COORDINATES:
            raise PaperDataError(f"{place}: a label must be one of {', '.join(COORDINATES)}, got {name!r}. Correct it.")
    texts = {}
    for kind in ("model", "method", "dataset", "metric"):
        if kind not in at:
            raise PaperDataError(f"{place}: `fixed`, a label or the column must say the {kind}, none does. Add it.")
        texts[kind] = names.check(kind, typed(at[kind], str, place=f"{place}, {kind}"), place=place)
    rank = typed(at["rank"], int, place=f"{place}, rank") if "rank" in at else None
    title = column.residual_ratio or texts["metric"]
    key = CellKey(f"table{number}", texts["model"], texts["method"], texts["dataset"], rank, title)
    figure, std = _figure(entry, place=f"{place}, {texts['dataset']} {title}")
    return Cell(key=key, metric=names.metrics[texts["metric"]], figure=figure, std=std, seeds=seeds)


def _figure(entry: object, *, place: str) -> tuple[Decimal | None, Decimal | None]:
    if entry == MISSING:
        return None, None
    pair = entry if isinstance(entry, list) else [entry]
    if not 1 <= len(pair) <= 2:
        raise PaperDataError(f"{place} must be a figure or [mean, deviation], got {shown(entry)}. Correct the file.")
    figures = [typed(value, Decimal, place=place) for value in pair]
    for value in figures:
        if not value.is_finite() or value < 0:
            raise PaperDataError(f"{place} must be finite and not negative, got {value}. Correct the file.")
    return figures[0], figures[1] if len(figures) == 2 else None
