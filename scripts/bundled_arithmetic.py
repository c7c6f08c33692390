"""Word problems for the bundled data: draws numbers for a story and writes question and worked solution."""

import operator
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from bundled_draw import Draw

STORIES_FILE = Path(__file__).with_name("bundled_stories.toml")
# (name, he, his)
PEOPLE = (
    *((name, "she", "her") for name in "Mina Leila Priya Zola Ines Yara Noor Anouk Suri Talia Wren Keiko".split()),
    *((name, "he", "his") for name in "Tobias Oscar Henrik Marek Kofi Dario Felix Bram Emil Jonas Rafael Iver".split()),
)
OPERATORS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}

Numbers = dict[str, Fraction]


@dataclass(frozen=True, kw_only=True)
class Story:
    """One kind of word problem; the fields are explained at the top of `bundled_stories.toml`."""

    texts: list[str]
    numbers: dict[str, list[Fraction]]
    steps: list[tuple[str, str, str]]
    things: tuple[str, ...] = ("",)
    money: bool = False


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question with its worked solution; `numbers` are the drawn ones."""

    numbers: tuple[Fraction, ...]
    question: str
    solution: str


def load_stories() -> list[Story]:
    """Return the stories of `bundled_stories.toml`; decimals are exact fractions."""
    with STORIES_FILE.open("rb") as stream:
        return [Story(**table) for table in tomllib.load(stream, parse_float=Fraction)["story"]]


def draw_numbers(story: Story, draw: Draw) -> Numbers:
    """Return one value for every number of the story."""
    numbers = {}
    for name, (low, high, *rest) in story.numbers.items():
        step = Fraction(*rest) if rest else Fraction(1)
        numbers[name] = low + step * draw.pick(range(int((high - low) / step) + 1))
    return numbers


def operands(operation: str, values: Numbers) -> tuple[Fraction, str, Fraction]:
    """Return left operand, operator and right operand of "left operator right": names of values, or numbers."""
    left, symbol, right = operation.split()
    return (
        values[left] if left in values else Fraction(left),
        symbol,
        values[right] if right in values else Fraction(right),
    )


def solve(story: Story, numbers: Numbers) -> Numbers | None:
    """Return `numbers` and the result of every step, or None if a result is less than 2 or does not come out even."""
    values = dict(numbers)
    for name, operation, _ in story.steps:
        left, symbol, right = operands(operation, values)
        result = OPERATORS[symbol](left, right)
        if result < 2 or (result * (100 if story.money else 1)).denominator != 1:
            return None
        values[name] = result
    return values


def written(value: Fraction) -> str:
    """Return a number as text: whole, or with two decimals."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.2f}"


def draw_problem(story: Story, draw: Draw) -> Problem:
    """Return one problem of the story, its solution ending in a line `#### answer`."""
    while (values := solve(story, numbers := draw_numbers(story, draw))) is None:
        pass
    (who, he, his), (other, _, _) = draw.shuffled(PEOPLE)[:2]
    fields = {name: written(value) for name, value in values.items()}
    fields |= {"who": who, "he": he, "his": his, "He": he.capitalize(), "other": other}
    fields["thing"] = draw.pick(story.things)
    lines = []
    for name, operation, sentence in story.steps:
        left, symbol, right = operands(operation, values)
        work = f"{written(left)} {symbol} {written(right)} = {fields[name]}"
        lines.append(draw.text(sentence).format(**fields, work=work))
    answer = fields[story.steps[-1][0]]
    return Problem(
        numbers=tuple(numbers.values()),
        question=draw.text(draw.pick(story.texts)).format(**fields),
        solution="\n".join([*lines, f"#### {answer}"]),
    )
