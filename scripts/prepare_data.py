"""Turn the tasks' data sets into LLaMA-Factory's alpaca format, with the `dataset_info.json` that names them.

    python scripts/prepare_data.py gsm8k e2e                 # from the Hugging Face hub into data/prepared
    python scripts/prepare_data.py --source DIR              # GSM8K, MAWPS and E2E, from the files in a folder
    python scripts/prepare_data.py cnn_dm xsum --source DIR --allow-other-rows    # samples of these

The folder holds gsm8k/{train,test}.jsonl, mawps/{train,valid,test}.jsonl and e2e/{trainset,devset,testset_w_refs}.csv;
cnn_dm/ and xsum/ {train,validation,test}.jsonl, .gz too. Everything is read and checked before anything is written.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from crosslore_eval.tasks import TASKS as ALL_TASKS
from crosslore_eval.tasks.base import Row, Split, Task, shown
from crosslore_eval.tasks.files import DataError, Located
from crosslore_eval.tasks.gsm8k import gsm8k_row
from crosslore_eval.tasks.loading import convert, find_file, layout_of, no_hub_message, read_hub, read_local

REPO_ROOT = Path(__file__).resolve().parents[1]
DEFAULT_OUTPUT = REPO_ROOT / "data" / "prepared"
INFO_NAME = "dataset_info.json"
TASKS = {name: ALL_TASKS[name] for name in ("gsm8k", "mawps", "e2e", "cnn_dm", "xsum")}
# What is prepared when nothing is named: small, and every file known by its sum.
DEFAULT_TASKS = ("gsm8k", "mawps", "e2e")
LAYOUT = layout_of(TASKS[name] for name in DEFAULT_TASKS)


def warn(message: str) -> None:
    """Print a warning for the user."""
    print(f"warning: {message}", file=sys.stderr)


def check_rows(rows: Sequence[Located], *, split: Split, where: str, sha256: str | None, allow_other: bool) -> None:
    """Raise `DataError` unless these are the rows of the original file: by its sha256, else by their number.

    Args:
        rows: what was read.
        split: what the original holds.
        where: file or hub path, for messages.
        sha256: of the file; None for the hub, whose files are others.
        allow_other: warn only.
    """
    if split.sha256 is not None and sha256 == split.sha256:
        return
    if len(rows) != split.rows or not rows:
        message = f"{where}: expected {split.rows} rows, got {len(rows)}"
        if not allow_other or not rows:
            raise DataError(f"{message}. Take the original file, or allow other rows with --allow-other-rows.")
        warn(f"{message}: scores on them cannot be compared with published ones")
    elif sha256 is not None and split.sha256 is not None:
        warn(f"{where}: {split.rows} rows as expected, but not the original file (sha256 {sha256})")


def prepare_split(split: Split, *, task: Task, source: Path | None, allow_other: bool) -> list[Row]:
    """Return the examples of one split, read, checked and converted."""
    if source is None:
        located, sha256, where = read_hub(split, task=task, option="--source"), None, f"{split.name} from the hub"
    else:
        layout = LAYOUT if task.name in DEFAULT_TASKS else layout_of([task])
        advice = (
            f"--source must be a folder with these files: {layout}. "
            f"To prepare some of the data sets only, name them: {', '.join(TASKS)}."
        )
        located, sha256 = read_local(split, task=task, folder=source, advice=advice)
        where = str(find_file(split, source))
    rows = convert(located, task=task, name=split.name)
    check_rows(located, split=split, where=where, sha256=sha256, allow_other=allow_other)
    return rows


def wanted_splits(task: Task, *, source: Path | None, allow_other: bool) -> list[Split]:
    """Return the splits to prepare: of a task known by samples only, those that are there."""
    if source is None or not allow_other or any(split.sha256 for split in task.splits):
        return list(task.splits)
    there = [split for split in task.splits if find_file(split, source).is_file()]
    for split in task.splits:
        if split not in there:
            print(f"left out: {source / split.file} is not there", file=sys.stderr)
    return there or list(task.splits)


def mawps_advice(task: Task) -> str:
    """Return what to do about a data set that no hub has, and which others can be had."""
    others = " ".join(name for name in DEFAULT_TASKS if TASKS[name].hub)
    return f"{no_hub_message(task, option='--source')}; or name the others only: {others}."


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
    """Return the named tasks, the default ones for no name."""
    for name in names:
        if name not in TASKS:
            near = get_close_matches(name, TASKS, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"unknown data set {name!r}.{hint} Known: {', '.join(TASKS)}.")
    tasks = {name: TASKS[name] for name in names or DEFAULT_TASKS}
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
                raise DataError(mawps_advice(task))
            print(f"left out: {mawps_advice(task)}", file=sys.stderr)  # nobody asked for it by name
            del tasks[name]
    prepared = {
        split.name: prepare_split(split, task=task, source=args.source, allow_other=args.allow_other_rows)
        for task in tasks.values()
        for split in wanted_splits(task, source=args.source, allow_other=args.allow_other_rows)
    }
    write_all(prepared, args.output)
    return prepared


def report(prepared: dict[str, list[Row]], output: Path) -> None:
    """Print what was written and what to do next."""
    print(f"{output}:")
    for name, rows in prepared.items():
        print(f"  {name}.jsonl  {len(rows)} rows")
    folder = "" if output.resolve() == DEFAULT_OUTPUT else f" dataset_dir={output}"
    task = next(iter(prepared)).rpartition("_")[0]
    if (REPO_ROOT / "yaml_configs" / f"crosslore_{task}.yaml").is_file():
        print(f"Next: llamafactory-cli train yaml_configs/crosslore_{task}.yaml{folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(description="Prepare data sets for LLaMA-Factory.")
    parser.add_argument(
        "tasks", nargs="*", metavar="TASK", help=f"{', '.join(TASKS)} (default: {', '.join(DEFAULT_TASKS)})"
    )
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
