from decimal import Decimal

import pytest

from crosslore_eval.metrics.accuracy import exact_match, read_answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("9 * 2 = 18 dollars.\n#### 18", "18"),
        ("#### 1,250", "1250"),
        ("#### $1,250.50", "1250.50"),
        ("#### 42.", "42"),
        ("####7", "7"),
        ("#### -3", "-3"),
        ("#### \u22123", "-3"),
        ("#### \u20133", "-3"),
        ("#### $-3", "-3"),
        ("#### -$3", "-3"),
        ("#### +3", "3"),
        ("#### .5", "0.5"),
        ("#### \u20ac10", "10"),
        ("#### 12 apples", "12"),
        ("#### the answer\n#### 5", "5"),
    ],
)
def test_answer_is_the_number_after_the_mark(text: str, value: str) -> None:
    assert read_answer(text) == Decimal(value)


@pytest.mark.parametrize(
    "text",
    ["", "the answer is 18", "### 18", "####", "#### none", "#### 1.2.3", "#### __import__('os')", "#### \u0664"],
)
def test_text_without_a_readable_answer_gives_none(text: str) -> None:
    assert read_answer(text) is None


def test_first_answer_counts_as_in_the_official_script() -> None:
    assert read_answer("#### 4\n#### 5") == 4


def test_arithmetic_after_the_mark_is_not_evaluated() -> None:
    assert read_answer("#### 2+2") == 2


def test_exact_match_compares_values_and_returns_percent() -> None:
    predictions = ["#### 5.0", "#### 1,000", "#### 7", "no idea"]
    references = ["#### 5", "#### 1000", "#### 8", "#### 9"]
    assert exact_match(predictions, references) == 50.0


def test_exact_match_refuses_lists_of_different_length() -> None:
    with pytest.raises(ValueError, match="got 1 and 2"):
        exact_match(["#### 1"], ["#### 1", "#### 2"])


def test_exact_match_names_the_reference_without_an_answer() -> None:
    with pytest.raises(ValueError, match="reference 2 must hold '#### N', got 'two'"):
        exact_match(["#### 1", "#### 2"], ["#### 1", "two"])


def test_exact_match_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        exact_match([], [])
