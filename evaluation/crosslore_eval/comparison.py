"""Two systems on the same examples: how far B is above A, and whether that can be chance."""

from collections.abc import Mapping
from dataclasses import dataclass

from crosslore_eval import bootstrap
from crosslore_eval.errors import EvalError, counted, shown
from crosslore_eval.metrics.base import Corpus, Statistics
from crosslore_eval.protocols import Missing, Protocol, Results
from crosslore_eval.scoring import signature_under


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One score of both systems."""

    difference: bootstrap.Difference
    # the same for both
    signature: str

    def as_json(self) -> dict[str, object]:
        """Return what `--json` prints for the score."""
        held = self.difference
        return {
            "a": held.value_a,
            "b": held.value_b,
            "difference": held.value_b - held.value_a,
            "confidence_95": [held.interval.low, held.interval.high],
            "p_value": held.p_value,
            "signature": self.signature,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The scores of two systems on one task."""

    task: str
    protocol: str
    # examples
    n: int
    # files of systems A and B
    a: str
    b: str
    # bootstrap samples, and random swaps
    samples: int
    scores: Mapping[str, Compared | Missing]

    def as_json(self) -> dict[str, object]:
        """Return the object that `--json` prints."""
        return {
            "task": self.task,
            "protocol": self.protocol,
            "n": self.n,
            "systems": {"a": self.a, "b": self.b},
            "bootstrap": {
                "samples": self.samples,
                "seed": bootstrap.DEFAULT_SEED,
                "smallest_p_value": bootstrap.smallest_p_value(self.samples),
            },
            "scores": {
                name: {"value": None, "error": found.reason} if isinstance(found, Missing) else found.as_json()
                for name, found in self.scores.items()
            },
        }


def check_same_references(a: Corpus, b: Corpus) -> None:
    """Raise `EvalError` unless two systems answer the same examples in the same order."""
    if len(a.references) != len(b.references):
        raise EvalError(
            f"the two systems must answer the same examples, got {counted(len(a.references), 'output')} in A and "
            f"{len(b.references)} in B. Predict both with the same --limit and --split."
        )
    pairs = enumerate(zip(a.plain.references, b.plain.references, strict=True), start=1)
    first = next(((number, one, other) for number, (one, other) in pairs if one != other), None)
    if first is not None:
        number, one, other = first
        raise EvalError(
            f"the two systems must have the same references in the same order; example {number} is the first with "
            f"others: {shown(one[0])} in A, {shown(other[0])} in B. Give --references FILE if their own are not right."
        )


def compare_results(protocol: Protocol, a: Results, b: Results, *, samples: int) -> dict[str, Compared | Missing]:
    """Return for each metric how far system B is above system A.

    Args:
        protocol: that both are of.
        a: what its metrics returned for system A.
        b: the same for system B, on the same examples.
        samples: bootstrap samples, and random swaps.

    Raises:
        EvalError: if a score was computed in two ways, as when Java went missing between the two.
    """
    found: dict[str, Compared | Missing] = {}
    for one, other in zip(a, b, strict=True):
        match one, other:
            case Statistics(), Statistics():
                if one.signature != other.signature:
                    raise EvalError(
                        f"{one.name} of A and B must be computed in the same way, got {one.signature} and "
                        f"{other.signature}. Compare them where Java runs for both, or for neither."
                    )
                difference = bootstrap.compare(one, other, samples=samples)
                found[one.name] = Compared(difference=difference, signature=signature_under(protocol, one))
            case (Missing() as missing, _) | (_, Missing() as missing):
                found[missing.name] = missing
    return found
