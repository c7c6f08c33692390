"""Turn GSM8K, MAWPS and E2E into LLaMA-Factory's alpaca format, with the `dataset_info.json` that names them.

    python scripts/prepare_data.py gsm8k e2e                 # from the Hugging Face hub into data/prepared
    python scripts/prepare_data.py --source DIR              # all three, from the files in a folder

The folder holds gsm8k/{train,test}.jsonl, mawps/{train,valid,test}.jsonl and e2e/{trainset,devset,testset_w_refs}.csv.
Everything is read and checked before anything is written.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from data_tasks import TASKS, Fields, Row, RowError, Split, Task, gsm8k_row, shown

REPO_ROOT = Path(__file__).resolve().parents[1]
DEFAULT_OUTPUT = REPO_ROOT / "data" / "prepared"
INFO_NAME = "dataset_info.json"
LAYOUT = ", ".join(split.file for task in TASKS.values() for split in task.splits)

ADVICE = "Correct it or take the original file."

# (where it is, for messages; its fields)
Located = tuple[str, Fields]


class DataError(ValueError):
    """The data cannot be prepared; the message says where, what was expected, and what to do."""


def warn(message: str) -> None:
    """Print a warning for the user."""
    print(f"warning: {message}", file=sys.stderr)


def progress(rows: Sequence[Located], *, name: str) -> Iterable[Located]:
    """Return the rows, counted by a progress bar where tqdm is installed and a terminal is there to show it."""
    try:
        from tqdm import tqdm
    except ImportError:
        return rows
    bar: Iterable[Located] = tqdm(rows, desc=name, unit=" rows", disable=None, leave=False)
    return bar


def read_jsonl(text: str, *, path: Path) -> Iterator[Located]:
    """Yield the objects of a text with one JSON object a line; empty lines are passed over."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: expected one JSON object a line, got: {error}. {ADVICE}") from error
        if not isinstance(fields, dict):
            raise DataError(f"{place}: expected a JSON object with named fields, got {shown(fields)}. {ADVICE}")
        yield place, fields


