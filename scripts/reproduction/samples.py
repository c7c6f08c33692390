"""The rows that a profile trains on, tunes on and scores: the data sets themselves, samples of them, or bundled rows.

They are written in the layout of `scripts/prepare_data.py`: `<dataset>_train.jsonl`, `_dev` and `_test`, and the
`dataset_info.json` by which LLaMA-Factory finds them; `crosslore-eval run DATASET --data FOLDER` scores the test rows.
Samples are evenly spaced, so they are the same everywhere and for every method and seed.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import prepare_data

from crosslore_eval.tasks import TASKS
from crosslore_eval.tasks.base import Row, Task
from reproduction.cells import Experiment
from reproduction.profiles import Bundled, DatasetChoice, load_profiles
from reproduction.results import DataFile

T = TypeVar("T")
BUNDLED = Path(__file__).parents[2] / "data"
# The line that ends a solution, before its number.
ANSWER_MARK = "#### "


def prepare_profile_data(
    cells: Sequence[Experiment], source: Path | None, folder: Path
) -> dict[str, dict[str, DataFile]]:
    """Write the files that cells of one profile need, and return their sums and row counts.

    Args:
        cells: of one profile.
        source: folder with the data sets in the layout of `prepare_data.py --source`; None: the hub. Not read for
            bundled rows.
        folder: to write into; what is there is replaced, each file whole or not at all.

    Returns:
        By data set, the files "train", "test" and, where the profile tunes, "dev".

    Raises:
        DataError: if a data set is not there or is not the original; if `folder` cannot be written to.
        ValueError: if the cells are of several profiles.
    """
    names = sorted({cell.profile for cell in cells})
    if len(names) != 1:
        raise ValueError(f"cells must be of one profile, got {', '.join(names) or 'none'}. Prepare them one by one.")
    profile = load_profiles().profile(names[0])
    datasets = sorted({cell.dataset for cell in cells})
    prepared = {
        f"{dataset}_{part}": rows
        for dataset in datasets
        for part, rows in _parts(TASKS[dataset], profile.datasets[dataset], source).items()
    }
    prepare_data.write_all(prepared, folder)
    found: dict[str, dict[str, DataFile]] = {dataset: {} for dataset in datasets}
    for name, rows in prepared.items():
        dataset, _, part = name.rpartition("_")
        sha256 = hashlib.sha256((folder / f"{name}.jsonl").read_bytes()).hexdigest()
        found[dataset][part] = DataFile(sha256=sha256, rows=len(rows))
    return found


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """Return `count` of the items, the middles of as many equal stretches; all for 0 or if there are no more."""
    if not 0 < count < len(items):
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _parts(task: Task, choice: DatasetChoice, source: Path | None) -> dict[str, list[Row]]:
    if choice.bundled is not None:
        train, test = (_bundled_rows(task, choice.bundled, split=split) for split in ("train", "test"))
        return {"train": evenly_spaced(train, choice.train_rows), "test": _test_sample(task, test, choice.test_rows)}
    train, test = (_split_rows(task, split, source) for split in ("train", task.test_split))
    dev: list[Row] = []
    if choice.dev_split:
        dev_rows = train if choice.dev_split == "train" else _split_rows(task, choice.dev_split, source)
        dev = evenly_spaced(dev_rows, choice.dev_rows)
        # Rows that were taken from the train split, and those of MAWPS that are in both splits.
        held_out = {row["input"] for row in dev}
        train = [row for row in train if row["input"] not in held_out]
    return {
        "train": evenly_spaced(train, choice.train_rows),
        "test": _test_sample(task, test, choice.test_rows),
        **({"dev": dev} if dev else {}),
    }


def _split_rows(task: Task, name: str, source: Path | None) -> list[Row]:
    return prepare_data.prepare_split(task.split(name), task=task, source=source, allow_other=False)


def _test_sample(task: Task, rows: Sequence[Row], count: int) -> list[Row]:
    """Return all rows of evenly spaced examples: rows with the same input are references of one example."""
    if not task.groups_rows:
        return evenly_spaced(rows, count)
    chosen = set(evenly_spaced(list(dict.fromkeys(row["input"] for row in rows)), count))
    return [row for row in rows if row["input"] in chosen]


def _bundled_rows(task: Task, bundled: Bundled, *, split: str) -> list[Row]:
    """Return the rows of a bundled set that stand for a data set, with the fields that its grading needs."""
    stand_in = TASKS[bundled.file]
    rows = prepare_data.prepare_split(stand_in.split(split), task=stand_in, source=BUNDLED, allow_other=False)
    return [{**row, **_answer(task, row)} for row in _share(rows, bundled)]


def _share(rows: Iterable[Row], bundled: Bundled) -> list[Row]:
    return list(rows)[bundled.part - 1 :: bundled.parts]


def _answer(task: Task, row: Row) -> Row:
    solution = str(row["output"])
    if task.reference == "answer":
        return {"answer": solution}
    return {"ans": float(solution.rsplit(ANSWER_MARK, 1)[1])} if task.reference == "ans" else {}
