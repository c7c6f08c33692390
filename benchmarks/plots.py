"""Pictures of the benchmark suite, made from its CSV files alone.

    python benchmarks/plots.py                       # results/benchmarks/*.csv -> *.png

A file may hold several configurations (device, threads, dtype, profile); the one measured last is drawn.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ROOT, SESSION, Row, grouped, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches of one bar, and of what is above and below the bars.
BAR, FRAME = 0.32, 1.1
OURS, PEER, LIGHT, DARK = "#1f77b4", "#7f7f7f", "#aec7e8", "#d62728"
PEERS = ("torch", "galore-torch", "apollo-torch", "bitsandbytes", "torchao")


def newest(rows: list[Row]) -> list[Row]:
    """Return the rows of the configuration that was measured last."""
    last = max(rows, key=lambda row: row["date"])
    return [row for row in rows if all(row[column] == last[column] for column in SESSION)]


def numbers(rows: list[Row], column: str, *, factor: float = 1.0) -> list[float]:
    """Return a column, 0 where it is empty."""
    return [factor * float(row[column] or 0) for row in rows]


def canvas(heights: Sequence[int], columns: int, rows: list[Row], title: str) -> tuple["Figure", Any]:  # Any: of axes
    """Return a figure with one line of axes for each height (in bars), its title and conditions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    inches = [BAR * count + FRAME for count in heights]
    size = (6.8 * columns, sum(inches) + 0.9)
    figure, axes = pyplot.subplots(
        len(heights), columns, figsize=size, squeeze=False, layout="constrained", height_ratios=inches
    )
    row = rows[-1]
    profile = "" if row["profile"] == "full" else f", {row['profile']} sizes"
    conditions = (
        f"{row['device']}, {row['threads']} thread(s), {row['dtype']}, torch {row['torch']}, "
        f"commit {row['commit']}, {row['date'][:10]}{profile}"
    )
    figure.suptitle("\n".join([title, *textwrap.wrap(conditions, 90 * columns)]), fontsize=10)
    return figure, axes


