"""What every metric returns: statistics of each example, and how their sums become the score."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from crosslore_eval import __version__
from crosslore_eval.errors import EvalError, counted

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """One metric over one set of outputs.

    Sums of rows are all that a score needs, so a bootstrap draws rows instead of scoring texts again.
    """

    name: str
    # (examples, k)
    rows: Array
    # sums over examples, (..., k) -> scores, (...)
    combine: Callable[[Array], Array]
    signature: str

    def value(self) -> float:
        """Return the score of all examples."""
        return float(self.combine(self.rows.sum(axis=0)))

    def regrouped(self, groups: Sequence[int]) -> "Statistics":
        """Return the same metric with rows added up that belong to one example.

        Args:
            groups: for each row its example, 0 to examples - 1.
        """
        rows = np.zeros((max(groups) + 1, self.rows.shape[1]))
        np.add.at(rows, np.asarray(groups), self.rows)
        return Statistics(name=self.name, rows=rows, combine=self.combine, signature=self.signature)


def mean_of(name: str, scores: Sequence[float], *, signature: str) -> Statistics:
    """Return the statistics of a metric that is the mean of the examples' own scores."""
    rows = np.column_stack([np.asarray(scores, dtype=np.float64), np.ones(len(scores))])
    return Statistics(name=name, rows=rows, combine=lambda sums: sums[..., 0] / sums[..., 1], signature=signature)


def signature_of(name: str, **settings: object) -> str:
    """Return a score's signature as sacreBLEU writes them: `BLEU|refs:1-45|case:lc|...|v:0.1.0`.

    Args:
        name: the score's.
        settings: what it depends on, in the order to show; None leaves one out.
    """
    parts = [f"{key}:{value}" for key, value in settings.items() if value is not None]
    return "|".join([name, *parts, f"v:{__version__}"])


@dataclass(frozen=True)
class Corpus:
    """Outputs and their references, one-to-one, as they are; `plain` for metrics that read words only."""

    predictions: tuple[str, ...]
    # at least one each
    references: tuple[tuple[str, ...], ...]
    # where each example's references were read, for messages; empty: not known
    places: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, predictions: Sequence[str], references: Sequence[Sequence[str]], *, places: Sequence[str] = ()
    ) -> "Corpus":
        """Return checked texts.

        Args:
            predictions: one output for each example.
            references: of each example, at least one.
            places: where each example's references were read, for messages.

        Raises:
            EvalError: if the lengths differ or are 0, or an example has no reference.
        """
        if len(predictions) != len(references) or not references:
            raise EvalError(
                "outputs and references must be equally many and at least 1, got "
                f"{counted(len(predictions), 'output')} and {counted(len(references), 'example')} with references. "
                "Check that both come from the same test set."
            )
        for number, texts in enumerate(references, start=1):
            if isinstance(texts, str) or not texts:
                raise EvalError(f"references of example {number} must be a list of at least one text, got {texts!r}.")
        pairs = tuple(map(_encodable, predictions)), tuple(tuple(map(_encodable, texts)) for texts in references)
        return cls(*pairs, places=tuple(places))

    def place(self, example: int) -> str:
        """Return where the references of an example were read; its number where that is not known."""
        return self.places[example] if self.places else f"example {example + 1}"

    @cached_property
    def plain(self) -> "Corpus":
        """The same texts with runs of white space, line breaks of any kind included, as single spaces."""
        return Corpus(
            tuple(map(_plain_spaces, self.predictions)),
            tuple(tuple(map(_plain_spaces, texts)) for texts in self.references),
        )

    @property
    def reference_counts(self) -> str:
        """Number of references for each example, as signatures show it: "1", or the range "1-45"."""
        counts = [len(texts) for texts in self.references]
        low, high = min(counts), max(counts)
        return str(low) if low == high else f"{low}-{high}"

    @cached_property
    def single(self) -> tuple["Corpus", list[int]]:
        """One row for each reference, its example's output repeated; and the example of each row."""
        groups = [index for index, texts in enumerate(self.references) for _ in texts]
        references = tuple((text,) for texts in self.references for text in texts)
        return Corpus(tuple(self.predictions[index] for index in groups), references), groups


def _encodable(text: str) -> str:
    # Lone surrogates, which JSON can hold, are no text that a file or a Java program could take.
    return text.encode("utf-8", "replace").decode("utf-8")


def _plain_spaces(text: str) -> str:
    return " ".join(text.split())
