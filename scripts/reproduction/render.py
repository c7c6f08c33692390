"""Rendering of a table with several sources: `render(grid, "md" | "csv" | "latex")`.

A grid has one line for each row and source: what the paper reports, what was measured, their difference. CSV has
the deviation and the number of seeds in columns of their own. LaTeX needs the package booktabs.
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby
from math import isfinite
from statistics import fmean, stdev

DASH = "–"


@dataclass(frozen=True, kw_only=True)
class Value:
    """An entry of a table: a number, perhaps with its spread, or a word in its place."""

    number: Decimal | None = None
    # standard deviation over seeds
    std: Decimal | None = None
    seeds: int | None = None
    # bounds of a 95 % interval
    interval: tuple[Decimal, Decimal] | None = None
    # after the number: "1 out of memory"
    note: str = ""
    # in place of a number: "cosine", "out of memory", "not run"
    text: str = ""
    # with a sign in front, for differences
    signed: bool = False

    @property
    def printed(self) -> str:
        """The number or the word."""
        if self.number is None:
            return self.text or DASH
        return f"{self.number:+f}" if self.signed else f"{self.number:f}"


@dataclass(frozen=True, kw_only=True)
class Head:
    """A column's head; neighbours of one group share a line above them where the format has one."""

    text: str
    group: str = ""
    # "↓", "↑" or nothing: which side is better
    arrow: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of one source; None is a missing entry."""

    labels: tuple[str, ...]
    source: str
    values: tuple[Value | None, ...]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table that can be rendered."""

    name: str
    caption: str
    # heads of the labels that lead a row
    labels: tuple[str, ...]
    heads: tuple[Head, ...]
    lines: tuple[Line, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the entries come from, each source once."""
        return tuple(dict.fromkeys(line.source for line in self.lines))


def measured(numbers: Sequence[float], *, like: Decimal | None = None) -> Value:
    """Return the mean of one number for each seed, with its sample deviation if there are several.

    Args:
        numbers: at least one.
        like: a figure whose decimals the value takes, two at least.

    Raises:
        ValueError: if there are no numbers, or one is not finite.
    """
    if not numbers or not all(isfinite(number) for number in numbers):
        raise ValueError(
            f"numbers must hold a finite number for each seed, at least one, got {list(numbers)}. "
            "Pass None for a cell without a run, and Value(text=...) for a run that failed."
        )
    step = like if like is not None else Decimal("0.01")
    spread = rounded(stdev(numbers), like=step) if len(numbers) > 1 else None
    return Value(number=rounded(fmean(numbers), like=step), std=spread, seeds=len(numbers))


def rounded(number: float, *, like: Decimal) -> Decimal:
    """Return a number with as many decimals as a figure, two at least."""
    places = max(2, -int(like.as_tuple().exponent))
    return Decimal(repr(float(number))).quantize(Decimal(1).scaleb(-places))


def difference(value: Value | None, reference: Value | None) -> Value | None:
    """Return value minus reference with its sign; None unless both are numbers."""
    if value is None or reference is None or value.number is None or reference.number is None:
        return None
    return Value(number=value.number - reference.number, signed=True)


def render(grid: Grid, form: str) -> str:
    """Return a grid as "md", "csv" or "latex", ended by a line break.

    Raises:
        ValueError: for another format.
    """
    if form not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {form!r}. Choose one of these.")
    return FORMATS[form](grid)


def _markdown(grid: Grid) -> str:
    heads = [f"{head.group} {head.text} {head.arrow}".strip() for head in grid.heads]
    rows = [[*grid.labels, "source", *heads]]
    rows.append(["---"] * (len(grid.labels) + 1) + ["---:"] * len(heads))
    seeds = _common_seeds(grid)
    for line in grid.lines:
        values = [in_words(value, seeds_said=seeds is not None) for value in line.values]
        rows.append([*line.labels, line.source, *values])
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return f"**{grid.name}.** {grid.caption} {_source_note(grid, seeds)}\n\n{body}\n"


# What CSV has in columns of their own where an entry of the column has it.
_EXTRAS: dict[str, Callable[[Value], object]] = {
    "std": lambda value: value.std,
    "seeds": lambda value: value.seeds,
    "low": lambda value: value.interval and value.interval[0],
    "high": lambda value: value.interval and value.interval[1],
    "note": lambda value: value.note or None,
}


def _csv(grid: Grid) -> str:
    columns = list(zip(*(line.values for line in grid.lines), strict=True)) or [()] * len(grid.heads)
    extras = [
        [name for name, of in _EXTRAS.items() if any(value and of(value) is not None for value in column)]
        for column in columns
    ]
    header, rows = ["table", *grid.labels, "source"], []
    for head, names in zip(grid.heads, extras, strict=True):
        title = f"{head.group} {head.text}".strip()
        header += [title, *(f"{title} {name}" for name in names)]
    for line in grid.lines:
        row = [grid.name, *line.labels, line.source]
        for value, names in zip(line.values, extras, strict=True):
            found = [_EXTRAS[name](value) if value else None for name in names]
            row += [_ascii_dash(value), *("" if entry is None else str(entry) for entry in found)]
        rows.append(row)
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


def _latex(grid: Grid) -> str:
    lead, seeds = len(grid.labels) + 1, _common_seeds(grid)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(f'{grid.caption} {_source_note(grid, seeds)}')}}}"]
    lines.append(rf"\label{{tab:{grid.name.lower().replace(' ', '')}}}")
    lines += [rf"\begin{{tabular}}{{{'l' * lead}{'r' * len(grid.heads)}}}", r"\toprule"]
    if any(head.group for head in grid.heads):
        lines += _latex_groups(grid.heads, lead=lead)
    heads = [_tex(f"{head.text} {head.arrow}".strip()) for head in grid.heads]
    lines += [_latex_row([*(_tex(label) for label in grid.labels), "source", *heads]), r"\midrule"]
    for line in grid.lines:
        values = [_tex(in_words(value, seeds_said=seeds is not None)) for value in line.values]
        lines.append(_latex_row([*(_tex(label) for label in line.labels), _tex(line.source), *values]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _latex_groups(heads: Iterable[Head], *, lead: int) -> list[str]:
    cells, rules, start = [""] * lead, [], lead + 1
    for group, members in groupby(heads, key=lambda head: head.group):
        width = len(list(members))
        cells.append(rf"\multicolumn{{{width}}}{{c}}{{{_tex(group)}}}")
        rules.append(rf"\cmidrule(lr){{{start}-{start + width - 1}}}")
        start += width
    return [_latex_row(cells), " ".join(rules)]


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


_TEX = {
    "\\": r"\textbackslash{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "α": r"$\alpha$",
    "≈": r"$\approx$",
    DASH: "--",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


def in_words(value: Value | None, *, seeds_said: bool = False) -> str:
    """Return an entry as a text: "34.65 ± 0.42 [33.10, 36.20] (n = 2, 1 failed)".

    Args:
        value: the entry, None for a dash.
        seeds_said: whether the number of seeds stands elsewhere.
    """
    if value is None:
        return DASH
    text = value.printed
    if value.number is not None and value.std is not None:
        text += f" ± {value.std:f}"
    if value.interval is not None:
        text += f" [{value.interval[0]:f}, {value.interval[1]:f}]"
    after = [] if seeds_said or value.seeds is None else [f"n = {value.seeds}"]
    after += [value.note] if value.note else []
    return f"{text} ({', '.join(after)})" if after else text


def _common_seeds(grid: Grid) -> int | None:
    """Return the number of seeds of the only source, if it is the same in all cells: it is then said once."""
    counts = {value.seeds for line in grid.lines for value in line.values if value is not None}
    return counts.pop() if len(counts) == 1 else None


def _source_note(grid: Grid, seeds: int | None) -> str:
    said = f", n = {seeds} seeds" if seeds is not None else ""
    return f"(Source: {', '.join(grid.sources) or 'none'}{said}.)"


def _ascii_dash(value: Value | None) -> str:
    return "-" if value is None or value.printed == DASH else value.printed


FORMATS: dict[str, Callable[[Grid], str]] = {"md": _markdown, "csv": _csv, "latex": _latex}
