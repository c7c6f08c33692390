"""What docs/reproduction.md says of cells, hours, steps and data is what the code and the data have."""

import json
import os
import re
from pathlib import Path

import pytest
from reproduction.costs import estimated_seconds, training_steps
from reproduction.experiments import experiments
from reproduction.needs import COPIES, HUB_BYTES
from reproduction.samples import prepare_profile_data

TEXT = (Path(__file__).parents[2] / "docs" / "reproduction.md").read_text(encoding="utf-8")
DATA = os.environ.get("CROSSLORE_DATA_DIR")
needs_data = pytest.mark.skipif(not DATA, reason="needs CROSSLORE_DATA_DIR with mawps/")


@pytest.mark.parametrize(
    ("line", "targets"),
    [
        ("table 1, table 5", ["table1", "table5"]), ("table 2, table 7", ["table2", "table7"]),
        (r"table 6 \(13B\)", ["table6"]), (r"table 8 \(13B\)", ["table8"]), ("table 9", ["table9"]),
        (r"table 10, figures 3 and 4 \(4 seeds\)", ["table10"]), ("ablations", ["ablations"]),
    ],
)  # fmt: skip
def test_cells_and_hours_of_the_paper_are_those_of_the_plan(line: str, targets: list[str]) -> None:
    (found,) = re.findall(rf"^\| {line} \| (\d+)(?: each)? \| (\d+)(?: each)? \|$", TEXT, re.M)
    for target in targets:
        cells = experiments(target, profile="paper")
        hours = sum(map(estimated_seconds, cells)) / 3600
        assert len(cells) == int(found[0]) and hours == pytest.approx(int(found[1]), abs=0.51)


def test_steps_of_the_small_profile_are_said() -> None:
    steps = {cell.dataset: training_steps(cell) for cell in [*experiments("table1", profile="small"),
                                                             *experiments("table2", profile="small")]}  # fmt: skip
    assert steps == {"gsm8k": 75, "mawps": 100, "e2e": 100} and "100 steps of batch 2 (75 on GSM8K)" in TEXT
    (tuning,) = {training_steps(cell) for cell in experiments("tuning", profile="small")}
    assert f"first trained for {tuning} steps" in TEXT


def test_disk_is_said() -> None:
    seven, thirteen = (round(COPIES * HUB_BYTES[name] / 1e9) for name in ("llama2-7b", "llama2-13b"))
    assert f"Disk: {seven} GB at a time for a 7B model" in TEXT and f", {thirteen} for 13B;" in TEXT


@needs_data
def test_questions_that_mawps_has_in_both_splits_are_counted(tmp_path: Path) -> None:
    for profile, count in (("paper", 26), ("small", 15)):
        cells = [cell for cell in experiments("table1", profile=profile) if cell.dataset == "mawps"]
        prepare_profile_data(cells, Path(str(DATA)), tmp_path)
        splits = [
            [json.loads(line)["input"].strip().lower() for line in (tmp_path / f"mawps_{part}.jsonl").open("rb")]
            for part in ("train", "test")
        ]
        assert sum(question in set(splits[0]) for question in splits[1]) == count
    assert "26 of the 238 test questions" in TEXT and "(15 in that of profile `small`)" in TEXT
