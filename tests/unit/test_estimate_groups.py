"""`crosslore.estimate.at_once`: the groups are those of the code that steps."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from crosslore import create_optimizer
from crosslore.compact import rows
from crosslore.estimate import at_once

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of a hundred entries."""
    for limits in (at_once.READY, at_once.AT_ONCE):
        monkeypatch.setitem(limits, "cpu", 100)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("entries", "most", "left"),
    [([60, 30], 90, 90), ([60, 60, 60], 120, 60), ([100, 10], 100, 10), ([30, 250, 20, 90], 280, 0), ([], 0, 0)],
)
def test_compact_gradients_wait_until_there_are_enough(entries: list[int], most: int, left: int) -> None:
    assert at_once.waiting_compact(entries, "cpu") == (most, left)
    assert at_once.waiting_compact(entries, "cpu", sizes=[4 * n for n in entries]) == (4 * most, 4 * left)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("entries", "group"),
    [([60, 30], 90), ([60, 60], 60), ([60, 40, 90, 5], 100), ([30, 250, 20], 250), ([], 0)],
)
def test_one_group_of_updates_is_alive_at_a_time(entries: list[int], group: int) -> None:
    assert at_once.updates_together(entries, "cpu") == group


@pytest.mark.parametrize("shape", [(32000, 64), (300, 64), (5000, 4096), (400, 1 << 20)])
def test_rows_are_those_of_the_code_that_steps(shape: tuple[int, int]) -> None:
    weight = torch.empty(1, 1).expand(shape)
    formed = next(rows.chunks(weight))
    assert at_once.row_entries(weight, "cpu") == (formed.stop - formed.start) * shape[1]


def test_embeddings_and_heads_come_in_rows_where_one_micro_batch_is_a_step() -> None:
    for mode, accumulation, expected in (("compact-layerwise", 1, 2), ("compact-layerwise", 2, 0), ("compact", 1, 0)):
        model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 50, bias=False))
        optimizer = create_optimizer(
            model, "crosslore_plus", lr=1e-3, rank=4, gradients=mode, accumulation_steps=accumulation, targets=["1"]
        )
        assert len(at_once.in_rows(optimizer)) == expected


def test_estimates_are_close_to_the_peaks_that_a_gpu_has_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the committed measurement; what the committed comparison says is what this code says."""
    pytest.importorskip("transformers", reason='needs transformers: pip install "crosslore[estimate]"')
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = importlib.import_module("estimate_gpu")
    rows = script.compared(json.loads(script.MEASURED.read_text(encoding="utf-8")))
    assert all(row in rows for row in json.loads(script.OUTPUT.read_text(encoding="utf-8")))
    assert {"LoRA", "DoRA", "AdamW8bit", "crosslore compact-layerwise"} <= {row["method"] for row in rows}
    assert all(abs(row["difference_percent"]) < 5 for row in rows)
