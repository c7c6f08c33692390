"""A run goes on from its last whole checkpoint; one whose saving was interrupted is passed over."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from llamafactory.hparams import get_train_args
from llamafactory.train.tuner import run_exp
from transformers.trainer_callback import TrainerState

from crosslore.integrations.llamafactory.resume import checkpoints, skip_incomplete_checkpoints


def checkpoint(folder: Path, step: int, *, whole: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").touch()
    if whole:
        TrainerState(global_step=step).save_to_json(str(path / "trainer_state.json"))
    return path


def resumed(config: dict) -> str | None:
    return get_train_args(config)[2].resume_from_checkpoint


def test_the_last_whole_checkpoint_is_taken(config: dict, caplog: pytest.LogCaptureFixture) -> None:
    out = Path(config["output_dir"])
    checkpoint(out, 4)
    checkpoint(out, 8)
    broken = checkpoint(out, 12, whole=False)
    with caplog.at_level(logging.WARNING):
        assert resumed(config) == str(out / "checkpoint-8")
    assert f"The saving of {broken} was interrupted" in caplog.text
    assert resumed(config | {"resume_from_checkpoint": True}) == str(out / "checkpoint-8")


def test_a_state_that_was_cut_off_is_no_whole_checkpoint(config: dict) -> None:
    out = Path(config["output_dir"])
    checkpoint(out, 4)
    cut = checkpoint(out, 8) / "trainer_state.json"
    cut.write_text(cut.read_text(encoding="utf-8")[:40], encoding="utf-8")
    assert resumed(config) == str(out / "checkpoint-4")


def test_a_state_with_keys_of_another_transformers_is_whole(config: dict) -> None:
    last = checkpoint(Path(config["output_dir"]), 8)
    (last / "trainer_state.json").write_text('{"global_step": 8, "a_newer_key": 1}', encoding="utf-8")
    assert resumed(config) == str(last)


def test_several_processes_do_not_choose_each_for_itself(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 8, whole=False)
    training = SimpleNamespace(
        do_train=True, resume_from_checkpoint=None, output_dir=str(tmp_path), overwrite_output_dir=False, world_size=2
    )
    with pytest.raises(ValueError, match="the saving of .*checkpoint-8 was interrupted .*2 processes cannot agree"):
        skip_incomplete_checkpoints(training, "sft")
    assert training.resume_from_checkpoint is None


def test_without_a_whole_checkpoint_the_run_begins_anew(config: dict, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint(Path(config["output_dir"]), 4, whole=False)
    with caplog.at_level(logging.WARNING):
        assert resumed(config) is None
    assert "goes on from the beginning" in caplog.text


def test_whole_checkpoints_are_left_to_llamafactory(config: dict, caplog: pytest.LogCaptureFixture) -> None:
    out = Path(config["output_dir"])
    checkpoint(out, 4, whole=False)
    checkpoint(out, 8)
    assert resumed(config) == str(out / "checkpoint-8")
    assert "interrupted" not in caplog.text
    assert resumed(config | {"overwrite_output_dir": True}) is None


def test_a_broken_checkpoint_that_is_asked_for_is_refused(config: dict) -> None:
    broken = checkpoint(Path(config["output_dir"]), 4, whole=False)
    with pytest.raises(
        ValueError, match="resume_from_checkpoint must be a whole checkpoint, and .*checkpoint-4 has no"
    ):
        get_train_args(config | {"resume_from_checkpoint": str(broken)})


def test_other_types_are_left_alone(config: dict) -> None:
    broken = checkpoint(Path(config["output_dir"]), 4, whole=False)
    for name in ("rank", "alpha", "residual_ratio", "warmup_k", "crosslore_refresh_every"):
        del config[name]
    assert resumed(config | {"finetuning_type": "full"}) == str(broken)


def test_checkpoints_are_counted_by_number(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]


def test_a_run_whose_saving_was_interrupted_ends_as_one_that_was_not(config: dict) -> None:
    out = Path(config["output_dir"])
    run_exp(dict(config))
    whole = (out / "model.safetensors").read_bytes()
    (out / "checkpoint-8" / "trainer_state.json").unlink()  # as a kill in the middle of saving leaves it
    for name in ("model.safetensors", "trainer_state.json"):
        (out / name).unlink()
    run_exp(dict(config))
    assert (out / "model.safetensors").read_bytes() == whole
    shutil.rmtree(out / "checkpoint-4")
    (out / "checkpoint-8" / "trainer_state.json").unlink()
    run_exp(dict(config))
    assert (out / "model.safetensors").read_bytes() == whole
