"""Outputs and references from files, aligned one-to-one or refused."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from crosslore_eval.errors import EvalError
from crosslore_eval.tasks.base import Task, shown
from crosslore_eval.tasks.files import Located, decode, read_rows

logger = logging.getLogger(__name__)

PREDICTION_FIELDS = ("prediction", "predict")
# A list of texts, then single ones: ours, GSM8K's, MAWPS', LLaMA-Factory's, and the data sets'.
REFERENCES_FIELD = "references"
REFERENCE_FIELDS = ("answer", "ans", "reference", "ref", "label", "output", "highlights", "summary", "human_reference")
INPUT_FIELDS = ("input", "mr", "MR", "meaning_representation")
# LLaMA-Factory's: the input with the template around it, good for grouping only.
PROMPT_FIELD = "prompt"


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """A system's outputs, and the references and inputs that came with them, if any."""

    path: Path
    predictions: list[str]
    references: list[list[str]] | None = None
    inputs: list[str] | None = None
    # inputs with a template around them
    prompts: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class References:
    """References by example, and the examples' inputs where the file has them."""

    source: str
    texts: list[list[str]]
    inputs: list[str] | None = None
    # For each example the positions of its references among all rows; None: they follow each other.
    rows: list[list[int]] | None = None


def _read_bytes(path: Path, *, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EvalError(f"{option} must be a file that can be read, got {path}: {error.strerror}.") from error


def _is_structured(path: Path, text: str) -> bool:
    """Return whether a file holds JSON rows: by its ending, else by its first line."""
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    if suffix in (".jsonl", ".json", ".csv"):
        return True
    try:
        return suffix != ".txt" and isinstance(json.loads(text.lstrip().split("\n", 1)[0]), dict)
    except ValueError:
        return False


def _lines(text: str) -> list[str]:
    r"""Return the lines of a text; only \n and \r\n end one, so no character inside a line can shift those after it."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_outputs(path: Path) -> Outputs:
    """Return a system's outputs from text (one a line), our jsonl, or LLaMA-Factory's `generated_predictions.jsonl`.

    Raises:
        EvalError: if the file cannot be read, holds nothing, or a row has no output; says which.
    """
    data = _read_bytes(path, option="the predictions")
    text = decode(data, path=path)
    if not text.strip():
        raise EvalError(f"{path} is empty: expected one output a line, or jsonl with a field `prediction`.")
    if not _is_structured(path, text):
        return Outputs(path=path, predictions=_lines(text))
    rows = read_rows(data, path=path, columns=PREDICTION_FIELDS[:1])
    predictions = [_prediction(place, fields) for place, fields in rows]
    _check_complete(path, rows)
    references = [_references(fields) for _, fields in rows]
    prompts = _texts(rows, (PROMPT_FIELD,))
    held = [found for found in references if found is not None]
    if held and len(held) < len(rows):
        place = rows[next(i for i, found in enumerate(references) if found is None)][0]
        raise EvalError(f"{place}: expected references as in the other rows, got none.")
    return Outputs(path=path, predictions=predictions, references=held or None, inputs=_inputs(rows), prompts=prompts)


def _prediction(place: str, fields: dict[str, object]) -> str:
    name = next((name for name in PREDICTION_FIELDS if name in fields), None)
    if name is None:
        raise EvalError(
            f"{place}: expected a field `prediction` (or LLaMA-Factory's `predict`), got {', '.join(fields) or 'none'}."
        )
    value = fields[name]
    if not isinstance(value, str):
        raise EvalError(f"{place}: `{name}` must be text, got {shown(value)}.")
    return value


def _check_complete(path: Path, rows: Sequence[Located]) -> None:
    """Raise unless rows that carry an `index` are 0, 1, 2, ...: an interrupted `predict` leaves others."""
    for number, (place, fields) in enumerate(rows):
        if "index" in fields and fields["index"] != number:
            raise EvalError(
                f"{place}: expected the row with index {number}, got {shown(fields['index'])}. If {path} is the "
                "partial file of an interrupted `predict`, run that command again: it goes on to the whole file."
            )


def _inputs(rows: Sequence[Located]) -> list[str] | None:
    return _texts(rows, INPUT_FIELDS)


def _texts(rows: Sequence[Located], fields_to_try: Sequence[str]) -> list[str] | None:
    """Return the first of these fields that every row has as text."""
    names = [name for name in fields_to_try if all(isinstance(fields.get(name), str) for _, fields in rows)]
    return [str(fields[names[0]]) for _, fields in rows] if names else None


def _references(fields: dict[str, object]) -> list[str] | None:
    """Return the references of a row: the list, or the one text or number; None if it has none."""
    many = fields.get(REFERENCES_FIELD)
    if isinstance(many, str):
        return [many]
    if isinstance(many, list) and many and all(isinstance(text, str | int | float) for text in many):
        return [str(text) for text in many]
    for name in REFERENCE_FIELDS:
        value = fields.get(name)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return [str(value)]
    return None


def read_references(path: Path, *, task: Task, count: int) -> References:
    """Return references from a file.

    Args:
        path: text (one reference a line, or the e2e-metrics layout: the references of one example on lines of their
            own, examples separated by an empty line), jsonl, json, or csv with the task's columns.
        task: whose rows with equal inputs are grouped if it says so.
        count: number of outputs: tells one example with several references from several examples with one.

    Raises:
        EvalError: if the file cannot be read, or an example has no reference; says which.
    """
    data = _read_bytes(path, option="--references")
    text = decode(data, path=path)
    if not text.strip():
        raise EvalError(f"--references: {path} is empty.")
    if not _is_structured(path, text):
        return References(source=str(path), texts=_blocks(path, text, task=task, count=count))
    rows = read_rows(data, path=path, columns=task.fields)
    found = [_references(fields) for _, fields in rows]
    for (place, fields), texts in zip(rows, found, strict=True):
        if texts is None:
            raise EvalError(
                f"{place}: expected a reference: `references` (a list) or one of {', '.join(REFERENCE_FIELDS)}; got "
                f"{', '.join(fields) or 'none'}."
            )
    return grouped(str(path), [texts or [] for texts in found], _inputs(rows), task=task)


def _blocks(path: Path, text: str, *, task: Task, count: int) -> list[list[str]]:
    """Return the references of text in the e2e-metrics layout, or with one reference a line."""
    lines = [line.strip() for line in _lines(text.strip("\r\n"))]
    if "" not in lines:
        if task.groups_rows and count == 1 and len(lines) > 1:
            logger.warning("%s: %d lines for one output: all of them are its references", path, len(lines))
            return [lines]
        return [[line] for line in lines]
    blocks: list[list[str]] = [[]]
    for number, line in enumerate(lines, start=1):
        if line:
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
        else:
            raise EvalError(
                f"{path}, line {number}: example {len(blocks)} has no reference (an empty line after an empty line). "
                "One empty line separates two examples."
            )
    return blocks


def grouped(source: str, texts: list[list[str]], inputs: list[str] | None, *, task: Task) -> References:
    """Return references, rows of equal input put together in order of first appearance if the task says so."""
    if not task.groups_rows or inputs is None:
        return References(source=source, texts=texts, inputs=inputs)
    found: dict[str, list[int]] = {}
    for row, key in enumerate(inputs):
        found.setdefault(key, []).append(row)
    rows = list(found.values())
    together = [[text for row in own for text in texts[row]] for own in rows]
    return References(source=source, texts=together, inputs=list(found), rows=rows)


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
        logger.warning("%s: %d empty lines at the end left out", outputs.path, extra)
    if len(predictions) == len(texts):
        _check_inputs(outputs, references)
        return predictions, texts
    if task.groups_rows and len(predictions) == rows:
        return _first_of_each(predictions, references, path=outputs.path), texts
    counts = f"{outputs.path} has {len(predictions)} outputs, {references.source} has {len(texts)} examples"
    if task.groups_rows and rows != len(texts):
        counts += f" ({rows} references)"
    if len(predictions) < len(texts):
        first = shown(references.inputs[len(predictions)] if references.inputs else texts[len(predictions)][0])
        raise EvalError(f"{counts}: example {len(predictions) + 1}, {first}, is the first without an output.")
    raise EvalError(f"{counts}: output {len(texts) + 1}, {shown(predictions[len(texts)])}, is the first beyond them.")


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
