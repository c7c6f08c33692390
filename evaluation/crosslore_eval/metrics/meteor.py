"""METEOR 1.5 by its Java program, on PTB tokens as in the COCO caption code."""

from collections.abc import Sequence

import numpy as np

from crosslore_eval.metrics.base import Array, Statistics, signature_of
from crosslore_eval.metrics.java import JavaError, meteor_lines

# METEOR 1.5, English, task "rank" (the program's default): alpha, beta, gamma, delta and the matchers' weights
# exact, stem, synonym, paraphrase (Denkowski and Lavie, 2014, table 1).
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
FIELDS = 23


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]], *, reference_counts: str) -> Statistics:
    """Return METEOR in [0, 1], the best reference of each example.

    Args:
        predictions: PTB tokens joined by spaces.
        references: the same, for each example at least one.
        reference_counts: for the signature.

    Raises:
        JavaError: if Java is missing or fails.

    Source: METEOR 1.5. The program matches; its final formula is `_meteor_of`, held against the program's in a test.
    """
    rows = np.zeros((len(predictions), FIELDS))
    # METEOR says 0 for an output without words, and takes a reference without words as an error.
    worded = [[text for text in texts if text] for texts in references]
    asked = [row for row, texts in enumerate(worded) if texts]
    lines = meteor_lines([request(predictions[row], worded[row]) for row in asked])
    if len(lines) != len(asked):
        raise JavaError(f"METEOR returned {len(lines)} lines for {len(asked)} outputs.")
    for row, line in zip(asked, lines, strict=True):
        rows[row] = [float(field) for field in line.split()]
    # The program counts no chunk for an output equal to its reference: that is what makes its score 1, and it counts
    # for the whole corpus too.
    perfect = (rows[:, 20] == 1) & (rows[:, 21] == rows[:, 0]) & (rows[:, 22] == rows[:, 1])
    rows[perfect, 20] = 0
    signature = signature_of("METEOR", refs=reference_counts, case="lc", tok="ptb", meteor="1.5-en-norm")
    return Statistics(name="METEOR", rows=rows, combine=_meteor_of, signature=signature)


def request(prediction: str, references: Sequence[str]) -> str:
    """Return the line that asks METEOR for an output's statistics; its own separator is taken out of the texts."""
    parts = [text.replace("|||", " ") for text in [*references, prediction]]
    return " ||| ".join(["SCORE", *parts])


def _meteor_of(sums: Array) -> Array:
    """Return METEOR from (..., 23) sums of the program's statistics.

    They are: words and function words of output and reference; for each matcher matched content words (output,
    reference) and function words (output, reference); chunks; matched words of output and reference.
    """
    length, reference_length = sums[..., 0], sums[..., 1]
    function, reference_function = sums[..., 2], sums[..., 3]
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    chunks, matched, reference_matched = sums[..., 20], sums[..., 21], sums[..., 22]

    precision = _weighted(matches[..., 0], matches[..., 2], length - function, function)
    recall = _weighted(matches[..., 1], matches[..., 3], reference_length - reference_function, reference_function)
    mean = precision * recall / np.maximum(ALPHA * precision + (1 - ALPHA) * recall, 1e-300)
    fragmentation = chunks / np.maximum((matched + reference_matched) / 2, 1)
    score: Array = mean * (1 - GAMMA * fragmentation**BETA)
    return score


def _weighted(content_matches: Array, function_matches: Array, content: Array, function: Array) -> Array:
    """Return the share of matched words, content words weighing DELTA and function words 1 - DELTA."""
    matched = (WEIGHTS * (DELTA * content_matches + (1 - DELTA) * function_matches)).sum(axis=-1)
    share: Array = matched / np.maximum(DELTA * content + (1 - DELTA) * function, 1e-300)
    return share
