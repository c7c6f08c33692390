"""Rows of a task's split from a local folder or from the Hugging Face hub, checked against the original."""

import hashlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from crosslore_eval.errors import counted
from crosslore_eval.tasks.base import Row, RowError, Split, Task
from crosslore_eval.tasks.files import ADVICE, DataError, Located, decode, read_jsonl, read_rows

logger = logging.getLogger(__name__)

# Where evaluation looks when no folder is named: in this variable's only if it is set, else in what
# scripts/prepare_data.py writes and in `data`, then on the hub.
DATA_VARIABLE = "CROSSLORE_DATA_DIR"
PREPARED = Path("data") / "prepared"
BUNDLED = Path("data")
# How a user names a folder, for messages.
FOLDER_OPTION = f"{DATA_VARIABLE}=DIR or --data"


def layout_of(tasks: Iterable[Task]) -> str:
    """Return the files that a folder of these tasks holds, for messages."""
    return ", ".join(split.file for task in tasks for split in task.splits)


def progress(rows: Sequence[Located], *, name: str) -> Iterable[Located]:
    """Return the rows, counted by a progress bar where tqdm is installed and a terminal is there to show it."""
    try:
        from tqdm import tqdm
    except ImportError:
        return rows
    bar: Iterable[Located] = tqdm(rows, desc=name, unit=" rows", disable=None, leave=False)
    return bar


def find_file(split: Split, folder: Path) -> Path:
    """Return the split's file below `folder`, the compressed one where only that is there."""
    path = folder / split.file
    packed = path.with_name(path.name + ".gz")
    return packed if packed.is_file() and not path.is_file() else path


def read_local(split: Split, *, task: Task, folder: Path, advice: str) -> tuple[list[Located], str]:
    """Return the rows of a local file and its sha256.

    Args:
        split: which one.
        task: that it belongs to.
        folder: that holds the file.
        advice: what to do if it cannot be read.
    """
    path = find_file(split, folder)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. {advice}") from error
    return read_rows(data, path=path, columns=task.fields), hashlib.sha256(data).hexdigest()


def read_hub(split: Split, *, task: Task, option: str) -> list[Located]:
    """Return the rows of a split on the Hugging Face hub, its fields named as in the files.

    Args:
        split: which one.
        task: that it belongs to.
        option: the command line's option for a local folder, for messages.
    """
    if task.hub is None:
        raise DataError(no_hub_message(task, option=option))
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"reading {task.hub.path} from the hub needs the package `datasets`, not installed for {sys.executable}. "
            f'Install with: pip install "crosslore[llamafactory]", or give local files with {option} DIR.'
        ) from error
    try:
        with _hub_retries_unsaid():
            data = load_dataset(task.hub.path, task.hub.config, revision=task.hub.revision, split=split.hub_split)
    except Exception as error:  # no common class: hub, http and file system errors all come through here
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise DataError(
            f"cannot load {task.hub.path} (split {split.hub_split}) from the Hugging Face hub: "
            f"{type(error).__name__}: {reason}. Is the hub reachable from here? "
            f"If not, fetch the files elsewhere and give their folder with {option} DIR; it must hold "
            f"{layout_of([task])}."
        ) from error
    place = f"{task.hub.path}, split {split.hub_split}, row"
    return [
        (f"{place} {i}", {name: row[column] for name, column in task.fields.items() if column in row})
        for i, row in enumerate(data)
    ]


@contextmanager
def _hub_retries_unsaid() -> Iterator[None]:
    """Keep the hub's library from printing two lines, each twice, for every one of its retries."""
    hub = logging.getLogger("huggingface_hub")
    before = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(before)


def no_hub_message(task: Task, *, option: str) -> str:
    """Return what to do about a data set that no hub has."""
    counts = " / ".join(str(split.rows) for split in task.splits)
    return (
        f"{task.name} can only be read from local files: no data set on the hub is known to hold this split ({counts} "
        f"rows). Give {option} DIR with {layout_of([task])}, rows with the fields {', '.join(task.fields)}"
    )


def convert(located: Sequence[Located], *, task: Task, name: str) -> list[Row]:
    """Return the examples of rows; an error names the row."""
    rows = []
    for place, fields in progress(located, name=name):
        try:
            rows.append(task.convert(fields))
        except RowError as error:
            raise DataError(f"{place}: {error}. {ADVICE}") from error
    return rows