def bars(
    axes: "Axes",
    names: Sequence[str],
    values: Sequence[float],
    *,
    label: str,
    colors: Any,
    form: str = "%.3g",
    errors: Any = None,
) -> None:  # Any: as matplotlib takes them
    """Draw labelled horizontal bars, the first one on top; `errors` are lengths to the left and right of the ends."""
    drawn = axes.barh(names, values, color=colors, height=0.72, xerr=errors, capsize=3)
    axes.bar_label(drawn, fmt=form, padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlabel(label)
    axes.tick_params(axis="y", labelsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def colors(names: Sequence[str]) -> list[str]:
    """Return grey for the peers and blue for the presets."""
    return [PEER if name.startswith(PEERS) else OURS for name in names]


def step_time(rows: list[Row]) -> "Figure":
    """Draw amortised and ordinary steps, and how uneven steps are."""
    rows = [row for row in rows if row["status"] == "ok"]
    groups = grouped(rows, "workload")
    figure, axes = canvas([len(g) for g in groups.values()], 2, rows, "Optimizer step (blue: presets, grey: peers)")
    for line, ((workload,), members) in zip(axes, groups.items(), strict=True):
        members.sort(key=lambda row: float(row["amortised_seconds"]))
        names = [row["contender"] for row in members]
        label = "seconds a step, refreshes amortised over 200 (dark line: step without a refresh)"
        bars(line[0], names, numbers(members, "amortised_seconds"), label=label, colors=colors(names))
        line[0].scatter(numbers(members, "ordinary_seconds"), names, marker="|", s=160, color="black", zorder=3)
        ratios = numbers(members, "worst_over_median_200")
        bars(line[1], names, ratios, label="worst step / ordinary step (log scale)", colors=colors(names))
        line[1].set(xscale="log", xlim=(0.8, 3 * max(2.0, *ratios)))
        for one in line:
            one.set_title(workload, fontsize=10)
    return figure


def refresh_time(rows: list[Row]) -> "Figure":
    """Draw how much faster than an SVD each fit is, and how good its basis."""
    rows = sorted(rows, key=lambda row: float(row["svd_over_this"] or 0))
    names = [row["contender"] for row in rows]
    title = f"Refresh of one {rows[0]['size']} x {rows[0]['size']} matrix at rank {rows[0]['rank']}"
    figure, axes = canvas([len(rows)], 2, rows, title)
    speed = numbers(rows, "svd_over_this")
    bars(axes[0][0], names, speed, label="times as fast as torch.linalg.svd (log scale)", colors=OURS)
    axes[0][0].set(xscale="log", xlim=(0.5 * min(speed), 5 * max(speed)))
    errors = numbers(rows, "error")
    bars(axes[0][1], names, errors, label="relative error |G - G P P^T| / |G|", colors=LIGHT)
    return figure


def memory(rows: list[Row]) -> "Figure":
    """Draw state and temporary memory."""
    rows = [row for row in rows if row["status"] == "ok"]
    groups = grouped(rows, "workload")
    figure, axes = canvas([len(g) for g in groups.values()], 3, rows, "Optimizer memory (blue: presets, grey: peers)")
    parts = ("state_bytes", "step_temporary_bytes", "refresh_temporary_bytes")
    labels = ("state, MiB", "most temporary memory of a step, MiB", "the same for a step with a refresh, MiB")
    for line, ((workload,), members) in zip(axes, groups.items(), strict=True):
        members.sort(key=lambda row: float(row["state_bytes"]))
        for one, column, label in zip(line, parts, labels, strict=True):
            some = [row for row in members if row[column]]  # not all have refreshes
            names = [row["contender"] for row in some]
            bars(one, names, numbers(some, column, factor=2**-20), label=label, colors=colors(names))
            one.set_title(workload, fontsize=10)
    return figure


def subspace_error(rows: list[Row]) -> "Figure":
    """Draw the errors of all bases on the batch they were fitted on and on later ones."""
    kinds, ranks = list(grouped(rows, "weight")), list(grouped(rows, "rank"))
    cells = grouped(rows, "weight", "rank")
    tallest = {kind: max(len(grouped(cells.get((*kind, *rank), []), "basis")) for rank in ranks) for kind in kinds}
    title = f"What a basis misses of a real gradient ({rows[-1]['rows']}); medians and quartiles over layers"
    figure, axes = canvas(list(tallest.values()), len(ranks), rows, title)
    lags = sorted({int(row["lag"]) for row in rows})
    shades = [OURS, "#ff7f0e", "#2ca02c", DARK, "#9467bd"]
    for line, kind in zip(axes, kinds, strict=True):
        for one, rank in zip(line, ranks, strict=True):
            members = cells.get((*kind, *rank), [])
            names = [name for (name,) in grouped(members, "basis")]
            for i, lag in enumerate(lags):
                mine = [row for row in members if int(row["lag"]) == lag]
                middle = numbers(mine, "error_median")
                low, high = numbers(mine, "error_lower_quartile"), numbers(mine, "error_upper_quartile")
                reach = [
                    [max(0.0, m - v) for m, v in zip(middle, low, strict=True)],
                    [max(0.0, v - m) for m, v in zip(middle, high, strict=True)],
                ]
                places = [names.index(row["basis"]) + 0.2 * (i - (len(lags) - 1) / 2) for row in mine]
                label = "batch of the fit" if lag == 0 else f"{lag} batch{'es' * (lag > 1)} later"
                one.errorbar(middle, places, xerr=reach, fmt="o", markersize=3.5, color=shades[i % 5], label=label)
            one.set_yticks(range(len(names)), names, fontsize=9)
            one.invert_yaxis()
            one.grid(alpha=0.3)
            one.set(xlabel="relative error |G - G P P^T| / |G|", title=f"{kind[0]}, rank {rank[0]}")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(lags), fontsize=9)
    return figure


def kept_positions(rows: list[Row]) -> "Figure":
    """Draw the share of later residual energy that each choice of positions holds."""
    kinds = list(dict.fromkeys(row["weight"] for row in rows))
    title = f"Energy of later residuals at the kept {float(rows[0]['ratio']):.1%} of positions"
    figure, axes = canvas([len(rows) // len(kinds)], len(kinds), rows, title)
    for one, kind in zip(axes[0], kinds, strict=True):
        mine = [row for row in rows if row["weight"] == kind]
        names = [row["choice"] for row in mine]
        bars(one, names, numbers(mine, "share_median", factor=100), label=f"{kind}: percent, median", colors=OURS)
    return figure


def time_split(rows: list[Row]) -> "Figure":
    """Draw the phases of an amortised step as stacked bars: of training, and of the optimizer alone."""
    phases = ("forward", "backward", "fit", "project", "update", "project_back", "residual", "other")
    shades = ["#c7c7c7", "#7f7f7f", DARK, "#ff7f0e", OURS, "#2ca02c", "#9467bd", "#8c564b"]
    steps = [row for row in rows if row["figure"] == "amortised"] or rows
    ordinary = {row["contender"]: row for row in rows if row["figure"] == "ordinary"}
    # What one fit of every basis adds: the amortised step has a 200th of it.
    fits = [
        row | {p: 200 * max(0.0, float(row[p]) - float(ordinary[row["contender"]][p])) for p in phases[2:]}
        for row in steps
    ]
    title = "Training step of SmolLM2-135M, batch 1 x 128 tokens"
    figure, axes = canvas([len(steps)], 3, rows, f"{title}, rank {rows[-1]['rank']}")
    shown = (
        (steps, phases, "seconds a step, refreshes amortised over 200"),
        (steps, phases[2:], "seconds of the optimizer's part of it"),
        (fits, phases[2:], "seconds that one refresh of every weight adds"),
    )
    for one, (members, parts, label) in zip(axes[0], shown, strict=True):
        names = [row["contender"] for row in members]
        left = [0.0] * len(members)
        for phase in parts:
            values = numbers(members, phase)
            one.barh(names, values, left=left, color=shades[phases.index(phase)], label=phase, height=0.7)
            left = [a + b for a, b in zip(left, values, strict=True)]
        one.invert_yaxis()
        one.set_xlabel(label)
        one.grid(axis="x", alpha=0.3)
        one.set_axisbelow(True)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(phases), fontsize=9)
    return figure


def train_step(rows: list[Row]) -> "Figure":
    """Draw seconds and memory of whole training steps, a line for each rank."""
    rows = [row for row in rows if row["status"] == "ok"]
    groups = grouped(rows, "rank")
    title = "Training step of SmolLM2-135M, 1 x 128 tokens (blue: presets, grey: peers)"
    figure, axes = canvas([len(g) for g in groups.values()], 2, rows, title)
    for line, ((rank,), members) in zip(axes, groups.items(), strict=True):
        members.sort(key=lambda row: float(row["amortised_seconds"]))
        names = [row["contender"] for row in members]
        shades = [PEER if name.startswith((*PEERS, "LoRA", "DoRA")) else OURS for name in names]
        bars(line[0], names, numbers(members, "amortised_seconds"), label="seconds a step, amortised", colors=shades)
        bars(line[1], names, numbers(members, "peak_mib"), label="peak above the loaded model, MiB", colors=shades)
        for one in line:
            one.set_title(f"rank {rank}", fontsize=10)
    return figure


def step_ratio(rows: list[Row]) -> "Figure":
    """Draw what a step costs beside LoRA's, with quartiles."""
    groups = grouped(rows, "rank")
    title = "Training step of SmolLM2-135M over LoRA's of the same turn, 1 x 128 tokens"
    figure, axes = canvas([len(g) for g in groups.values()], 1, rows, title)
    for (one,), ((rank,), members) in zip(axes, groups.items(), strict=True):
        members.sort(key=lambda row: float(row["over_lora"]))
        names = [row["contender"] for row in members]
        middles, low, high = (numbers(members, f"over_lora{end}") for end in ("", "_low", "_high"))
        sides = [
            [m - x for m, x in zip(middles, low, strict=True)],
            [x - m for m, x in zip(middles, high, strict=True)],
        ]
        shades = [PEER if name.startswith((*PEERS, "LoRA")) else OURS for name in names]
        bars(one, names, middles, label="over LoRA, median and quartiles", colors=shades, form="%.2f", errors=sides)
        one.axvline(1, color="black", linewidth=0.8)
        one.set_title(f"rank {rank}", fontsize=10)
    return figure


DRAWINGS = {
    f.__name__: f
    for f in (step_time, refresh_time, memory, subspace_error, kept_positions, time_split, train_step, step_ratio)
}


def draw_all(out: Path, parts: Sequence[str] = tuple(DRAWINGS)) -> list[Path]:
    """Draw every part that has rows; return the pictures' paths."""
    from matplotlib import pyplot

    paths = []
    for part in parts:
        rows = read_rows(out / f"{part}.csv")
        if rows:
            figure = DRAWINGS[part](newest(rows))
            paths.append(out / f"{part}.png")
            figure.savefig(paths[-1], dpi=130)
            pyplot.close(figure)
    return paths


def main() -> int:
    """Draw all pictures of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks", metavar="DIR")
    paths = draw_all(parser.parse_args().out)
    print("\n".join(map(str, paths)) or "No CSV file has rows. Run: make benchmark")
    return 0


if __name__ == "__main__":
    sys.exit(main())
