"""What the experiment matrix needs of the paper: hyper-parameters, protocol, figures, and the ablations to add."""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from crosslore_eval.errors import shown
from reproduction.keys import CellKey, Names
from reproduction.reading import PaperDataError, Section, typed


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Tables 3 and 4: the settings of one model on one dataset at one rank."""

    model: str
    dataset: str
    rank: int
    batch_size: int
    epochs: int
    learning_rate: float
    lr_schedule: str
    # scale of the update (the paper's alpha)
    alpha: int
    optimizer: str
    # share of kept positions, in percent of a weight's entries
    residual_ratio_percent: float


# Name in the file and in `Hyperparameters`, kind in the file, what the paper prints before it.
PARAMETERS: tuple[tuple[str, type, str], ...] = (
    ("batch_size", int, "Batch Size"),
    ("epochs", int, "Epochs"),
    ("learning_rate", Decimal, "Learning Rate"),
    ("lr_schedule", str, "LR Schedule"),
    ("alpha", int, "α"),
    ("optimizer", str, "Optimizer"),
    ("residual_ratio_percent", Decimal, "Residual Ratio"),
)


@dataclass(frozen=True, kw_only=True)
class HyperparameterTable:
    """Table 3 or 4, in the paper's order of columns."""

    number: int
    caption: str
    entries: tuple[Hyperparameters, ...]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What the text says of all runs, and what it leaves out."""

    framework: str
    dtype: str
    residual_targets: tuple[str, ...]
    cross_head_targets: tuple[str, ...]
    ablation_seeds: int
    devices: dict[str, str]
    # name of a setting -> what the paper does say about it
    not_stated: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A number that the text gives for a figure."""

    quantity: str
    # ">", "=" or "about"
    relation: str
    value: int
    unit: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What a figure of the paper shows."""

    number: str
    caption: str
    metrics: tuple[str, ...]
    models: tuple[str, ...]
    methods: tuple[str, ...]
    # the table that holds its points, if one does
    table: int | None
    numbers: tuple[Statement, ...]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of an ablation."""

    name: str
    label: str
    # keys of a LLaMA-Factory configuration of type `crosslore`, over the paper's settings
    settings: dict[str, Any]  # Any: values of a configuration


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """An ablation that the paper leaves out."""

    name: str
    title: str
    part: str
    action: str
    replacement: str
    models: tuple[str, ...]
    ranks: tuple[int, ...]
    # dataset -> metrics
    columns: dict[str, tuple[str, ...]]
    variants: tuple[Variant, ...]

    def keys(self) -> Iterator[CellKey]:
        """Yield every cell that is to be measured: model by rank by variant, in the order of the columns."""
        for model in self.models:
            for rank in self.ranks:
                for variant in self.variants:
                    for dataset, metrics in self.columns.items():
                        for metric in metrics:
                            yield CellKey(f"ablation-{self.name}", model, variant.name, dataset, rank, metric)


def read_hyperparameters(section: Section, names: Names) -> HyperparameterTable:
    """Return table 3 or 4."""
    number, caption = section.take("number", int), section.take("caption", str)
    section.place = place = f"table {number}"
    model = names.check("model", section.take("model", str), place=place)
    ranks, entries = section.take_list("ranks", int), []
    for dataset, values in section.sections("datasets"):
        names.check("dataset", dataset, place=values.place)
        columns = {name: _by_rank(values, name, kind=kind, count=len(ranks)) for name, kind, _ in PARAMETERS}
        values.done()
        for index, rank in enumerate(ranks):
            # Any: each parameter has its own type, checked in _by_rank
            chosen: dict[str, Any] = {name: _plain(column[index]) for name, column in columns.items()}
            entries.append(Hyperparameters(model=model, dataset=dataset, rank=rank, **chosen))
    section.done()
    return HyperparameterTable(number=number, caption=caption, entries=tuple(entries))


def _by_rank(values: Section, name: str, *, kind: type, count: int) -> tuple[object, ...]:
    given = values.take(name, object)
    place = f"{values.place}, `{name}`"
    if not isinstance(given, list):
        return (typed(given, kind, place=place),) * count
    if len(given) != count:
        raise PaperDataError(
            f"{place} must have {count} values, one for each rank, got {shown(given)}. Correct the file."
        )
    return tuple(typed(value, kind, place=place) for value in given)


def _plain(value: object) -> object:
    return float(value) if isinstance(value, Decimal) else value


def read_protocol(section: Section, names: Names) -> Protocol:
    """Return what the text says of all runs."""
    devices, left_out = section.section("devices"), section.section("not_stated")
    protocol = Protocol(
        framework=section.take("framework", str),
        dtype=section.take("dtype", str),
        residual_targets=section.take_list("residual_targets", str),
        cross_head_targets=section.take_list("cross_head_targets", str),
        ablation_seeds=section.take("ablation_seeds", int),
        devices={names.check("model", n, place=devices.place): devices.take(n, str) for n in devices.keys()},
        not_stated={name: left_out.take(name, str) for name in left_out.keys()},
    )
    section.done()
    return protocol


def read_figure(section: Section, names: Names) -> Figure:
    """Return what a figure shows."""
    number = section.take("number", str)
    section.place = place = f"figure {number}"
    figure = Figure(
        number=number,
        caption=section.take("caption", str),
        metrics=section.take_list("metrics", str),
        models=tuple(names.check("model", name, place=place) for name in section.take_list("models", str)),
        methods=tuple(names.check("method", name, place=place) for name in section.take_list("methods", str)),
        table=section.take("table", int, default=0) or None,
        numbers=tuple(_statement(Section(values, place=place)) for values in section.take_list("numbers", dict)),
    )
    section.done()
    return figure


def _statement(section: Section) -> Statement:
    texts = {name: section.take(name, str) for name in ("quantity", "relation", "unit", "source")}
    statement = Statement(value=section.take("value", int), **texts)
    section.done()
    return statement


def read_ablation(name: str, section: Section, names: Names) -> Ablation:
    """Return an ablation that is to be added."""
    place, columns = section.place, section.section("columns")
    for dataset in columns.keys():
        names.check("dataset", dataset, place=columns.place)
        for metric in columns.take_list(dataset, str):
            names.check("metric", metric, place=f"{columns.place}, {dataset}")
    ablation = Ablation(
        name=name,
        title=section.take("title", str),
        part=section.take("part", str),
        action=section.take("action", str),
        replacement=section.take("replacement", str, default=""),
        models=tuple(names.check("model", model, place=place) for model in section.take_list("models", str)),
        ranks=section.take_list("ranks", int),
        columns={dataset: columns.take_list(dataset, str) for dataset in columns.keys()},
        variants=tuple(_variant(variant, values) for variant, values in section.sections("variants")),
    )
    section.done()
    return ablation


def _variant(name: str, section: Section) -> Variant:
    settings = {key: _plain(value) for key, value in section.take("settings", dict).items()}
    variant = Variant(name=name, label=section.take("label", str), settings=settings)
    section.done()
    return variant
