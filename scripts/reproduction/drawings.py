"""Figures 1, 3 and 4: a line of panels for the paper's numbers, and one for what was measured."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from reproduction.grids import metric_of, printed
from reproduction.panels import COLORS, OTHER, Sources, canvas, foot, head, not_run
from reproduction.paper import Paper
from reproduction.results import Result
from reproduction.tables import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# The score of each data set of figure 1, and the tables that hold it with its hours.
TRADE_OFF = {"gsm8k": ("accuracy", (1, 5)), "mawps": ("accuracy", (1, 5)), "e2e": ("BLEU", (2, 7))}
TABLES = {f"table{number}" for _, numbers in TRADE_OFF.values() for number in numbers}
# The rank that the bars of figure 1 are of, where it was run.
BAR_RANK = 128
# By rank; "*" is a method without one.
MARKERS = {0: "*", 4: "<", 8: "v", 16: "o", 32: "s", 64: "p", 128: "^", 256: "D"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a method reached at a rank on a data set."""

    dataset: str
    # as a legend shows it
    method: str
    rank: int
    hours: float
    score: float


def figure_1(sources: Sources) -> "Figure":
    """Return hours of GaLore and CrossLore by data set, and what score all methods reach in their hours."""
    paper = sources.paper
    model = paper.figures["1"].models[0]
    lines = [(f"paper, {paper.names.models[model]}", _points_of_paper(paper, model))]
    mine = sources.done(TABLES)
    if mine:
        lines.append((sources.title(mine), _points(sources)))
    note = "Nothing was measured. " * (not mine)
    note += "Left: hours of GaLore and CrossLore. Others: hours of all methods, log scale, and the score they lead to."
    title = f"Figure 1. {paper.figures['1'].caption}"
    figure, panels = canvas(len(lines), 4, title=title)
    for line, (source, points) in zip(panels, lines, strict=True):
        _hours(line[0], points, paper=paper, source=source)
        for axes, (dataset, (metric, _)) in zip(line[1:], TRADE_OFF.items(), strict=True):
            _scatter(axes, [point for point in points if point.dataset == dataset])
            about = paper.names.metrics[metric]
            axes.set(xlabel="hours", ylabel=about.title)
            head(axes, "", f"{paper.names.datasets[dataset]}: {about.head} by hours")
    foot(figure, note, _handles([point for _, points in lines for point in points]))
    return figure


def _points_of_paper(paper: Paper, model: str) -> list[Point]:
    figures = {key: cell.figure for key, cell in paper.by_key.items() if key.table in TABLES and key.model == model}
    points = []
    for key, score in figures.items():
        hours = figures.get(key._replace(column="time"))
        if key.column == TRADE_OFF[key.dataset][0] and score is not None and hours is not None and key.rank:
            method = printed("method", key.method, paper.names, own=False)
            points.append(
                Point(dataset=key.dataset, method=method, rank=key.rank, hours=float(hours), score=float(score))
            )
    return points


def _points(sources: Sources) -> list[Point]:
    """Return the measured points, each a mean over seeds."""
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = defaultdict(list)
    for result in sources.done(TABLES):
        cell = result.experiment
        score = number_of(result, TRADE_OFF[cell.dataset][0])
        if score is not None and result.time is not None:
            method = printed("method", cell.method, sources.paper.names)
            found[cell.dataset, method, cell.rank].append((result.time, score))
    points = []
    for (dataset, method, rank), runs in found.items():
        hours, score = (fmean(numbers) for numbers in zip(*runs, strict=True))
        points.append(Point(dataset=dataset, method=method, rank=rank, hours=hours, score=score))
    return points


def _hours(axes: "Axes", points: Sequence[Point], *, paper: Paper, source: str) -> None:
    """Draw a bar for GaLore and one for CrossLore for each data set, with the share that is saved."""
    ranks = [point.rank for point in points if point.rank]
    rank = BAR_RANK if BAR_RANK in ranks else max(ranks, default=0)
    hours = {(p.dataset, p.method): p.hours for p in points if p.rank == rank}
    names = [method for method in ("GaLore", "GaLore (this code)", "CrossLore") if any(m == method for _, m in hours)]
    width = 0.8 / max(1, len(names))
    for index, method in enumerate(names):
        places = [n + width * (index - (len(names) - 1) / 2) for n in range(len(TRADE_OFF))]
        values = [hours.get((dataset, method), 0.0) for dataset in TRADE_OFF]
        drawn = axes.bar(places, values, width=0.92 * width, color=COLORS[method], label=method)
        labels = [_bar_label(dataset, method, hours) for dataset in TRADE_OFF]
        axes.bar_label(drawn, labels, fontsize=7.5, padding=2)
    for place, dataset in enumerate(TRADE_OFF):
        if not any(name == dataset for name, _ in hours):
            axes.text(place, 0, "not run", ha="center", va="bottom", fontsize=8, color="#777777")
    axes.set_xticks(range(len(TRADE_OFF)), [paper.names.datasets[dataset] for dataset in TRADE_OFF], fontsize=9)
    axes.set_ylabel("hours")
    axes.margins(y=0.2)
    axes.grid(axis="x", visible=False)
    head(axes, source, f"hours of training, rank {rank}" if rank else "no rank was run")


