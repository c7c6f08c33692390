"""Outputs and references one-to-one, or refused with the first that has no partner."""

import logging
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from crosslore_eval.errors import EvalError, counted, shown
from crosslore_eval.inputs import Outputs, References
from crosslore_eval.tasks.base import Task

logger = logging.getLogger(__name__)


def align(outputs: Outputs, references: References, *, task: Task) -> tuple[list[str], list[list[str]]]:
    """Return outputs and references, one output an example.

    A file with one output for each reference row of a task that has several an example, as LLaMA-Factory's `predict`
    writes it, keeps the first output of each example; that outputs of one example differ is warned about.

    Raises:
        EvalError: if the numbers do not agree; says which example or line is the first without its partner.
    """
    predictions, texts = list(outputs.predictions), references.texts
    rows = sum(map(len, texts))
    while len(predictions) > len(texts) and len(predictions) != rows and not predictions[-1].strip():
        predictions.pop()
    if len(predictions) < len(outputs.predictions):
        extra = len(outputs.predictions) - len(predictions)
        logger.warning("%s: %s at the end left out", outputs.path, counted(extra, "empty line"))
    if len(predictions) == len(texts):
        _check_inputs(outputs, references)
        return predictions, texts
    if task.groups_rows and len(predictions) == rows:
        return _first_of_each(predictions, references, path=outputs.path), texts
    raise _count_error(outputs.path, predictions, references, task=task)


def _count_error(path: Path, predictions: Sequence[str], references: References, *, task: Task) -> EvalError:
    """Return the error for outputs that are not as many as the examples: the first without its partner, what to do."""
    texts, rows = references.texts, sum(map(len, references.texts))
    counts = f"{path} has {counted(len(predictions), 'output')}, {references.source} has "
    counts += counted(len(texts), "example")
    if task.groups_rows and rows != len(texts):
        counts += f" ({counted(rows, 'reference')})"
    others = "give the references of these outputs with --references FILE, or their split with --split NAME"
    if len(predictions) < len(texts):
        first = shown(references.inputs[len(predictions)] if references.inputs else texts[len(predictions)][0])
        return EvalError(
            f"{counts}: example {len(predictions) + 1}, {first}, is the first without an output. Complete the outputs, "
            f"or {others}."
        )
    return EvalError(
        f"{counts}: output {len(texts) + 1}, {shown(predictions[len(texts)])}, is the first beyond them. If outputs "
        f"have line breaks inside, write jsonl with a field `prediction`; else {others}."
    )


def _check_inputs(outputs: Outputs, references: References) -> None:
    """Raise if outputs and references name their inputs and those differ: one of the two is in another order."""
    if outputs.inputs is None or references.inputs is None:
        return
    for number, (own, wanted) in enumerate(zip(outputs.inputs, references.inputs, strict=False), start=1):
        if " ".join(own.split()) != " ".join(wanted.split()):
            raise EvalError(
                f"example {number} of {outputs.path} answers {shown(own)}, that of {references.source} is "
                f"{shown(wanted)}: they must be in the same order. Sort one of them."
            )


def _first_of_each(predictions: Sequence[str], references: References, *, path: Path) -> list[str]:
    """Return the first output of each example, from one output for each of its references."""
    rows = references.rows
    if rows is None:
        ends = list(accumulate(map(len, references.texts)))
        rows = [list(range(end - len(texts), end)) for end, texts in zip(ends, references.texts, strict=True)]
    own = [[predictions[row] for row in positions] for positions in rows]
    logger.warning("%s: one output for each reference: the first of each of %d examples is scored", path, len(rows))
    differing = sum(len(set(texts)) > 1 for texts in own)
    if differing:
        logger.warning("%s: in %d of %d examples these outputs differ", path, differing, len(rows))
    return [texts[0] for texts in own]
