from decimal import Decimal

import pytest

from crosslore_eval.errors import EvalError
from crosslore_eval.metrics.accuracy import accuracy, read_answer, read_last_number


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
        ("#### **42**", "42"),
        ("#### \\boxed{42}", "42"),
        ("#### \\$42", "42"),
        ("#### (5)", "5"),
        ("#### ($5)", "5"),
        ("#### 1{,}250", "1250"),
        ("#### 1\u00a0000", "1000"),
    ],
)
def test_answer_is_the_number_after_the_mark(text: str, value: str) -> None:
    assert read_answer(text) == Decimal(value)
    assert read_last_number(text) == Decimal(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the answer is 18",
        "### 18",
        "####",
        "#### none",
        "#### 1.2.3",
        "#### __import__('os')",
        "#### \u0664",
        "####\n\n42",
    ],
)
def test_text_without_a_readable_answer_gives_none(text: str) -> None:
    assert read_answer(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("She has 3 apples and buys 4, so 7.", "7"),
        ("The total is $1,234.56.", "1234.56"),
        ("x = -5", "-5"),
        ("the change is \u221212 degrees", "-12"),
        ("10-7", "7"),
        ("(4)-2", "2"),
        ("about .75 of it", "0.75"),
        ("1,2,3", "3"),
        ("12,345,678 people", "12345678"),
        ("\\boxed{72}", "72"),
        ("The answer is **18**!", "18"),
        ("it is 3:30", "30"),
        ("50%", "50"),
        ("\\boxed{1{,}250}", "1250"),
        ("it is 1\\,250 m", "1250"),
        ("1\u00a0250 dollars", "1250"),
        ("about 1.5e3", "1500"),
        ("2.5E-3", "0.0025"),
        ("version 1.2.3 of 7", "7"),
        ("**18**", "18"),
        ("3 apples\n#### 4\nQuestion: 9?", "4"),  # the mark goes before what a model writes after it
    ],
)
def test_flexible_reading_takes_the_last_number(text: str, value: str) -> None:
    assert read_last_number(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "no number here", "#### none", "..., -", "1.2.3", "#### 1.2.3", "3.14.15"])
def test_flexible_reading_of_a_text_without_numbers_gives_none(text: str) -> None:
    assert read_last_number(text) is None


def test_first_answer_counts_as_in_the_official_script() -> None:
    assert read_answer("#### 4\n#### 5") == 4


def test_arithmetic_after_the_mark_is_not_evaluated() -> None:
    assert read_answer("#### 2+2") == 2


def test_endless_digits_are_no_answer_and_cost_no_time() -> None:
    assert read_answer("#### " + "9" * 200_000) is None
    assert read_last_number("9" * 200_000) is None


def test_both_readings_are_percentages_side_by_side() -> None:
    predictions = ["#### 5.0", "it is 1,000", "#### 7", "no idea"]
    strict, flexible = accuracy(predictions, [Decimal(5), Decimal(1000), Decimal(8), Decimal(9)])
    assert (strict.name, strict.value()) == ("accuracy_strict", 25.0)
    assert (flexible.name, flexible.value()) == ("accuracy_flexible", 50.0)
    assert strict.signature.startswith("accuracy_strict|read:####|compare:number|within:0|v:")


@pytest.mark.parametrize(("text", "share"), [("#### 0.667", 100.0), ("#### 0.668", 0.0), ("#### 0.665", 0.0)])
def test_a_tolerance_counts_its_bound_as_right(text: str, share: float) -> None:
    strict, _ = accuracy([text], [Decimal("0.6666")], tolerance=Decimal("0.001"))
    assert strict.value() == share
    at_bound, _ = accuracy(["#### 0.6676"], [Decimal("0.6666")], tolerance=Decimal("0.001"))
    assert at_bound.value() == 100.0


@pytest.mark.parametrize(("predictions", "answers"), [(["#### 1"], [Decimal(1)] * 2), ([], [])])
def test_lists_that_do_not_pair_up_are_refused(predictions: list[str], answers: list[Decimal]) -> None:
    with pytest.raises(EvalError, match=f"got {len(predictions)} and {len(answers)}"):
        accuracy(predictions, answers)
