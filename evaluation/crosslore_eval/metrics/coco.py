"""ROUGE-L, CIDEr and METEOR as the COCO caption code computes them, on its PTB tokens."""

import re
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version

from crosslore_eval.metrics.base import Corpus, Statistics, mean_of, signature_of
from crosslore_eval.metrics.java import java_runs, ptb_tokenise, punctuation
from crosslore_eval.metrics.meteor import meteor

# Before the version in `tok:` of a signature.
STAND_IN = "nltk-treebank"


def is_stand_in(signature: str) -> bool:
    """Return whether a score is on the tokens that stand in for the PTB tokeniser's where there is no Java."""
    return f"|tok:{STAND_IN}-" in signature


class CocoCorpus:
    """A corpus in the tokens of the COCO caption code.

    Without Java they are nltk's Penn Treebank tokens, which the signature then says; see docs/metrics.md for how far
    the scores are apart.
    """

    def __init__(self, corpus: Corpus) -> None:
        """Tokenise all texts in one run of the tokeniser."""
        corpus = corpus.plain
        self.reference_counts = corpus.reference_counts
        self.has_java = java_runs()
        texts = [*corpus.predictions, *(text for texts in corpus.references for text in texts)]
        tokens = iter(ptb_tokenise(texts) if self.has_java else nltk_tokenise(texts))
        self.predictions = [next(tokens) for _ in corpus.predictions]
        self.references = [[next(tokens) for _ in texts] for texts in corpus.references]
        self.tokeniser = "ptb" if self.has_java else f"{STAND_IN}-{version('nltk')}"

    @cached_property
    def as_captions(self) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
        """References and outputs by example, as pycocoevalcap takes them."""
        return dict(enumerate(self.references)), {row: [text] for row, text in enumerate(self.predictions)}

    def signature(self, name: str) -> str:
        """Return the signature of a score of pycocoevalcap."""
        return signature_of(
            name, refs=self.reference_counts, case="lc", tok=self.tokeniser, pycocoevalcap=version("pycocoevalcap")
        )


def nltk_tokenise(texts: Sequence[str]) -> list[str]:
    """Return what stands in for `ptb_tokenise` where there is no Java: nltk's Treebank tokens, treated the same way.

    nltk splits off the last full stop only, and Stanford's tokeniser writes currency signs as ASCII: both done here.
    """
    from nltk.tokenize import NLTKWordTokenizer

    tokeniser, dropped = NLTKWordTokenizer(), punctuation()

    def tokens_of(text: str) -> list[str]:
        plain = re.sub(r"\.(?=\s)", " . ", text).replace("£", "# ").replace("€", "$ ")
        found: list[str] = tokeniser.tokenize(plain, convert_parentheses=True)
        return found

    split = {text: tokens_of(text) for text in dict.fromkeys(texts)}
    return [" ".join(token.lower() for token in split[text] if token not in dropped) for text in texts]


def coco_meteor(corpus: CocoCorpus) -> Statistics:
    """Return METEOR 1.5 in [0, 1].

    Raises:
        JavaError: if there is no Java.
    """
    return meteor(corpus.predictions, corpus.references, reference_counts=corpus.reference_counts)


def rouge_l(corpus: CocoCorpus) -> Statistics:
    """Return ROUGE-L in [0, 1]: F (beta 1.2) of the best precision and the best recall over references, row mean."""
    from pycocoevalcap.rouge.rouge import Rouge

    references, predictions = corpus.as_captions
    _, scores = Rouge().compute_score(references, predictions)
    return mean_of("ROUGE_L", scores, signature=corpus.signature("ROUGE_L"))


def cider(corpus: CocoCorpus) -> Statistics:
    """Return CIDEr in [0, 10], document frequencies from this corpus' references, mean over rows."""
    from pycocoevalcap.cider.cider import Cider

    references, predictions = corpus.as_captions
    if any(text for texts in corpus.references for text in texts):
        _, scores = Cider().compute_score(references, predictions)
    else:  # punctuation only: pycocoevalcap has no frequencies to take the maximum of
        scores = [0.0] * len(predictions)
    return mean_of("CIDEr", scores, signature=corpus.signature("CIDEr"))
