"""Scores as tables for a terminal and as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from crosslore_eval.bootstrap import Difference
from crosslore_eval.errors import EvalError
from crosslore_eval.protocols import Missing
from crosslore_eval.scoring import Report

PICTURE_ENDINGS = (".png", ".svg", ".pdf")


def number(value: float) -> str:
    """Return a score with as many decimals as the official scripts print."""
    return f"{value:.4f}"


def print_report(report: Report) -> None:
    """Print one line a score: value, interval if there is one, signature."""
    columns = ["score", "value", *(["95 % interval"] if report.samples else []), "signature"]
    rows = []
    for score in report.scores:
        if score.value is None:
            rows.append([score.name, "-", *(["-"] if report.samples else []), score.reason])
            continue
        held = score.interval
        between = [f"{number(held.low)} to {number(held.high)}"] if held else []
        rows.append([score.name, number(score.value), *between, score.signature])
    _print_table(f"{report.task}, protocol {report.protocol}, {report.n} examples", columns, rows)


def print_comparison(title: str, found: Mapping[str, Difference | Missing]) -> None:
    """Print one line a score: A, B, B - A with its interval, p-value."""
    rows = []
    for name, result in found.items():
        if isinstance(result, Missing):
            rows.append([name, "-", "-", "-", result.reason, "-"])
            continue
        held = result.interval
        rows.append([
            name, number(result.value_a), number(result.value_b), f"{result.value_b - result.value_a:+.4f}",
            f"{held.low:+.4f} to {held.high:+.4f}", f"{result.p_value:.4f}",
        ])  # fmt: skip
    _print_table(title, ["score", "A", "B", "B - A", "95 % interval", "p"], rows)


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # a file or a pipe: whole lines, tabs between columns
        print(title, "\t".join(columns), *("\t".join(row) for row in rows), sep="\n")
        return
    table = Table(title=title)
    for name in columns:
        # A signature is there to be copied: it may wrap, never be cut.
        table.add_column(name, overflow="fold", no_wrap=name not in ("signature", "95 % interval"))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def check_picture(path: Path | None) -> None:
    """Raise unless matplotlib can write a file of this name; its folder is made."""
    if path is None:
        return
    if path.suffix not in PICTURE_ENDINGS:
        raise EvalError(f"--plot must end in one of {', '.join(PICTURE_ENDINGS)}, got {path}.")
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
    import matplotlib

    matplotlib.use("Agg")  # no window, no display needed
    from matplotlib import pyplot

    first = next(iter(systems.values()))
    names = [score.name for score in first.scores if score.value is not None]
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(max(4.0, 1.6 * len(names)), 3.4), layout="constrained", squeeze=False
    )
    for panel, name in zip(panels[0], names, strict=True):
        for position, report in enumerate(systems.values()):
            score = next(score for score in report.scores if score.name == name)
            if score.value is None:
                continue
            bounds = score.interval
            reach = [[score.value - bounds.low], [bounds.high - score.value]] if bounds else None
            panel.bar(position, score.value, yerr=reach, capsize=4, width=0.7, color=f"C{position}", label=None)
            panel.annotate(number(score.value), (position, 0), xytext=(0, 4), textcoords="offset points",
                           ha="center", fontsize=7, color="white")  # fmt: skip
        panel.set_title(name, fontsize=9)
        panel.set_xticks(range(len(systems)), list(systems), fontsize=7)
        panel.tick_params(axis="y", labelsize=7)
    figure.suptitle(f"{first.task}, protocol {first.protocol}, {first.n} examples", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
