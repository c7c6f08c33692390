"""The names of the reproduction: models, methods, datasets, metrics, and the key by which figures are matched."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from reproduction.reading import PaperDataError, Section, known


class CellKey(NamedTuple):
    """What identifies a figure, the paper's or a measured one."""

    # "table1", ..., "table10", or "ablation-<name>"
    table: str
    model: str
    # of a table: a method of the paper; of an ablation: a variant
    method: str
    dataset: str
    # None where the paper does not state it (table 10)
    rank: int | None
    # a metric, or the residual ratio in percent as the paper prints it (table 10)
    column: str


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A column's meaning."""

    name: str
    # as the paper heads it
    head: str
    unit: str
    better: Literal["lower", "higher"]

    @property
    def title(self) -> str:
        """The head of a column, with its unit."""
        return f"{self.head} ({self.unit})" if self.unit else self.head

    @property
    def arrow(self) -> str:
        """The arrow to the better side."""
        return "↓" if self.better == "lower" else "↑"


@dataclass(frozen=True, kw_only=True)
class Names:
    """Identifiers and what the paper prints for them."""

    models: dict[str, str]
    methods: dict[str, str]
    datasets: dict[str, str]
    metrics: dict[str, Metric]

    def check(self, kind: str, name: str, *, place: str) -> str:
        """Return an identifier that is known for "model", "method", "dataset" or "metric"."""
        return known(name, getattr(self, f"{kind}s"), kind=kind, place=place)

    def printed(self, kind: str, name: str) -> str:
        """Return what the paper prints for an identifier."""
        found = getattr(self, f"{kind}s")[name]
        return found.head if isinstance(found, Metric) else str(found)


def read_names(root: Section) -> Names:
    """Return the names that the file declares."""
    plain = {}
    for kind in ("models", "methods", "datasets"):
        section = root.section(kind)
        plain[kind] = {name: section.take(name, str) for name in section.keys()}
    metrics = {name: _metric(name, section) for name, section in root.sections("metrics")}
    return Names(metrics=metrics, **plain)


def _metric(name: str, section: Section) -> Metric:
    better = section.take("better", str)
    if better not in ("lower", "higher"):
        raise PaperDataError(
            f"{section.place}, `better` must be 'lower' or 'higher', got {better!r}. Correct the file."
        )
    metric = Metric(
        name=name,
        head=section.take("head", str),
        unit=section.take("unit", str, default=""),
        better="lower" if better == "lower" else "higher",
    )
    section.done()
    return metric
