"""From files or texts to scores with signatures, intervals and comparisons."""

from dataclasses import dataclass
from pathlib import Path

from crosslore_eval import bootstrap
from crosslore_eval.errors import EvalError
from crosslore_eval.inputs import Outputs, References, align, grouped, read_references
from crosslore_eval.metrics.base import Corpus, Statistics
from crosslore_eval.protocols import Missing, Protocol
from crosslore_eval.tasks.base import Task
from crosslore_eval.tasks.loading import load_rows


@dataclass(frozen=True, kw_only=True)
class Score:
    """One score, or why there is none."""

    name: str
    # None: could not be computed here
    value: float | None
    signature: str = ""
    # 95 %, when asked for
    interval: bootstrap.Interval | None = None
    reason: str = ""

    def as_json(self) -> dict[str, object]:
        """Return what `--json` prints for the score."""
        if self.value is None:
            return {"value": None, "error": self.reason}
        fields: dict[str, object] = {"value": self.value, "signature": self.signature}
        if self.interval is not None:
            fields["confidence_95"] = [self.interval.low, self.interval.high]
        return fields


@dataclass(frozen=True, kw_only=True)
class Report:
    """The scores of one system on one task."""

    task: str
    protocol: str
    # examples
    n: int
    scores: list[Score]
    # bootstrap samples behind the intervals; 0: none asked for
    samples: int = 0

    def as_json(self) -> dict[str, object]:
        """Return the object that `--json` prints."""
        fields: dict[str, object] = {"task": self.task, "protocol": self.protocol, "n": self.n}
        if self.samples:
            fields["bootstrap"] = {"samples": self.samples, "seed": bootstrap.DEFAULT_SEED}
        return {**fields, "scores": {score.name: score.as_json() for score in self.scores}}


def references_of(
    outputs: Outputs, *, task: Task, file: Path | None, data: Path | None, split: str | None
) -> References:
    """Return the references for a system's outputs: from the named file, the outputs' own file, or the task's data.

    Args:
        outputs: of the system.
        task: that they answer.
        file: the `--references` file, if one is named.
        data: folder of the task's data, used when neither file has references.
        split: of the task's data; None is its test split.
    """
    if file is not None:
        return read_references(file, task=task, count=len(outputs.predictions))
    if outputs.references is not None and data is None:
        inputs = outputs.inputs or outputs.prompts
        return grouped(str(outputs.path), outputs.references, inputs, task=task)
    rows = load_rows(task, task.split(split), folder=data)
    examples = task.examples(rows)
    return References(
        source=f"{task.name} ({task.split(split).name})",
        texts=[list(example.references) for example in examples],
        inputs=[example.input for example in examples],
    )


def corpus_of(outputs: Outputs, references: References, *, task: Task) -> Corpus:
    """Return the texts of a system, aligned with their references."""
    return Corpus.of(*align(outputs, references, task=task))


def score_corpus(task: Task, protocol: Protocol, corpus: Corpus, *, samples: int = 0) -> Report:
    """Return the scores of a corpus under a protocol.

    Args:
        task: for its name.
        protocol: one of the task's.
        corpus: outputs and references.
        samples: bootstrap samples for intervals; 0 for none.
    """
    scores = [_score(result, protocol, samples) for result in protocol.score(corpus)]
    return Report(task=task.name, protocol=protocol.name, n=len(corpus.predictions), scores=scores, samples=samples)


def _score(result: Statistics | Missing, protocol: Protocol, samples: int) -> Score:
    if isinstance(result, Missing):
        return Score(name=result.name, value=None, reason=result.reason)
    interval = bootstrap.confidence(result, samples=samples) if samples else None
    signature = result.signature.replace("|", f"|protocol:{protocol.name}|", 1)
    return Score(name=result.name, value=result.value(), signature=signature, interval=interval)


def _check_same_references(a: Corpus, b: Corpus) -> None:
    if len(a.references) != len(b.references):
        raise EvalError(
            f"the two systems must answer the same examples, got {len(a.references)} outputs in A and "
            f"{len(b.references)} in B. Predict both with the same --limit and --split."
        )
    pairs = enumerate(zip(a.plain.references, b.plain.references, strict=True), start=1)
    first = next(((number, one, other) for number, (one, other) in pairs if one != other), None)
    if first is not None:
        number, one, other = first
        raise EvalError(
            f"the two systems must have the same references in the same order; example {number} is the first with "
            f"others: {one[0][:60]!r} in A, {other[0][:60]!r} in B. Give --references FILE if their own are not right."
        )


def compare_corpora(
    protocol: Protocol, a: Corpus, b: Corpus, *, samples: int
) -> dict[str, bootstrap.Difference | Missing]:
    """Return for each metric how far system B is above system A.

    Raises:
        EvalError: if the two do not have the same references in the same order.
    """
    _check_same_references(a, b)
    found: dict[str, bootstrap.Difference | Missing] = {}
    for one, other in zip(protocol.score(a), protocol.score(b), strict=True):
        match one, other:
            case Statistics(), Statistics():
                found[one.name] = bootstrap.compare(one, other, samples=samples)
            case (Missing() as missing, _) | (_, Missing() as missing):
                found[missing.name] = missing
    return found
