"""Scores as tables for a terminal or a file."""

from collections.abc import Sequence

from crosslore_eval.bootstrap import smallest_p_value
from crosslore_eval.comparison import Comparison
from crosslore_eval.errors import counted
from crosslore_eval.protocols import Missing
from crosslore_eval.scoring import Report

# In the place of a signature; the reason is in the warning.
NOT_COMPUTED = "not computed, see the warning"


def number(value: float) -> str:
    """Return a score with as many decimals as the official scripts print."""
    return f"{value:.4f}"


def print_report(report: Report) -> None:
    """Print one line a score: value, interval if there is one, signature."""
    columns = ["score", "value", *(["95 % interval"] if report.samples else []), "signature"]
    rows = []
    for score in report.scores:
        if score.value is None:
            rows.append([score.name, "-", *(["-"] if report.samples else []), NOT_COMPUTED])
            continue
        held = score.interval
        between = [f"{number(held.low)} to {number(held.high)}"] if held else []
        rows.append([score.name, number(score.value), *between, score.signature])
    _print_table(_title(report), columns, rows)


def _title(found: Report | Comparison) -> str:
    return f"{found.task}, protocol {found.protocol}, {counted(found.n, 'example')}"


def print_comparison(found: Comparison) -> None:
    """Print one line a score: A, B, B - A with its interval, p-value, signature."""
    rows = []
    for name, result in found.scores.items():
        if isinstance(result, Missing):
            rows.append([name, "-", "-", "-", "-", "-", NOT_COMPUTED])
            continue
        difference = result.difference
        held = difference.interval
        rows.append([
            name, number(difference.value_a), number(difference.value_b),
            f"{difference.value_b - difference.value_a:+.4f}", f"{held.low:+.4f} to {held.high:+.4f}",
            p_text(difference.p_value, found.samples), result.signature,
        ])  # fmt: skip
    columns = ["score", "A", "B", "B - A", "95 % interval", "p", "signature"]
    _print_table(f"{_title(found)}, A {found.a}, B {found.b}", columns, rows)


def p_text(p_value: float, samples: int) -> str:
    """Return a p-value as it is read: "< 0.001" where no one of 1000 swaps went as far, never a 0.

    Args:
        p_value: by approximate randomisation.
        samples: swaps behind it.
    """
    if p_value <= smallest_p_value(samples):
        return f"< {1 / samples:.2g}"
    return f"{p_value:.4f}" if p_value >= 0.001 else f"{p_value:.1e}"


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
