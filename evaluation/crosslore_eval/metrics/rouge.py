"""ROUGE-1, 2, L and Lsum by Google's rouge-score, as summarisation papers report them."""

from importlib.metadata import version

from crosslore_eval.metrics.base import Corpus, Statistics, mean_of, signature_of

TYPES = {"ROUGE_1": "rouge1", "ROUGE_2": "rouge2", "ROUGE_L": "rougeL"}


def rouge(corpus: Corpus) -> list[Statistics]:
    """Return the F1 of ROUGE-1, 2 and L in [0, 1] with Porter stemming, the best reference of each row, mean over rows.

    ROUGE-L is the one of whole texts (`rougeL`), not of sentences (`rougeLsum`).
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(TYPES.values()), use_stemmer=True)
    results = [
        scorer.score_multi(list(references), prediction)
        for prediction, references in zip(corpus.plain.predictions, corpus.plain.references, strict=True)
    ]
    return [
        mean_of(
            name,
            [result[kind].fmeasure for result in results],
            signature=signature_of(
                name, refs=corpus.reference_counts, case="lc", stem="porter", F=1, rouge_score=version("rouge-score")
            ),
        )
        for name, kind in TYPES.items()
    ]
