"""Scores as a picture: one panel a score, one bar a system."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crosslore_eval.errors import EvalError, counted
from crosslore_eval.scoring import Report, Score

ENDINGS = (".png", ".svg", ".pdf")
PANELS_IN_A_ROW = 4
# Inches.
PANEL_WIDTH, PANEL_HEIGHT = 2.2, 2.3
LEGEND_LINE = 0.22
# Characters of a legend's line at the width of two panels.
LONGEST_LABEL = 60
# Scores that are shown as 0.0000 get an axis to 1, not one of their own rounding errors.
SMALLEST_SHOWN = 0.5e-4


def check_picture(path: Path | None) -> None:
    """Raise unless matplotlib can write a file of this name; its folder is made."""
    if path is None:
        return
    if path.suffix not in ENDINGS:
        raise EvalError(f"--plot must end in one of {', '.join(ENDINGS)}, got {path}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvalError(f"--plot: cannot make the folder {path.parent}: {error.strerror}.") from error


def draw(systems: Mapping[str, Report], path: Path) -> None:
    """Write a picture with one panel a score, a bar for each system with its 95 % interval.

    Args:
        systems: reports by system name; the same task, protocol and examples.
        path: .png, .svg or .pdf.
    """
    figure = figure_of(systems)
    figure.savefig(path, dpi=150)


def figure_of(systems: Mapping[str, Report]) -> Any:  # Any: matplotlib's figure, imported where it is used
    """Return the picture as a figure that no window shows.

    Args:
        systems: reports by system name; the same task, protocol and examples.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    first = next(iter(systems.values()))
    names = [score.name for score in first.scores if score.value is not None]
    if not names:
        raise EvalError(f"--plot needs a score, got none that could be computed for {first.task}. Leave --plot out.")
    rows = -(-len(names) // PANELS_IN_A_ROW)
    columns = -(-len(names) // rows)
    size = (PANEL_WIDTH * max(columns, 2), PANEL_HEIGHT * rows + LEGEND_LINE * (len(systems) + 2))
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, name in zip(panels, names, strict=False):
        own = [next(score for score in report.scores if score.name == name) for report in systems.values()]
        _draw_panel(panel, name, own)
    for panel in panels[len(names) :]:
        panel.remove()
    figure.suptitle(f"{first.task}, protocol {first.protocol}, {counted(first.n, 'example')}", fontsize=9)
    bars = [Patch(color=f"C{position}", label=_shortened(name)) for position, name in enumerate(systems)]
    figure.legend(handles=bars, loc="outside lower center", fontsize=8, frameon=False)
    return figure


def _draw_panel(panel: Any, name: str, scores: Sequence[Score]) -> None:
    """Draw the bars of one score, their values above them."""
    lowest, highest = 0.0, 0.0
    for position, score in enumerate(scores):
        value = 0.0 if score.value is None else score.value
        low, high = (score.interval.low, score.interval.high) if score.interval else (value, value)
        # Equal examples: an interval of no width, which rounding may turn around.
        reach = [[max(value - low, 0.0)], [max(high - value, 0.0)]] if score.interval else None
        panel.bar(position, value, yerr=reach, capsize=3, width=0.7, color=f"C{position}", ecolor="0.2")
        text = "-" if score.value is None else f"{value:.4f}"
        panel.annotate(text, (position, max(value, high)), xytext=(0, 3), textcoords="offset points",
                       ha="center", fontsize=7)  # fmt: skip
        lowest, highest = min(lowest, value, low), max(highest, value, high)
    panel.set_title(name, fontsize=9)
    panel.set_xticks([])
    panel.set_xlim(-0.7, len(scores) - 0.3)
    panel.set_ylim(1.15 * lowest, 1.15 * highest if max(highest, -lowest) >= SMALLEST_SHOWN else 1.0)
    panel.tick_params(axis="y", labelsize=7)


def _shortened(name: str) -> str:
    """Return a name that fits into a line of the legend, without its middle if it is long."""
    if len(name) <= LONGEST_LABEL:
        return name
    half = (LONGEST_LABEL - 3) // 2
    return f"{name[:half]}...{name[-half:]}"
