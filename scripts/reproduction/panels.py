"""What the figures share: their sources, colors, and the canvas with its panels."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reproduction.grids import printed
from reproduction.paper import Paper
from reproduction.results import Result

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By what a legend shows.
COLORS = {
    "LoRA": "#7f7f7f",
    "DoRA": "#9467bd",
    "GaLore": "#ff7f0e",
    "GaLore (this code)": "#d62728",
    "CrossLore": "#1f77b4",
    "CrossLore+ (this code)": "#17becf",
    "Full fine-tuning": "#2ca02c",
}
OTHER = "#8c564b"
ABOUT = {"paper": "profile paper", "small": "profile small", "smoke": "smoke: a function test, no result"}


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where figures come from."""

    paper: Paper
    # of all tables and profiles
    results: Sequence[Result]
    profile: str
    # the folder with the benchmark suite's CSV files
    benchmarks: Path

    def done(self, tables: Iterable[str]) -> list[Result]:
        """Return the results of the profile that ended, of some tables."""
        tables = set(tables)
        return [
            result
            for result in self.results
            if (result.experiment.profile, result.status) == (self.profile, "ok") and result.experiment.table in tables
        ]

    def title(self, results: Iterable[Result]) -> str:
        """Return what panels of measured values are headed with: the models and the profile."""
        models = sorted({printed("model", result.experiment.model, self.paper.names) for result in results})
        return f"measured, {', '.join(models)} ({ABOUT[self.profile]})"


def canvas(
    rows: int, columns: int, *, title: str, width: float = 4.0, height: float = 3.2
) -> "tuple[Figure, list[list[Axes]]]":
    """Return a figure with a title and a grid of panels."""
    from matplotlib.figure import Figure as New

    figure = New(figsize=(width * columns, height * rows + 1.3), layout="constrained")
    figure.suptitle(_wrapped(title, figure, per_inch=10.5), fontsize=12)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
    return figure, [list(line) for line in panels]


def foot(figure: "Figure", note: str, handles: "Sequence[Artist]" = (), *, columns: int = 99) -> None:
    """Write a note below a figure, with the legend under it.

    Args:
        figure: what `canvas` returns.
        note: as long as it must be; it is wrapped.
        handles: of the legend.
        columns: of the legend, at most.
    """
    note = _wrapped(note, figure, per_inch=14.5)
    if not handles:
        figure.supxlabel(note, fontsize=8.5, color="#444444")
        return
    count = min(columns, len(handles))
    # The note is the legend's title: two texts below the panels would be drawn over one another.
    legend = figure.legend(
        handles=list(handles), loc="outside lower center", ncols=count, fontsize=8.5, frameon=False, title=note
    )
    legend.get_title().set(fontsize=8.5, color="#444444", multialignment="center")


def _wrapped(text: str, figure: "Figure", *, per_inch: float) -> str:
    return textwrap.fill(text, int(per_inch * figure.get_size_inches()[0]))


def head(axes: "Axes", source: str, subject: str) -> None:
    """Write above a panel what it shows, and in the line above that where it is from."""
    axes.set_title(f"{source}\n{subject}" if source else subject, fontsize=9.5, loc="left")


def not_run(axes: "Axes") -> None:
    """Say in an empty panel that nothing was run for it."""
    axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", va="center", color="#777777")
    axes.set(xticks=[], yticks=[])
