import numpy as np
import pytest

from crosslore_eval import bootstrap
from crosslore_eval.metrics.base import Statistics, mean_of


def shares(scores: list[float]) -> Statistics:
    return mean_of("share", scores, signature="share|v:0")


def test_interval_of_a_mean_agrees_with_its_normal_approximation() -> None:
    scores = np.random.default_rng(0).normal(10.0, 2.0, size=400)
    found = bootstrap.confidence(shares(list(scores)), samples=4000)
    error = 1.96 * scores.std() / np.sqrt(len(scores))
    assert found.low == pytest.approx(scores.mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx(scores.mean() + error, abs=0.1 * error)


def test_interval_covers_the_true_value_about_95_times_in_100() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        found = bootstrap.confidence(shares(list(generator.binomial(1, 0.3, size=100).astype(float))), samples=300)
        covered += found.low <= 0.3 <= found.high
    assert 180 <= covered <= 199


def test_equal_examples_leave_no_interval_and_draws_repeat() -> None:
    assert bootstrap.confidence(shares([2.0] * 7)) == bootstrap.Interval(low=2.0, high=2.0)
    one = shares([0.0, 1.0, 1.0, 0.0, 1.0])
    assert bootstrap.confidence(one) == bootstrap.confidence(one)


def test_a_system_is_not_different_from_itself() -> None:
    one = shares([0.0, 1.0, 1.0, 0.0])
    found = bootstrap.compare(one, one)
    assert (found.interval.low, found.interval.high, found.p_value) == (0.0, 0.0, 1.0)


def test_a_system_that_is_better_everywhere_gets_the_smallest_p_value() -> None:
    a, b = shares([0.0] * 40), shares([1.0] * 40)
    found = bootstrap.compare(a, b, samples=999)
    assert found.value_b - found.value_a == 1.0
    assert found.interval.low == 1.0
    assert found.p_value == pytest.approx(1 / 1000)


def test_p_value_agrees_with_the_exact_permutation_test() -> None:
    # 3 of 4 examples differ, all in favour of B: swapping leaves a difference as large in 2 of 8 cases.
    found = bootstrap.compare(shares([0.0, 0.0, 0.0, 1.0]), shares([1.0, 1.0, 1.0, 1.0]), samples=20_000)
    assert found.p_value == pytest.approx(0.25, abs=0.02)


def test_p_value_is_uniform_when_there_is_no_difference() -> None:
    generator = np.random.default_rng(2)
    below = 0
    for _ in range(200):
        a, b = (shares(list(generator.normal(size=50))) for _ in range(2))
        below += bootstrap.compare(a, b, samples=300).p_value < 0.05
    assert 2 <= below <= 20


def test_rows_of_one_example_are_drawn_together() -> None:
    rows = shares([0.0, 0.0, 1.0, 1.0, 1.0])
    grouped = rows.regrouped([0, 0, 1, 1, 2])
    assert grouped.rows.tolist() == [[0.0, 2.0], [2.0, 2.0], [1.0, 1.0]]
    assert grouped.value() == rows.value()


@pytest.mark.parametrize("samples", [1, 255, 256, 257, 1000])
def test_any_number_of_samples_is_drawn(samples: int) -> None:
    found = bootstrap.confidence(shares([0.0, 1.0]), samples=samples)
    assert 0.0 <= found.low <= found.high <= 1.0
