"""BLEU-4 and ROUGE as LLaMA-Factory's own `predict` reports them (its `ComputeSimilarity`), row by row.

The paper's E2E figures fit these: BLEU-4 over characters, ROUGE over jieba's tokens. Neither can be compared with
other papers' BLEU and ROUGE.
"""

import logging
from functools import cache
from importlib.metadata import version

from crosslore_eval.metrics.base import Corpus, Statistics, mean_of, signature_of

NAMES = {"rouge-1": "ROUGE_1", "rouge-2": "ROUGE_2", "rouge-l": "ROUGE_L"}


def similarity(corpus: Corpus) -> list[Statistics]:
    """Return BLEU (BLEU-4 of characters) and ROUGE-1, 2, L (F1), in [0, 100], mean over rows.

    Args:
        corpus: one reference each.

    Source: LLaMA-Factory 0.9.5, train/sft/metric.py, rounding of each row to 4 decimals included.
    """
    rows = [_row(text, texts[0]) for text, texts in zip(corpus.predictions, corpus.references, strict=True)]
    common = {"refs": 1, "mean": "rows"}
    signatures = {"BLEU": signature_of("BLEU", **common, tok="char", smooth="method3", nltk=version("nltk"))}
    for name in NAMES.values():
        tokeniser = f"jieba-{version('jieba')}"
        signatures[name] = signature_of(name, **common, tok=tokeniser, F=1, rouge_chinese=version("rouge-chinese"))
    return [mean_of(name, [row[name] for row in rows], signature=text) for name, text in signatures.items()]


@cache
def _row(prediction: str, reference: str) -> dict[str, float]:
    """Return the four scores of one output, in percent."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    hypothesis, target = _jieba(prediction), _jieba(reference)
    if hypothesis.split() and target.split():
        found = Rouge().get_scores(hypothesis, target)[0]
        scores = {name: round(found[key]["f"] * 100, 4) for key, name in NAMES.items()}
    else:
        scores = dict.fromkeys(NAMES.values(), 0.0)
    bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=SmoothingFunction().method3)
    return {"BLEU": round(float(bleu) * 100, 4), **scores}


@cache
def _jieba(text: str) -> str:
    import jieba

    jieba.setLogLevel(logging.WARNING)
    return " ".join(jieba.cut(text))
