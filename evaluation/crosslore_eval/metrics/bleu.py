"""Corpus BLEU with sacreBLEU's signature."""

from collections.abc import Sequence
from typing import NamedTuple


class Score(NamedTuple):
    """A metric's value and the settings that it was computed with."""

    value: float
    signature: str


def corpus_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], *, lowercase: bool = False) -> Score:
    """Return corpus BLEU in [0, 100], tokenised by mteval-v13a, with sacreBLEU's signature.

    Args:
        predictions: one output per row.
        references: for each row at least one reference text; rows may have different numbers of them.
        lowercase: score without regard to case.

    Raises:
        ValueError: if the lengths differ or are 0, or a row has no reference.

    Source: sacreBLEU (Post, 2018).
    """
    from sacrebleu.metrics import BLEU

    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"predictions and references must be equally many and at least 1, got {len(predictions)} and "
            f"{len(references)}. Check that both come from the same rows."
        )
    for row, texts in enumerate(references, start=1):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"references of row {row} must be a list of at least one text, got {texts!r}.")
    # sacreBLEU takes one list per reference number and None where a row has fewer.
    most = max(len(texts) for texts in references)
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    metric = BLEU(lowercase=lowercase, tokenize="13a")
    score = metric.corpus_score(list(predictions), streams)
    return Score(float(score.score), str(metric.get_signature()))
