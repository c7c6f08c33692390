"""Tables for a terminal: by rich where it is installed, plain columns in a pipe and without it."""

import sys
from collections.abc import Sequence


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print one line a row; no line is ever cut.

    Args:
        columns: names.
        rows: cells, as many as columns in each.
        right: columns of numbers, aligned on the right.
    """
    if sys.stdout.isatty() and _print_rich(columns, rows, right):
        return
    widths = [max(len(cell) for cell in cells) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = zip(columns, row, widths, strict=True)
        print("  ".join(c.rjust(w) if name in right else c.ljust(w) for name, c, w in cells).rstrip())


def _print_rich(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> bool:
    """Print by rich; return False if it is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    table = Table(box=None, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row, style="bold" if row[0].startswith("*") else None)
    Console(highlight=False, markup=False).print(table)
    return True