def _bar_label(dataset: str, method: str, hours: Mapping[tuple[str, str], float]) -> str:
    value, base = hours.get((dataset, method)), hours.get((dataset, "GaLore"))
    if value is None:
        return "not\nrun" if any(name == dataset for name, _ in hours) else ""
    text = f"{value:.2g}" if value < 1 else f"{value:.4g}"
    return f"{text}\n{100 * (value / base - 1):+.0f} %" if method == "CrossLore" and base else text


def _scatter(axes: "Axes", points: Sequence[Point]) -> None:
    for point in points:
        color, marker = COLORS.get(point.method, OTHER), _marker(point.rank)
        axes.scatter(point.hours, point.score, color=color, marker=marker, s=52, edgecolor="white", linewidth=0.5)
    if not points:
        not_run(axes)
        return
    axes.set_xscale("log")
    axes.margins(0.12)
    _plain_hours(axes, [point.hours for point in points])


def _plain_hours(axes: "Axes", hours: Sequence[float]) -> None:
    """Mark hours of a log axis as 0.5, 1, 2 and 5, as far as they are in sight; the ends if there are too few."""
    from matplotlib.ticker import NullFormatter, NullLocator

    marks = [digit * 10.0**power for power in range(-6, 5) for digit in (1, 2, 5)]
    low, high = axes.get_xlim()
    seen = [mark for mark in marks if low <= mark <= high]
    seen = seen if len(seen) > 1 else sorted({min(hours), max(hours)})
    axes.set_xticks(seen, [f"{mark:.3g}" for mark in seen])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _marker(rank: int) -> str:
    return MARKERS.get(rank, "X")


def _handles(points: Sequence[Point]) -> "list[Line2D]":
    """Return the legend: a color for each method, a marker for each rank."""
    from matplotlib.lines import Line2D

    names = [name for name in COLORS if any(point.method == name for point in points)]
    names += sorted({point.method for point in points} - set(names))
    handles = [Line2D([], [], color=COLORS.get(name, OTHER), marker="o", linestyle="", label=name) for name in names]
    for rank in sorted({point.rank for point in points}):
        label = f"rank {rank}" if rank else "no rank"
        handles.append(Line2D([], [], color="#444444", marker=_marker(rank), linestyle="", label=label))
    return handles


def residual_figure(number: str, sources: Sources) -> "Figure":
    """Return figure 3 or 4: the score of each data set by the residual ratio, means and deviations over seeds."""
    paper, table, about = sources.paper, sources.paper.tables[10], sources.paper.figures[number]
    model = about.models[0]
    mine = [r for r in sources.done([table.name]) if sources.profile != "paper" or r.experiment.model == model]
    rows = [row for row in table.rows if row.labels["model"] == model]
    note = "Nothing was measured. " * (not mine)
    note += "Means over seeds with their standard deviation. The paper does not say which score it shows for E2E; "
    note += "measured is the mean of ROUGE-1, -2 and -L, which its figures agree with."
    figure, panels = canvas(
        1 + bool(mine),
        len(rows),
        title=f"Figure {number}. {about.caption.split('. ')[0]}",
    )
    foot(figure, note)
    for index, row in enumerate(rows):
        dataset, stated = str(row.labels["dataset"]), paper.names.metrics[str(row.labels["metric"])]
        figures = [(cell.key.column, float(cell.figure), float(cell.std or 0)) for cell in row.cells if cell.figure]
        by = [(ratio, mean, std, row.cells[0].seeds or 1) for ratio, mean, std in figures]
        _by_ratio(panels[0][index], by, color="#555555")
        panels[0][index].set_ylabel("score (not stated)" if stated.name == "not_stated" else stated.title)
        head(panels[0][index], "" if index else f"paper, {paper.names.models[model]}", paper.names.datasets[dataset])
        if mine:
            metric = metric_of(table, dataset)
            some = [result for result in mine if result.experiment.dataset == dataset]
            _by_ratio(panels[1][index], _over_seeds(some, metric), color=COLORS["CrossLore"])
            panels[1][index].set_ylabel(paper.names.metrics[metric].title)
            head(panels[1][index], "" if index else sources.title(mine), paper.names.datasets[dataset])
    return figure


def _over_seeds(results: Sequence[Result], metric: str) -> list[tuple[str, float, float, int]]:
    """Return residual ratio, mean, standard deviation and number of seeds."""
    found: dict[str, list[float]] = defaultdict(list)
    for result in results:
        number = number_of(result, metric)
        if number is not None and result.experiment.column is not None:
            found[result.experiment.column].append(number)
    return [(ratio, fmean(n), stdev(n) if len(n) > 1 else 0.0, len(n)) for ratio, n in sorted(found.items())]


def _by_ratio(axes: "Axes", by: Sequence[tuple[str, float, float, int]], *, color: str) -> None:
    if not by:
        not_run(axes)
        return
    ratios, means, stds, seeds = zip(*by, strict=True)
    places = [float(ratio) for ratio in ratios]
    spread = stds if max(seeds) > 1 else None  # one seed has no deviation
    axes.errorbar(places, means, yerr=spread, color=color, marker="o", markersize=5, capsize=4, linewidth=1.4)
    for place, mean, std in zip(places, means, stds, strict=True):
        top = (place, mean + std)
        axes.annotate(f"{mean:.2f}", top, xytext=(0, 4), textcoords="offset points", ha="center", fontsize=7.5)
    counts = sorted(set(seeds))
    said = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    axes.set_xticks(places, ratios)
    axes.set_xlabel(f"residual ratio, % ({said} seed{'' if counts == [1] else 's'})", fontsize=9)
    axes.margins(0.15)
