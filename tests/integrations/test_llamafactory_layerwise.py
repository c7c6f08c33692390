"""`crosslore_gradients: layerwise`, the other presets and the other rules, through LLaMA-Factory's trainer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from llamafactory.train.tuner import run_exp

from crosslore import PRESETS

pytestmark = pytest.mark.slow


def log_of(folder: Path) -> list[dict]:
    """What the trainer logged at each step."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry for entry in history if "loss" in entry]


def train(config: dict, folder: Path, **changes: object) -> list[dict]:
    run_exp({**config, "output_dir": str(folder), "save_steps": 100, **changes})
    return log_of(folder)


def test_layerwise_without_accumulation_equals_full_gradients(config: dict, tmp_path: Path) -> None:
    """Losses, the decaying learning rate and the gradient norm are those of the whole step."""
    options = {"max_grad_norm": 0.0, "lr_scheduler_type": "linear", "max_steps": 5}
    full = train(config, tmp_path / "full", crosslore_gradients="full", **options)
    layerwise = train(config, tmp_path / "layerwise", crosslore_gradients="layerwise", **options)
    for ours, theirs in zip(layerwise, full, strict=True):
        assert ours["loss"] == theirs["loss"] and ours["learning_rate"] == theirs["learning_rate"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4) and ours["grad_norm"] > 0


@pytest.mark.parametrize("steps", [3, 4])
def test_layerwise_accumulates_any_number_of_micro_batches(steps: int, config: dict, tmp_path: Path) -> None:
    """16 batches of 2 rows: with 3 micro-batches the last step of the epoch has one only."""
    options = {"num_train_epochs": 1.0, "max_steps": -1, "gradient_accumulation_steps": steps, "alpha": 32.0}
    log = train(config, tmp_path / "out", crosslore_gradients="layerwise", **options)
    assert len(log) == -(-16 // steps)
    assert all(entry["grad_norm"] > 0 for entry in log) and log[-1]["loss"] < log[0]["loss"]


def test_an_interrupted_layerwise_run_goes_on_with_the_same_losses(config: dict, tmp_path: Path) -> None:
    options = {"crosslore_gradients": "layerwise", "gradient_accumulation_steps": 2, "max_steps": 6, "save_steps": 3}
    whole = train(config, tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    again = train(config, tmp_path / "again", **options)
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in whole]
    state = torch.load(tmp_path / "whole" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert len(state["state"]) == sum(len(group["params"]) for group in state["param_groups"])


@pytest.mark.parametrize("clip", ["weight", "stale-global"])
def test_layerwise_clips(clip: str, config: dict, tmp_path: Path) -> None:
    options = {"crosslore_gradients": "layerwise", "crosslore_clip": clip, "optim": "sgd", "max_steps": 3}
    free, clipped = (
        train(config, tmp_path / str(norm), max_grad_norm=norm, learning_rate=1e-2, **options) for norm in (0.0, 1e-3)
    )
    assert free[0]["loss"] == clipped[0]["loss"] and free[-1]["loss"] < clipped[-1]["loss"]


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"crosslore"}))
def test_every_preset_trains(preset: str, config: dict, tmp_path: Path) -> None:
    for key in ("rank", "alpha", "residual_ratio", "warmup_k", "crosslore_refresh_every"):
        del config[key]
    options = {"rank": 1 if preset == "apollo_mini" else 4, "crosslore_preset": preset}
    log = train(config, tmp_path / "out", max_steps=3, **options)
    assert len(log) == 3 and log[-1]["loss"] != log[0]["loss"]


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "adafactor", "adagrad", "sgd"])
def test_every_optim_trains(optim: str, config: dict, tmp_path: Path) -> None:
    log = train(config, tmp_path / "out", optim=optim, max_steps=3)
    assert len(log) == 3 and log[-1]["loss"] != log[0]["loss"]


def test_layerwise_on_several_processes_is_refused_before_anything_is_loaded(
    config: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamafactory.hparams import get_train_args, parser

    monkeypatch.setattr("transformers.TrainingArguments.world_size", property(lambda self: 2))
    monkeypatch.setattr(parser, "is_torch_cuda_available", lambda: False, raising=False)
    with pytest.raises(ValueError, match="crosslore_gradients must be 'full' on 2 processes, got 'layerwise'"):
        get_train_args(config | {"crosslore_gradients": "layerwise"})
