"""BLEU and NIST as NIST's Perl script mteval-v13a computes them, the one that e2e-metrics calls.

Two libraries come close. sacreBLEU's tokeniser is the same and is used here; its score differs in two corners,
lower-casing of letters beyond a-z and corpora without any 4-gram, which are put right below. nltk's NIST is another
formula, 6.51 where the Perl script says 8.61 on the outputs of the E2E challenge's baseline: NIST is written out here.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.metadata import version
from math import log, log2
from typing import Any

import numpy as np

from crosslore_eval.metrics.base import Array, Corpus, Statistics, signature_of

BLEU_ORDER = 4
NIST_ORDER = 5
# A system with 2/3 of the references' length gets half the score (mteval's nist_length_penalty).
NIST_BETA = -log(0.5) / log(1.5) ** 2

Ngram = tuple[str, ...]
# SGML entities that the Perl script undoes, in its order.
ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
# The Perl script lower-cases with tr/[A-Z]/[a-z]/: other letters keep their case.
_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


class MtevalCorpus:
    """Tokens and n-gram counts of a corpus, shared by BLEU and NIST."""

    def __init__(self, corpus: Corpus) -> None:
        """Tokenise all texts; equal ones once."""
        corpus = corpus.plain
        self.reference_counts = corpus.reference_counts
        self.predictions = [tokenise(text) for text in corpus.predictions]
        self.references = [[tokenise(text) for text in texts] for texts in corpus.references]

    @cached_property
    def clipped(self) -> list[tuple[Counter[Ngram], Counter[Ngram]]]:
        """For each example: the output's n-grams, and the most that one reference has of each."""
        pairs = []
        for prediction, references in zip(self.predictions, self.references, strict=True):
            most: Counter[Ngram] = Counter()
            for reference in references:
                most |= ngrams(reference)
            pairs.append((ngrams(prediction), most))
        return pairs


def tokenise(text: str) -> tuple[str, ...]:
    """Return the tokens of mteval-v13a, lower-cased as it does."""
    text = text.replace("<skipped>", "")
    for entity, character in ENTITIES.items():
        text = text.replace(entity, character)
    split: str = _splitter()(f" {text.translate(_LOWER)} ")
    return tuple(word for word in split.split(" ") if word)


@cache
def _splitter() -> Any:  # Any: sacreBLEU's own class
    """Return the part of sacreBLEU's mteval-v13a tokeniser that splits words.

    What that tokeniser does before is done above: the Perl script does it before it lower-cases, so that "&AMP;" stays.
    """
    from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

    return TokenizerRegexp()


def ngrams(tokens: Sequence[str]) -> Counter[Ngram]:
    """Return the counts of all n-grams of 1 to 5 tokens."""
    ends = range(1, NIST_ORDER + 1)
    return Counter(tuple(tokens[start : start + n]) for n in ends for start in range(len(tokens) - n + 1))


def bleu(corpus: MtevalCorpus) -> Statistics:
    """Return BLEU-4 in [0, 1]: mteval's, closest reference length, zero precisions smoothed by halving.

    Source: mteval-v13a, `bleu_score` and `brevity_penalty_closest`; e2e-metrics' copy, where empty references do not
    count as short ones.
    """
    rows = np.zeros((len(corpus.predictions), 1 + 2 * BLEU_ORDER))
    for row, prediction, references in zip(rows, corpus.predictions, corpus.references, strict=True):
        lengths = [len(reference) for reference in references if reference] or [0]
        row[0] = min(lengths, key=lambda length: (abs(length - len(prediction)), length))
    for row, (own, most) in zip(rows, corpus.clipped, strict=True):
        for ngram, count in own.items():
            if len(ngram) <= BLEU_ORDER:
                row[len(ngram)] += min(count, most[ngram])
                row[BLEU_ORDER + len(ngram)] += count
    signature = signature_of(
        "BLEU", refs=corpus.reference_counts, case="lc", tok="mteval13a", smooth="exp", sacrebleu=version("sacrebleu")
    )
    return Statistics(name="BLEU", rows=rows, combine=_bleu_of, signature=signature)


def _bleu_of(sums: Array) -> Array:
    """Return BLEU from (..., 9) sums: reference length, 4 matches, 4 totals."""
    reference_length, matches, totals = sums[..., 0], sums[..., 1 : BLEU_ORDER + 1], sums[..., BLEU_ORDER + 1 :]
    # The k-th order without a match counts as 1 / 2^k matches; an order without any n-gram as precision 1.
    unmatched = (matches == 0) & (totals > 0)
    smoothed = np.where(unmatched, 0.5 ** np.cumsum(unmatched, axis=-1), matches)
    precisions = np.where(totals > 0, smoothed / np.maximum(totals, 1), 1.0)
    length = totals[..., 0]
    penalty = np.where(length > 0, np.exp(np.minimum(0.0, 1.0 - reference_length / np.maximum(length, 1))), 0.0)
    score: Array = penalty * np.exp(np.log(precisions).mean(axis=-1))
    return score


def nist(corpus: MtevalCorpus) -> Statistics:
    """Return NIST-5, not bounded above: information of matched n-grams per n-gram, with a length penalty.

    Source: mteval-v13a, `compute_ngram_info` and `nist_score`. The mean number of references is taken over the corpus,
    as the Perl script does; its Python port takes the mean length example by example, and differs in the 2nd decimal.
    """
    information = _information(corpus.references)
    rows = np.zeros((len(corpus.predictions), 2 * NIST_ORDER + 3))
    for row, (own, most) in zip(rows, corpus.clipped, strict=True):
        for ngram, count in own.items():
            row[NIST_ORDER + len(ngram) - 1] += count
            if ngram in most:
                row[len(ngram) - 1] += information[ngram] * min(count, most[ngram])
    for row, references in zip(rows, corpus.references, strict=True):
        row[-3:] = sum(map(len, references)), sum(bool(reference) for reference in references), 1
    signature = signature_of(
        "NIST",
        refs=corpus.reference_counts,
        case="lc",
        tok="mteval13a",
        order=NIST_ORDER,
        sacrebleu=version("sacrebleu"),
    )
    return Statistics(name="NIST", rows=rows, combine=_nist_of, signature=signature)


def _information(references: Sequence[Sequence[Sequence[str]]]) -> dict[Ngram, float]:
    """Return log2(count of the n-gram without its last token / count of the n-gram) over all references."""
    counts: Counter[Ngram] = Counter()
    for texts in references:
        for tokens in texts:
            counts.update(ngrams(tokens))
    words = sum(count for ngram, count in counts.items() if len(ngram) == 1)
    # The Perl script takes a first word "0" for no word at all: so do we.
    return {
        ngram: log2((words if ngram[:-1] in ((), ("0",)) else counts[ngram[:-1]]) / count)
        for ngram, count in counts.items()
    }


def _nist_of(sums: Array) -> Array:
    """Return NIST from (..., 13) sums: 5 informations, 5 totals, reference words, references, examples."""
    information, totals = sums[..., :NIST_ORDER], sums[..., NIST_ORDER : 2 * NIST_ORDER]
    words, references, examples = sums[..., -3], sums[..., -2], sums[..., -1]
    mean_words = words * examples / np.maximum(references, 1)
    ratio = totals[..., 0] / np.maximum(mean_words, 1e-12)
    inside = np.clip(ratio, 1e-12, 1.0)
    penalty = np.where(ratio <= 0, 0.0, np.exp(-NIST_BETA * np.log(inside) ** 2))
    score: Array = penalty * (information / np.maximum(totals, 1)).sum(axis=-1)
    return score
