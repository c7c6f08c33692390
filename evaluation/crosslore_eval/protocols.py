"""Named protocols: which metrics, on which reading of the references, in which order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from crosslore_eval.errors import EvalError, shown, unknown_name
from crosslore_eval.metrics import coco, llamafactory, mteval, rouge
from crosslore_eval.metrics.accuracy import accuracy, read_reference
from crosslore_eval.metrics.base import Corpus, Statistics
from crosslore_eval.metrics.java import INSTALL_JAVA, JavaError


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A metric that could not be computed here, and why."""

    name: str
    reason: str


Results = list[Statistics | Missing]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A way of scoring texts that has a name."""

    name: str
    # one line for `crosslore-eval tasks`
    summary: str
    score: Callable[[Corpus], Results]


def _meteor(corpus: coco.CocoCorpus) -> Statistics | Missing:
    if not corpus.has_java:
        return Missing(name="METEOR", reason=f"METEOR needs Java, and no `java` that runs was found. {INSTALL_JAVA}")
    try:
        return coco.coco_meteor(corpus)
    except JavaError as error:
        return Missing(name="METEOR", reason=str(error))


def _e2e_official(corpus: Corpus) -> Results:
    mt, captions = mteval.MtevalCorpus(corpus), coco.CocoCorpus(corpus)
    return [mteval.bleu(mt), mteval.nist(mt), _meteor(captions), coco.rouge_l(captions), coco.cider(captions)]


def _scaled(statistics: Statistics, factor: float) -> Statistics:
    combine = statistics.combine
    return replace(statistics, combine=lambda sums: factor * combine(sums))


def _paper(corpus: Corpus) -> Results:
    """One reference at a time, on the paper's scales; rows of one example are drawn together by the bootstrap."""
    single, groups = corpus.single
    captions = coco.CocoCorpus(single)
    bleu, *rouges = llamafactory.similarity(single)
    meteor = _meteor(captions)
    results: Results = [
        bleu,
        mteval.nist(mteval.MtevalCorpus(single)),
        meteor if isinstance(meteor, Missing) else _scaled(meteor, 100.0),
        *rouges,
        coco.cider(captions),
    ]
    return [result if isinstance(result, Missing) else result.regrouped(groups) for result in results]


def _rouge_score(corpus: Corpus) -> Results:
    return list(rouge.rouge(corpus))


def _paper_summaries(corpus: Corpus) -> Results:
    single, groups = corpus.single
    return [statistics.regrouped(groups) for statistics in llamafactory.similarity(single)]


E2E_OFFICIAL = Protocol(
    name="e2e-official",
    summary="BLEU NIST METEOR ROUGE_L CIDEr as the official e2e-metrics scripts, all references",
    score=_e2e_official,
)
PAPER = Protocol(
    name="paper",
    summary="BLEU NIST METEOR ROUGE_1 ROUGE_2 ROUGE_L CIDEr as in the paper: one reference at a time, LLaMA-Factory's "
    "BLEU-4 and ROUGE",
    score=_paper,
)
ROUGE_SCORE = Protocol(
    name="rouge-score", summary="ROUGE_1 ROUGE_2 ROUGE_L, F1 with stemming, by rouge-score", score=_rouge_score
)
PAPER_SUMMARIES = Protocol(
    name="paper", summary="LLaMA-Factory's BLEU-4 and ROUGE_1 ROUGE_2 ROUGE_L", score=_paper_summaries
)


def accuracy_protocol(*, tolerance: Decimal) -> Protocol:
    """Return the protocol `accuracy`: strict and flexible reading, in percent.

    Args:
        tolerance: how far a number may be from the right one.
    """

    def score(corpus: Corpus) -> Results:
        answers = []
        for row, texts in enumerate(corpus.references):
            answer = read_reference(texts[0])
            if answer is None:
                raise EvalError(
                    f"{corpus.place(row)}: a reference must be a number (1250 or 1,250) or a solution that ends in "
                    f"`#### number`, got {shown(texts[0])}. Correct it, or give others with --references FILE."
                )
            answers.append(answer)
        return list(accuracy(corpus.predictions, answers, tolerance=tolerance))

    return Protocol(
        name="accuracy",
        summary=f"accuracy_strict (number after ####) and accuracy_flexible (else the last number), within {tolerance}",
        score=score,
    )


def find_protocol(protocols: Sequence[Protocol], name: str | None) -> Protocol:
    """Return the protocol of that name, the first one for None.

    Raises:
        EvalError: if there is none, with the near and the known names.
    """
    if name is None:
        return protocols[0]
    by_name = {protocol.name: protocol for protocol in protocols}
    if name not in by_name:
        raise unknown_name("protocol", name, by_name)
    return by_name[name]
