"""Figures 2a and 2b: what the benchmark suite measured, beside the numbers that the paper's text gives.

The values that the paper plots are not in its text; of figure 2a two shares are, of figure 2b none.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from reproduction.panels import Sources, canvas, foot, head
from reproduction.results import ResultError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, str]
# Columns that name a configuration of the benchmark suite.
SESSION = ("device", "threads", "dtype", "profile")
# What stands for "other operations" in the paper, in parts.
TRAINING, STEP = ("forward", "backward"), ("project", "update", "project_back", "residual", "other")
PARTS = {
    "SVD of attention weights": "#7f1d1d",
    "other SVD": "#d62728",
    "SVD or other fit of bases": "#ef8a62",
    "forward and backward": "#c7c7c7",
    "rest of the optimizer": "#1f77b4",
    "other operations": "#9e9e9e",
}
CONTENDERS = {
    "galore-torch": "GaLore (galore-torch)",
    "galore": "GaLore (this code)",
    "crosslore": "CrossLore",
    "crosslore_plus": "CrossLore+ (this code)",
}
# Bases of the benchmark suite that are the paper's two, and how they are drawn.
BASES = {
    "exact": ("conventional: SVD of the whole gradient (Eq. 2)", "#ff7f0e", "o"),
    "one head, random": ("cross-head: SVD of one head, drawn at random (Eq. 4)", "#1f77b4", "s"),
}


def time_split(sources: Sources) -> "Figure":
    """Return figure 2a: the share of fitting bases in the time of a training step."""
    path = sources.benchmarks / "time_split.csv"
    rows = [row for row in _rows(path) if row["figure"] == "amortised"]
    if not rows:
        raise ResultError(f"{path} must have rows of amortised steps, it has none. Run `make benchmark` again.")
    stated = {n.quantity: n.value for n in sources.paper.figures["2a"].numbers}
    svd, attention = stated["share of SVD in the time of fine-tuning"], stated["share of SVD for MHA layers"]
    bars: dict[str, dict[str, float]] = {
        f"paper, LLaMA2-7B, GaLore\n(SVD > {svd} %, of attention about {attention} %)": {
            "SVD of attention weights": attention,
            "other SVD": svd - attention,
            "other operations": 100 - svd,
        }
    }
    for row in rows:
        seconds = {name: float(row[name]) for name in ("fit", *TRAINING, *STEP)}
        whole = sum(seconds.values())
        name, fit = CONTENDERS.get(row["contender"], row["contender"]), 100 * seconds["fit"] / whole
        bars[f"measured, {name}\n(fit of bases {fit:.1f} %)"] = {
            "SVD or other fit of bases": fit,
            "forward and backward": 100 * sum(seconds[name] for name in TRAINING) / whole,
            "rest of the optimizer": 100 * sum(seconds[name] for name in STEP) / whole,
        }
    last = rows[-1]
    note = (
        f"Measured: SmolLM2-135M, 1 x 128 tokens a step, rank {last['rank']}, one refresh in 200 steps, "
        f"{_where(last)}. "
        "The paper: shares as its text gives them, on a GPU; it does not state the length and number of rows of a step."
    )
    figure, panels = canvas(1, 1, title="Figure 2a. Where the time of training goes", width=9.5, height=3.4)
    _stacked(panels[0][0], bars)
    foot(figure, note, panels[0][0].get_legend_handles_labels()[0], columns=3)
    return figure


def subspace_error(sources: Sources) -> "Figure":
    """Return figure 2b: what a basis misses of the gradients of query and key weights, on the fit's batch and later."""
    rows = _rows(sources.benchmarks / "subspace_error.csv")
    weights = [name for name in dict.fromkeys(row["weight"] for row in rows) if name in ("q_proj", "k_proj")]
    ranks = list(dict.fromkeys(row["rank"] for row in rows))
    last = next(row for row in rows[::-1] if row["weight"] == weights[-1])
    note = (
        f"Measured: gradients of SmolLM2-135M on {last['rows'].upper()}, {last['count']} of them for each point, "
        f"{_where(last)}; medians and quartiles. The values that the paper plots (LLaMA2-7B) are not in its text; it "
        "says that the error of Eq. 4 is larger than that of Eq. 2, and that both are low."
    )
    figure, panels = canvas(len(weights), len(ranks), title="Figure 2b. Error of low-rank projection", width=4.6)
    for line, weight in zip(panels, weights, strict=True):
        for axes, rank in zip(line, ranks, strict=True):
            for basis, (label, color, marker) in BASES.items():
                mine = [r for r in rows if (r["weight"], r["rank"], r["basis"]) == (weight, rank, basis)]
                low, middle, high = ([float(row[f"error_{part}"]) for row in mine] for part in _QUARTILES)
                reach = [
                    [max(0.0, m - v) for m, v in zip(middle, low, strict=True)],
                    [max(0.0, v - m) for m, v in zip(middle, high, strict=True)],
                ]
                # By index, a little apart: lags are 0, 1, 2, 4, and quartiles overlap.
                places = [n + (0.08 if basis == "exact" else -0.08) for n in range(len(mine))]
                axes.errorbar(
                    places, middle, yerr=reach, label=label, color=color, marker=marker, capsize=3, markersize=4
                )
                axes.set_xticks(range(len(mine)), [row["lag"] for row in mine])
            axes.set(xlabel="batches after the fit", ylabel="relative error |G - P Pᵀ G| / |G|", ylim=(0, None))
            head(axes, "", f"{weight}, rank {rank}")
    foot(figure, note, panels[0][0].get_legend_handles_labels()[0], columns=2)
    return figure


_QUARTILES = ("lower_quartile", "median", "upper_quartile")


def _stacked(axes: "Axes", bars: Mapping[str, Mapping[str, float]]) -> None:
    """Draw horizontal bars of parts in percent, the first one on top."""
    names = list(bars)
    left = dict.fromkeys(names, 0.0)
    for part, color in PARTS.items():
        widths = [bars[name].get(part, 0.0) for name in names]
        drawn = axes.barh(names, widths, left=[left[name] for name in names], color=color, label=part, height=0.66)
        dark = part in ("SVD of attention weights", "other SVD", "rest of the optimizer")
        labels = [f"{width:.0f} %" if width >= 5 else "" for width in widths]
        axes.bar_label(drawn, labels, label_type="center", fontsize=8, color="white" if dark else "black")
        left = {name: left[name] + width for name, width in zip(names, widths, strict=True)}
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlim=(0, 100), xlabel="share of the time, %")


def _rows(path: Path) -> list[Row]:
    """Return the rows of the configuration that was measured last, in a file of the benchmark suite."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}. Run `make benchmark` first.") from None
    if not rows or not {"date", *SESSION} <= set(rows[0]):
        raise ResultError(
            f"{path} must be a file of the benchmark suite with rows, it has {len(rows)} and other columns. "
            "Run `make benchmark` again."
        )
    last = max(rows, key=lambda row: row["date"])
    return [row for row in rows if all(row[name] == last[name] for name in SESSION)]


def _where(row: Row) -> str:
    return f"{row['device']}, {row['dtype']}, commit {row['commit']}"


DRAWINGS = {"2a": time_split, "2b": subspace_error}