def read_csv(text: str, *, path: Path, columns: Iterable[str]) -> Iterator[Located]:
    """Yield the rows of a csv text whose first row names its columns; a quoted field may hold line breaks."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            place, start = f"{path}, line {start}", reader.line_num + 1
            if header is None:
                header = cells
                if not set(columns) <= set(header):
                    wanted = ", ".join(columns)
                    raise DataError(f"{place}: the first row must name the columns {wanted}, got {cells}. {ADVICE}")
            elif len(cells) not in (0, len(header)):
                wanted = f"{len(header)} fields ({', '.join(header)})"
                raise DataError(f"{place}: expected {wanted}, got {len(cells)}: {shown(cells)}. {ADVICE}")
            elif cells:
                yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: not a csv row: {error}. Close its quotation marks.") from error


def read_local(split: Split, *, task: Task, source: Path) -> tuple[list[Located], str]:
    """Return the rows of a local file and its sha256."""
    path = source / split.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}. --source must be a folder with these files: {LAYOUT}. "
            f"To prepare some of the data sets only, name them: {', '.join(TASKS)}."
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"{data[error.start]:#04x}"
        raise DataError(f"{path}, line {line}: expected UTF-8 text, got the byte {byte}. {ADVICE}") from error
    rows = read_csv(text, path=path, columns=task.fields) if path.suffix == ".csv" else read_jsonl(text, path=path)
    return list(rows), hashlib.sha256(data).hexdigest()


def read_hub(split: Split, *, task: Task) -> list[Located]:
    """Return the rows of a split on the Hugging Face hub, its fields named as in the files."""
    if task.hub is None:
        raise DataError(no_hub_message(split))
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"reading {task.hub.path} from the hub needs the package `datasets`, not installed for {sys.executable}. "
            'Install with: pip install "crosslore[llamafactory]", or give local files with --source DIR.'
        ) from error
    try:
        data = load_dataset(task.hub.path, task.hub.config, revision=task.hub.revision, split=split.hub_split)
    except Exception as error:  # no common class: hub, http and file system errors all come through here
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"cannot load {task.hub.path} (split {split.hub_split}) from the Hugging Face hub: "
            f"{type(error).__name__}: {reason}. Is the hub reachable from here? "
            f"If not, fetch the files elsewhere and give their folder with --source DIR; it must hold {LAYOUT}."
        ) from error
    place = f"{task.hub.path}, split {split.hub_split}, row"
    return [
        (f"{place} {i}", {name: row[column] for name, column in task.fields.items() if column in row})
        for i, row in enumerate(data)
    ]


def no_hub_message(split: Split) -> str:
    """Return what to do about a data set that no hub has."""
    name = split.file.split("/")[0]
    task = TASKS[name]
    counts = " / ".join(str(other.rows) for other in task.splits)
    return (
        f"{name} can only be read from local files, and --source is not given: no data set on the hub is known to hold "
        f"this split ({counts} rows). Give --source DIR with {', '.join(other.file for other in task.splits)}, one "
        f"JSON object a line with the fields {', '.join(task.fields)}; or name the others only: "
        f"{' '.join(other for other in TASKS if TASKS[other].hub)}."
    )


def check_rows(rows: Sequence[Located], *, split: Split, where: str, sha256: str | None, allow_other: bool) -> None:
    """Raise `DataError` unless these are the rows of the original file: by its sha256, else by their number.

    Args:
        rows: what was read.
        split: what the original holds.
        where: file or hub path, for messages.
        sha256: of the file; None for the hub, whose files are others.
        allow_other: warn only.
    """
    if sha256 == split.sha256:
        return
    if len(rows) != split.rows or not rows:
        message = f"{where}: expected {split.rows} rows, got {len(rows)}"
        if not allow_other or not rows:
            raise DataError(f"{message}. Take the original file, or allow other rows with --allow-other-rows.")
        warn(f"{message}: scores on them cannot be compared with published ones")
    elif sha256 is not None:
        warn(f"{where}: {split.rows} rows as expected, but not the original file (sha256 {sha256})")


def prepare_split(split: Split, *, task: Task, source: Path | None, allow_other: bool) -> list[Row]:
    """Return the examples of one split, read, checked and converted."""
    if source is None:
        located, sha256, where = read_hub(split, task=task), None, f"{split.name} from the hub"
    else:
        (located, sha256), where = read_local(split, task=task, source=source), str(source / split.file)
    rows = []
    for place, fields in progress(located, name=split.name):
        try:
            rows.append(task.convert(fields))
        except RowError as error:
            raise DataError(f"{place}: {error}. {ADVICE}") from error
    check_rows(located, split=split, where=where, sha256=sha256, allow_other=allow_other)
    return rows


def existing_info(output: Path) -> dict[str, Any]:  # Any: LLaMA-Factory's entries, kept as they are
    """Return the entries of the `dataset_info.json` that `output` may already have."""
    path = output / INFO_NAME
    if not path.exists():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}. Move it away or choose another --output.") from error
    if not isinstance(info, dict):
        raise DataError(f"{path}: expected a JSON object, got {shown(info)}. Move it away.")
    return info


def write_all(prepared: dict[str, list[Row]], output: Path) -> None:
    """Write one file for each name and add the names to `dataset_info.json`, every file complete or not at all."""
    info = existing_info(output) | {name: {"file_name": f"{name}.jsonl"} for name in prepared}
    texts = {f"{name}.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows) for name, rows in prepared.items()}
    texts[INFO_NAME] = json.dumps(info, indent=2) + "\n"
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".prepare-", dir=output) as partial_folder:
            for name, text in texts.items():
                (Path(partial_folder) / name).write_text(text, encoding="utf-8", newline="")
            for name in texts:  # dataset_info.json last: it never names a file that is not there
                os.replace(Path(partial_folder) / name, output / name)
    except OSError as error:
        raise DataError(f"cannot write to {output}: {error}. Choose another folder with --output.") from error


def chosen_tasks(names: Sequence[str], *, keep_annotations: bool) -> dict[str, Task]:
    """Return the named tasks, all for no name."""
    for name in names:
        if name not in TASKS:
            near = get_close_matches(name, TASKS, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"unknown data set {name!r}.{hint} Known: {', '.join(TASKS)}.")
    tasks = {name: TASKS[name] for name in names or TASKS}
    if keep_annotations and "gsm8k" in tasks:
        tasks["gsm8k"] = replace(tasks["gsm8k"], convert=partial(gsm8k_row, keep_annotations=True))
    return tasks


def prepare(args: argparse.Namespace) -> dict[str, list[Row]]:
    """Return the examples of all splits that the command line asks for, after writing them."""
    tasks = chosen_tasks(args.tasks, keep_annotations=args.keep_annotations)
    existing_info(args.output)  # a broken one is found before the long part
    for name, task in list(tasks.items()):
        if args.source is None and task.hub is None:
            if args.tasks:
                raise DataError(no_hub_message(task.splits[0]))
            print(f"left out: {no_hub_message(task.splits[0])}", file=sys.stderr)  # nobody asked for it by name
            del tasks[name]
    prepared = {
        split.name: prepare_split(split, task=task, source=args.source, allow_other=args.allow_other_rows)
        for task in tasks.values()
        for split in task.splits
    }
    write_all(prepared, args.output)
    return prepared


def report(prepared: dict[str, list[Row]], output: Path) -> None:
    """Print what was written and what to do next."""
    print(f"{output}:")
    for name, rows in prepared.items():
        print(f"  {name}.jsonl  {len(rows)} rows")
    folder = "" if output.resolve() == DEFAULT_OUTPUT else f" dataset_dir={output}"
    task = next(iter(prepared)).split("_")[0]
    print(f"Next: llamafactory-cli train yaml_configs/crosslore_{task}.yaml{folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(description="Prepare GSM8K, MAWPS and E2E for LLaMA-Factory.")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"{', '.join(TASKS)} (default: all that can be had)")
    parser.add_argument("--source", type=Path, metavar="DIR", help="folder with the files (default: from the hub)")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--keep-annotations", action="store_true", help="keep GSM8K's <<48/2=24>> annotations")
    parser.add_argument("--allow-other-rows", action="store_true", help="warn about other row counts, do not stop")
    args = parser.parse_args(argv)
    try:
        report(prepare(args), args.output)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
