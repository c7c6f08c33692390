"""From files or texts to scores with signatures, intervals and comparisons."""

from dataclasses import dataclass
from pathlib import Path

from crosslore_eval import bootstrap
from crosslore_eval.alignment import align
from crosslore_eval.inputs import Outputs, References, grouped, read_outputs, read_references
from crosslore_eval.manifest import check_task
from crosslore_eval.metrics.base import Corpus, Statistics
from crosslore_eval.metrics.coco import is_stand_in
from crosslore_eval.metrics.java import INSTALL_JAVA
from crosslore_eval.protocols import Missing, Protocol, Results
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
        return grouped(str(outputs.path), outputs.references, inputs, task=task, places=outputs.places)
    rows = load_rows(task, task.split(split), folder=data)
    examples = task.examples(rows)
    return References(
        source=f"{task.name} ({task.split(split).name})",
        texts=[list(example.references) for example in examples],
        inputs=[example.input for example in examples],
    )


def corpus_of(outputs: Outputs, references: References, *, task: Task) -> Corpus:
    """Return the texts of a system, aligned with their references."""
    places = references.places or [f"{references.source}, example {i + 1}" for i in range(len(references.texts))]
    return Corpus.of(*align(outputs, references, task=task), places=places)


def read_corpus(
    predictions: Path, *, task: Task, references: Path | None, data: Path | None, split: str | None
) -> Corpus:
    """Return a system's outputs from a file, aligned with their references.

    Args:
        predictions: file of the outputs.
        task: that they answer.
        references: the `--references` file, if one is named.
        data: folder of the task's data, used when neither file has references.
        split: of the task's data; None is its test split.

    Raises:
        EvalError: if a file cannot be used, or the manifest beside the outputs names another task.
    """
    outputs = read_outputs(predictions)
    check_task(predictions, task.name)
    found = references_of(outputs, task=task, file=references, data=data, split=split)
    return corpus_of(outputs, found, task=task)


def score_corpus(task: Task, protocol: Protocol, corpus: Corpus, *, samples: int = 0) -> Report:
    """Return the scores of a corpus under a protocol.

    Args:
        task: for its name.
        protocol: one of the task's.
        corpus: outputs and references.
        samples: bootstrap samples for intervals; 0 for none.
    """
    return report_of(task.name, protocol, corpus, protocol.score(corpus), samples=samples)


def report_of(task: str, protocol: Protocol, corpus: Corpus, results: Results, *, samples: int = 0) -> Report:
    """Return the scores of a corpus from what the protocol's metrics returned for it.

    Args:
        task: its name.
        protocol: that `results` are of.
        corpus: that `results` are of.
        results: what `protocol.score(corpus)` returned.
        samples: bootstrap samples for intervals; 0 for none.
    """
    scores = [_score(result, protocol, samples) for result in results]
    return Report(task=task, protocol=protocol.name, n=len(corpus.predictions), scores=scores, samples=samples)


def _score(result: Statistics | Missing, protocol: Protocol, samples: int) -> Score:
    if isinstance(result, Missing):
        return Score(name=result.name, value=None, reason=result.reason)
    interval = bootstrap.confidence(result, samples=samples) if samples else None
    signature = signature_under(protocol, result)
    return Score(name=result.name, value=result.value(), signature=signature, interval=interval)


def signature_under(protocol: Protocol, result: Statistics) -> str:
    """Return the signature of a score with the protocol's name in it."""
    return result.signature.replace("|", f"|protocol:{protocol.name}|", 1)


def warnings_of(results: Results) -> list[str]:
    """Return what a reader of scores must know: which could not be computed, and which are on stand-in tokens."""
    missing = [result for result in results if isinstance(result, Missing)]
    stand_ins = [result.name for result in results if isinstance(result, Statistics) and is_stand_in(result.signature)]
    if not stand_ins:
        return [f"{result.name} was not computed: {result.reason}" for result in missing]
    left_out = "".join(f"{result.name} was not computed, for it needs Java; " for result in missing)
    return [
        f"no `java` that runs was found: {left_out}{' and '.join(stand_ins)} are on nltk's tokens, for the PTB "
        f"tokeniser needs Java too (their signatures say so, docs/metrics.md how far they are apart). {INSTALL_JAVA}"
    ]
