"""Outputs and references from files."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crosslore_eval.errors import EvalError, shown
from crosslore_eval.tasks.base import Task
from crosslore_eval.tasks.files import Located, decode, read_rows

logger = logging.getLogger(__name__)

PREDICTION_FIELDS = ("prediction", "predict")
# A list of texts, then single ones: ours, GSM8K's, MAWPS', LLaMA-Factory's, and the data sets' (E2E's on the hub last).
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
    # of each row in the file, for messages; text files have none
    places: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class References:
    """References by example, and the examples' inputs where the file has them."""

    source: str
    texts: list[list[str]]
    inputs: list[str] | None = None
    # For each example the positions of its references among all rows; None: they follow each other.
    rows: list[list[int]] | None = None
    # where each example's (first) reference was read, for messages
    places: list[str] | None = None


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
    rows = _rows(data, path=path)
    predictions = [_prediction(place, fields) for place, fields in rows]
    _check_complete(path, rows)
    references = [_references(fields) for _, fields in rows]
    prompts = _texts(rows, (PROMPT_FIELD,))
    held = [found for found in references if found is not None]
    if held and len(held) < len(rows):
        place = rows[next(i for i, found in enumerate(references) if found is None)][0]
        raise EvalError(f"{place}: expected references as in the other rows, got none.")
    return Outputs(
        path=path,
        predictions=predictions,
        references=held or None,
        inputs=_inputs(rows),
        prompts=prompts,
        places=[place for place, _ in rows],
    )


def _rows(data: bytes, *, path: Path) -> list[Located]:
    """Return the rows of a structured file, whatever its columns; `references` in a csv cell may be a JSON list."""
    rows = read_rows(data, path=path, columns=())
    if not rows:
        raise EvalError(f"{path} holds no rows: expected one for each example. Take the whole file.")
    if ".csv" in path.suffixes[-2:]:
        for _, fields in rows:
            if REFERENCES_FIELD in fields:
                fields[REFERENCES_FIELD] = _list_in(fields[REFERENCES_FIELD])
    return rows


def _list_in(cell: object) -> object:
    """Return the list that a csv cell holds as JSON, else the cell as it is."""
    if not isinstance(cell, str) or not cell.lstrip().startswith("["):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


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
            own, examples separated by an empty line), or jsonl, json or csv with one of the fields of references.
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
        return _blocks(path, text, task=task, count=count)
    rows = _rows(data, path=path)
    found = [_references(fields) for _, fields in rows]
    for (place, fields), texts in zip(rows, found, strict=True):
        if texts is None:
            raise EvalError(
                f"{place}: expected a reference: `references` (a list) or one of {', '.join(REFERENCE_FIELDS)}; got "
                f"{', '.join(fields) or 'none'}. Give the field or column with the reference one of these names."
            )
    places = [place for place, _ in rows]
    return grouped(str(path), [texts or [] for texts in found], _inputs(rows), task=task, places=places)


def _blocks(path: Path, text: str, *, task: Task, count: int) -> References:
    """Return the references of text in the e2e-metrics layout, or with one reference a line."""
    skipped = len(_lines(text[: len(text) - len(text.lstrip("\r\n"))]))
    lines = [line.strip() for line in _lines(text.strip("\r\n"))]
    places = [f"{path}, line {number}" for number in range(skipped + 1, skipped + len(lines) + 1)]
    if "" not in lines:
        if task.groups_rows and count == 1 and len(lines) > 1:
            logger.warning("%s: %d lines for one output: all of them are its references", path, len(lines))
            return References(source=str(path), texts=[lines], places=places[:1])
        return References(source=str(path), texts=[[line] for line in lines], places=places)
    blocks: list[list[str]] = [[]]
    starts: list[str] = []
    for line, place in zip(lines, places, strict=True):
        if line:
            starts += [] if blocks[-1] else [place]
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
        else:
            raise EvalError(
                f"{place}: example {len(blocks)} has no reference (an empty line after an empty line). "
                "One empty line separates two examples."
            )
    return References(source=str(path), texts=blocks[: len(starts)], places=starts)  # a last line of spaces starts none


def grouped(
    source: str, texts: list[list[str]], inputs: list[str] | None, *, task: Task, places: list[str] | None = None
) -> References:
    """Return references, rows of equal input put together in order of first appearance if the task says so.

    Args:
        source: of the references, for messages.
        texts: the references of each row.
        inputs: of each row; None if they are not known.
        task: says whether rows of equal input are one example.
        places: of each row, for messages.
    """
    if not task.groups_rows or inputs is None:
        return References(source=source, texts=texts, inputs=inputs, places=places)
    found: dict[str, list[int]] = {}
    for row, key in enumerate(inputs):
        found.setdefault(key, []).append(row)
    rows = list(found.values())
    together = [[text for row in own for text in texts[row]] for own in rows]
    firsts = [places[own[0]] for own in rows] if places else None
    return References(source=source, texts=together, inputs=list(found), rows=rows, places=firsts)
