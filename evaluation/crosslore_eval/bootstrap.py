"""Bootstrap confidence intervals of one system, and paired tests of two."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from crosslore_eval.metrics.base import Array, Statistics

DEFAULT_SAMPLES = 1000
DEFAULT_SEED = 12345
LEVEL_PERCENT = 95.0
# Of a 95 % interval: 5 samples beyond each end, where fewer would leave the ends to chance.
LEAST_SAMPLES = 200
MOST_SAMPLES = 1_000_000
# Samples drawn at once: bounds memory at 256 x examples numbers.
CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95 % percentile interval."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far system B is above system A on one metric."""

    value_a: float
    value_b: float
    # of B - A, by paired bootstrap
    interval: Interval
    # two-sided, by approximate randomisation; never below 1 / (samples + 1), which says "no swap went as far"
    p_value: float


def smallest_p_value(samples: int) -> float:
    """Return the smallest p-value that so many swaps can show."""
    return 1 / (samples + 1)


def _samples(examples: int, samples: int, seed: int) -> Iterator[Array]:
    """Yield (chunk, examples) arrays: how often each example is drawn in each sample."""
    generator = np.random.default_rng(seed)
    for start in range(0, samples, CHUNK):
        size = min(CHUNK, samples - start)
        yield generator.multinomial(examples, np.full(examples, 1.0 / examples), size=size).astype(np.float64)


def _interval(scores: Array) -> Interval:
    tail = (100.0 - LEVEL_PERCENT) / 2
    low, high = np.percentile(scores, [tail, 100.0 - tail])
    return Interval(low=float(low), high=float(high))


def confidence(statistics: Statistics, *, samples: int = DEFAULT_SAMPLES, seed: int = DEFAULT_SEED) -> Interval:
    """Return the 95 % interval of a score over resampled examples.

    What depends on the references as a whole (NIST's information, CIDEr's document frequencies) stays as it is.

    Args:
        statistics: of the metric.
        samples: bootstrap samples, with replacement, as many examples each as there are.
        seed: of the draws; the same for every metric, so their samples agree.

    Source: Koehn (2004), Statistical significance tests for machine translation evaluation.
    """
    examples = len(statistics.rows)
    drawn = _samples(examples, samples, seed)
    return _interval(np.concatenate([statistics.combine(counts @ statistics.rows) for counts in drawn]))


def compare(a: Statistics, b: Statistics, *, samples: int = DEFAULT_SAMPLES, seed: int = DEFAULT_SEED) -> Difference:
    """Return the difference of two systems on the same examples, its interval and its p-value.

    Args:
        a: the metric of system A.
        b: the same metric of system B, examples in the same order.
        samples: bootstrap samples, and random swaps.
        seed: of the draws.

    Source: paired bootstrap as Koehn (2004); approximate randomisation as Riezler and Maxwell (2005).
    """
    examples = len(a.rows)
    differences = [
        b.combine(counts @ b.rows) - a.combine(counts @ a.rows) for counts in _samples(examples, samples, seed)
    ]
    observed = b.value() - a.value()
    generator = np.random.default_rng(seed + 1)
    as_far = 0
    for start in range(0, samples, CHUNK):
        swaps = generator.integers(0, 2, size=(min(CHUNK, samples - start), examples)).astype(np.float64)
        mixed_a, mixed_b = (swaps @ one.rows + (1 - swaps) @ other.rows for one, other in ((b, a), (a, b)))
        # A hair below: the same difference, summed in another order, must count.
        as_far += int((np.abs(b.combine(mixed_b) - a.combine(mixed_a)) >= abs(observed) * (1 - 1e-9)).sum())
    return Difference(
        value_a=a.value(),
        value_b=b.value(),
        interval=_interval(np.concatenate(differences)),
        p_value=(as_far + 1) / (samples + 1),
    )
