"""Exact-match accuracy of arithmetic answers, read the way GSM8K's official script reads them."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

# openai/grade-school-math reads the first match of "#### (\-?[0-9\.\,]+)". We also allow a currency sign, a plus,
# a unicode minus (U+2212), an en dash, and missing or repeated spaces.
_ANSWER = re.compile(
    r"####\s*(?P<sign>[-+−–]?)\s*[$€£¥₹]?\s*(?P<inner_sign>[-+−–]?)\s*(?P<digits>[0-9.,]*[0-9][0-9.,]*)"
)
_MINUS = frozenset("-−–")


def read_answer(text: str) -> Decimal | None:
    """Return the number after the first readable `####`, or None when there is none.

    Thousands commas and a trailing period are dropped, so "#### $1,250." is 1250. The text is never evaluated.

    Args:
        text: a model's output or a reference solution.

    Source: GSM8K's official `extract_answer`. Differs from it: answers are numbers, not strings, so "5.0" equals "5".
    """
    found = _ANSWER.search(text)
    if found is None:
        return None
    try:
        value = Decimal(found["digits"].replace(",", "").rstrip("."))
    except InvalidOperation:  # "1.2.3"
        return None
    is_negative = bool(_MINUS & {found["sign"], found["inner_sign"]})
    return -value if is_negative else value


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of predictions whose answer equals the reference's, in percent.

    Args:
        predictions: model outputs; one without a readable answer counts as wrong.
        references: solutions ending in `#### N`, same order and length.

    Raises:
        ValueError: if the lengths differ or are 0, or a reference has no answer.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"predictions and references must be equally many and at least 1, got {len(predictions)} and "
            f"{len(references)}. Check that both come from the same rows."
        )
    right = 0
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True), start=1):
        answer = read_answer(reference)
        if answer is None:
            raise ValueError(f"reference {row} must hold '#### N', got {reference!r}. Check the data file.")
        right += read_answer(prediction) == answer
    return 100.0 * right / len(references)
