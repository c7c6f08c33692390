"""`crosslore_gradients: compact`, the default, through LLaMA-Factory's trainer."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from llamafactory.train.tuner import run_exp

pytestmark = pytest.mark.slow


@pytest.fixture
def notices() -> Iterator[list[str]]:
    """What LLaMA-Factory's log says about gradients."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("llamafactory.crosslore")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def train(config: dict, folder: Path, **changes: object) -> list[dict]:
    run_exp({**config, "output_dir": str(folder), "save_steps": 100, **changes})
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_compact_is_the_default_and_equals_full_gradients(
    accumulation: int, config: dict, tmp_path: Path, notices: list[str]
) -> None:
    options = {
        "max_grad_norm": 0.0, "lr_scheduler_type": "linear", "max_steps": 5, "crosslore_moments": "rotate",
        "gradient_accumulation_steps": accumulation,
    }  # fmt: skip
    full = train(config, tmp_path / "full", crosslore_gradients="full", **options)
    assert notices == []
    compact = train(config, tmp_path / "compact", **options)
    (line,) = notices
    assert line.startswith("Compact gradients: ") and line.endswith("of all entries; the others whole.")
    for ours, theirs in zip(compact, full, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["learning_rate"] == theirs["learning_rate"]
        assert 0 < ours["grad_norm"] <= theirs["grad_norm"] * (1 + 1e-5)  # of what is applied


def test_compact_layerwise_equals_compact_and_logs_the_same_norm(config: dict, tmp_path: Path) -> None:
    options = {"max_grad_norm": 0.0, "max_steps": 5, "crosslore_moments": "rotate"}
    compact = train(config, tmp_path / "compact", crosslore_gradients="compact", **options)
    ours = train(config, tmp_path / "ours", crosslore_gradients="compact-layerwise", **options)
    assert len(ours) == 5
    for one, other in zip(ours, compact, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("clip", ["weight", "stale-global"])
def test_compact_layerwise_clips_and_goes_on(clip: str, config: dict, tmp_path: Path) -> None:
    options = {"max_grad_norm": 0.01, "crosslore_clip": clip, "crosslore_gradients": "compact-layerwise"}
    options |= {"gradient_accumulation_steps": 2, "max_steps": 6, "save_steps": 3}
    whole = train(config, tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    again = train(config, tmp_path / "again", **options)
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in whole]


@pytest.mark.parametrize("steps", [3, 4])
def test_any_number_of_micro_batches(steps: int, config: dict, tmp_path: Path) -> None:
    """16 batches of 2 rows: with 3 micro-batches the last step of the epoch has one only."""
    options = {"num_train_epochs": 1.0, "max_steps": -1, "gradient_accumulation_steps": steps, "alpha": 32.0}
    log = train(config, tmp_path / "out", crosslore_gradients="compact", **options)
    assert len(log) == -(-16 // steps)
    assert all(entry["grad_norm"] > 0 for entry in log) and log[-1]["loss"] < log[0]["loss"]


def test_an_interrupted_run_goes_on_with_the_same_losses(config: dict, tmp_path: Path) -> None:
    options = {"crosslore_gradients": "compact", "gradient_accumulation_steps": 2, "max_steps": 6, "save_steps": 3}
    whole = train(config, tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    again = train(config, tmp_path / "again", **options)
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in whole]
    state = torch.load(tmp_path / "whole" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert len(state["state"]) == sum(len(group["params"]) for group in state["param_groups"])


def test_deferred_weights_train_and_are_saved_whole(config: dict, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    options = {"crosslore_gradients": "compact", "max_steps": 4, "crosslore_moments": "rotate", "learning_rate": 1e-2}
    logs, models = [], []
    for weights in ("direct", "deferred"):
        logs.append(train(config, tmp_path / weights, crosslore_weights=weights, **options))
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / weights, dtype=torch.float32))
    for ours, theirs in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert float((a - b).norm()) <= 1e-3 * float(a.norm())


def test_an_interrupted_deferred_run_goes_on_with_the_same_losses(config: dict, tmp_path: Path) -> None:
    options = {"crosslore_weights": "deferred", "max_steps": 6, "save_steps": 3}
    whole = train(config, tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    again = train(config, tmp_path / "again", **options)
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in whole]


def test_max_grad_norm_limits_the_global_norm(config: dict, tmp_path: Path) -> None:
    options = {"crosslore_gradients": "compact", "optim": "sgd", "max_steps": 3, "learning_rate": 1e-2}
    free, clipped = (train(config, tmp_path / str(norm), max_grad_norm=norm, **options) for norm in (0.0, 1e-3))
    assert free[0]["loss"] == clipped[0]["loss"] and free[-1]["loss"] < clipped[-1]["loss"]
    assert clipped[0]["grad_norm"] == pytest.approx(free[0]["grad_norm"])  # logged before clipping, as usual


def test_a_method_that_needs_the_gradient_keeps_it_and_says_why(
    config: dict, tmp_path: Path, notices: list[str]
) -> None:
    for key in ("rank", "alpha", "residual_ratio", "warmup_k", "crosslore_refresh_every"):
        del config[key]
    options = {"rank": 4, "crosslore_preset": "fira", "max_steps": 2}
    assert len(train(config, tmp_path / "out", **options)) == 2
    assert notices[0].startswith("Whole gradients: gradients must be 'full' or 'layerwise' for residual=")
    with pytest.raises(ValueError, match="crosslore_gradients must be 'full' or 'layerwise' for residual="):
        train(config, tmp_path / "asked", crosslore_gradients="compact", **options)


def test_several_processes_keep_whole_gradients_unless_compact_is_asked_for(
    config: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamafactory.hparams import get_train_args, parser

    monkeypatch.setattr("transformers.TrainingArguments.world_size", property(lambda self: 2))
    monkeypatch.setattr(parser, "is_torch_cuda_available", lambda: False, raising=False)
    with pytest.raises(ValueError, match="crosslore_gradients must be 'full' on 2 processes, got 'compact'"):
        get_train_args(config | {"crosslore_gradients": "compact"})
