"""Accuracy of arithmetic answers: read as GSM8K's official script reads them, and by their last number.

Outputs are matched by regular expressions and never evaluated.
"""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation

from crosslore_eval.errors import EvalError
from crosslore_eval.metrics.base import Statistics, mean_of, signature_of

# openai/grade-school-math reads the first match of "#### (\-?[0-9\.\,]+)". We also allow a currency sign, a plus,
# a unicode minus (U+2212), an en dash, and missing or repeated spaces.
_MARKED = re.compile(
    r"####[ \t]*(?P<sign>[-+−–]?)[ \t]*[$€£¥₹]?[ \t]*(?P<inner_sign>[-+−–]?)[ \t]*(?P<digits>[0-9.,]*[0-9][0-9.,]*)"
)
# A minus belongs to the number unless a digit, letter or bracket stands before it: "10-7" ends in 7.
_NUMBER = re.compile(
    r"(?P<sign>(?<![0-9A-Za-z)\]])[-−–])?(?:[$€£¥₹](?P<inner_sign>[-−–])?)?"
    r"(?<![0-9.])(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?P<exponent>[eE][-+]?[0-9]{1,2}(?![0-9]))?(?!\.?[0-9])"
)
# Spaces and LaTeX between the thousands of a number, and what is put around one.
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!;:]|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
_AROUND = re.compile(r"\*\*|__|\\boxed\s*\{|\\text\s*\{|\\(?=\$)|(?<=####)[ \t]*\((?=[-−–$€£¥₹0-9])")
_MINUS = frozenset("-−–")
# Longer ones are no answers, and comparing them would cost time.
MOST_DIGITS = 100

Reader = Callable[[str], Decimal | None]


def read_answer(text: str) -> Decimal | None:
    """Return the number after the first `####` that one follows, on its line, or None when there is none ("strict").

    Thousands commas and a trailing period are dropped, so "#### $1,250." is 1250.

    Args:
        text: a model's output or a reference solution.

    Source: GSM8K's official `extract_answer`. Differs from it: answers are numbers, not strings, so "5.0" equals "5".
    """
    found = _MARKED.search(_plain(text))
    return None if found is None else _value(found)


def read_last_number(text: str) -> Decimal | None:
    """Return the number after `####`, else the last number of the text, or None when there is none ("flexible").

    Args:
        text: a model's output.

    Source: as LLM-Adapters reads MAWPS and lm-evaluation-harness' "flexible-extract"; a number after `####` goes first.
    """
    marked = read_answer(text)
    if marked is not None:
        return marked
    found = list(_NUMBER.finditer(_plain(text)))
    return _value(found[-1]) if found else None


def read_reference(text: str) -> Decimal | None:
    """Return the number of a reference, or None if it has none: "3", "1,250", "$1,250." or a text with `#### N`."""
    try:
        value = Decimal(text.strip())
    except InvalidOperation:
        found = _NUMBER.fullmatch(_plain(text).strip().removesuffix("."))
        return read_answer(text) if found is None else _value(found)
    return value if value.is_finite() else None


def _plain(text: str) -> str:
    """Return the text without the marks that LaTeX and Markdown put into and around numbers."""
    return _AROUND.sub(" ", _THOUSANDS.sub(",", text))


def _value(found: re.Match[str]) -> Decimal | None:
    digits = found["digits"].replace(",", "").rstrip(".")
    if digits.count(".") > 1 or len(digits) > MOST_DIGITS:  # "1.2.3"
        return None
    is_negative = bool(_MINUS & {found["sign"], found["inner_sign"]})
    value = Decimal(digits + (found.groupdict().get("exponent") or ""))
    return -value if is_negative else value


def accuracy(
    predictions: Sequence[str], answers: Sequence[Decimal], *, tolerance: Decimal = Decimal(0)
) -> list[Statistics]:
    """Return `accuracy_strict` and `accuracy_flexible` in percent: an output without a readable answer is wrong.

    Args:
        predictions: model outputs.
        answers: what is right, same order and length.
        tolerance: how far a number may be from the right one; 0 for GSM8K, 0.001 for MAWPS (LLM-Adapters).

    Raises:
        EvalError: if the lengths differ or are 0.
    """
    if len(predictions) != len(answers) or not answers:
        raise EvalError(
            f"outputs and answers must be equally many and at least 1, got {len(predictions)} and {len(answers)}. "
            "Check that both come from the same test set."
        )
    readers: dict[str, tuple[Reader, str]] = {
        "accuracy_strict": (read_answer, "####"),
        "accuracy_flexible": (read_last_number, "####-or-last-number"),
    }
    return [_share(name, reader, how, predictions, answers, tolerance) for name, (reader, how) in readers.items()]


def _share(
    name: str, reader: Reader, how: str, predictions: Sequence[str], answers: Sequence[Decimal], tolerance: Decimal
) -> Statistics:
    scores = []
    for text, answer in zip(predictions, answers, strict=True):
        value = reader(text)
        scores.append(100.0 * (value is not None and abs(value - answer) <= tolerance))
    return mean_of(name, scores, signature=signature_of(name, read=how, compare="number", within=tolerance))