def more_references(rows: list[Row], *, split: Split, folder: Path) -> list[Row]:
    """Return one row for each reference in `<file>_references.jsonl`, where there is such a file; else the rows."""
    path = (folder / split.file).with_name(f"{Path(split.file).stem}_references.jsonl")
    if not path.is_file():
        return rows
    by_input = {
        fields.get("input"): (place, fields.get("references"))
        for place, fields in read_jsonl(decode(path.read_bytes(), path=path), path=path)
    }
    expanded: list[Row] = []
    for row in rows:
        place, texts = by_input.get(row["input"], (str(path), None))
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{place}: expected the `references` of {row['input']!r}, a list of texts. {ADVICE}")
        expanded += [{**row, "output": text} for text in texts]
    return expanded


def load_rows(task: Task, split: Split, *, folder: Path | None) -> list[Row]:
    """Return the examples of a split, for evaluation; other row counts than the original's are warned about.

    Args:
        task: which task.
        split: which of its splits.
        folder: with the original files, or what scripts/prepare_data.py made of them; None: the folder that
            CROSSLORE_DATA_DIR names, or `data/prepared`, `data` and the hub where it is not set.

    Raises:
        DataError: if there are no rows, or one cannot be used; if the named folder does not hold the split.
    """
    place = _folder_with(split, task=task, folder=folder)
    if place is not None:
        prepared = _prepared_file(split, place)
        if prepared.is_file():
            rows = [
                _prepared_row(where, fields, task=task)
                for where, fields in read_jsonl(decode(prepared.read_bytes(), path=prepared), path=prepared)
            ]
        else:
            located, _ = read_local(split, task=task, folder=place, advice=ADVICE)
            rows = convert(located, task=task, name=split.name)
        _check_count(rows, split=split, where=str(place))
        return more_references(rows, split=split, folder=place)
    if task.hub is not None:
        logger.warning(
            "no %s in %s, %s and --data not given: asking the hub for %s",
            split.file, f"{PREPARED} or {BUNDLED}", DATA_VARIABLE, task.hub.path,
        )  # fmt: skip
    rows = convert(read_hub(split, task=task, option=FOLDER_OPTION), task=task, name=split.name)
    _check_count(rows, split=split, where="the hub")
    return rows


def _prepared_file(split: Split, folder: Path) -> Path:
    return folder / f"{split.name}.jsonl"


def _folder_with(split: Split, *, task: Task, folder: Path | None) -> Path | None:
    """Return the folder to read a split from, None for the hub; a folder that the user names must hold the split."""
    variable = os.environ.get(DATA_VARIABLE)
    option, named = ("--data", folder) if folder else (DATA_VARIABLE, Path(variable) if variable else None)
    if named is None:
        return _unnamed_folder_with(split, task=task)
    if named.is_dir() and _holds(named, split):
        return named
    if named.is_dir() and folder is None and task.is_bundled:  # the variable is for other data sets
        return _unnamed_folder_with(split, task=task)
    wrong = "which has neither" if named.is_dir() else "which is no folder"
    wrong = wrong if named.exists() else "which does not exist"
    otherwise = f", to ask the hub for {task.hub.path}" if task.hub else ""
    raise DataError(
        f"{option} must be a folder with {split.file} (or .gz; rows with the fields {', '.join(task.fields)}) or with "
        f"{split.name}.jsonl (from scripts/prepare_data.py), got {named}, {wrong}. Correct it, or leave it out"
        f"{otherwise}."
    )


def _unnamed_folder_with(split: Split, *, task: Task) -> Path | None:
    """Return the first of the usual folders that holds the split, None if the hub is to be asked."""
    found = next((place for place in (PREPARED, BUNDLED) if _holds(place, split)), None)
    if found is None and task.is_bundled:
        raise DataError(
            f"{task.name} is bundled with this project as {BUNDLED / split.file}, and there is no such file here. Run "
            f"in the project's folder, or give {FOLDER_OPTION} DIR with {split.file}."
        )
    return found


def _holds(folder: Path, split: Split) -> bool:
    return _prepared_file(split, folder).is_file() or find_file(split, folder).is_file()


def _prepared_row(place: str, fields: dict[str, object], *, task: Task) -> Row:
    wanted = {"instruction", "input", task.reference}
    if not wanted <= set(fields) or not all(isinstance(fields[name], str | int | float) for name in wanted):
        raise DataError(
            f"{place}: expected the fields {', '.join(sorted(wanted))}. Make it with scripts/prepare_data.py."
        )
    return {name: value for name, value in fields.items() if isinstance(value, str | int | float)}


def _check_count(rows: Sequence[Row], *, split: Split, where: str) -> None:
    if not rows:
        raise DataError(f"{where}: expected {split.rows} rows of {split.name}, got 0. {ADVICE}")
    if len(rows) != split.rows:
        logger.warning(
            "%s: %s of %s, the original has %d: scores on them cannot be compared with published ones",
            where, counted(len(rows), "row"), split.name, split.rows,
        )  # fmt: skip
