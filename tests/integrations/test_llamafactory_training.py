"""Real training runs through LLaMA-Factory's command line, on a tiny random model."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from llamafactory.chat import ChatModel
from llamafactory.hparams import get_train_args
from llamafactory.train.tuner import export_model, run_exp
from safetensors.torch import load_file

from .conftest import BIN, losses, run, write_yaml

pytestmark = pytest.mark.slow
CLI = BIN / "llamafactory-cli"


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 8 steps through `llamafactory-cli train`."""
    folder = tmp_path_factory.mktemp("trained")
    result = run(CLI, "train", write_yaml(folder, training_config(tiny_model, tiny_data, folder / "out")))
    assert result.returncode == 0, result.stderr[-3000:]
    (folder / "log.txt").write_text(result.stdout + result.stderr, encoding="utf-8")
    return folder / "out"


def training_config(model: Path, data: Path, out: Path) -> dict:
    return {
        "model_name_or_path": str(model), "stage": "sft", "do_train": True, "finetuning_type": "crosslore",
        "rank": 4, "alpha": 8.0, "residual_ratio": 0.05, "warmup_k": 2, "crosslore_refresh_every": 3,
        "dataset": "count", "dataset_dir": str(data), "template": "chatml", "cutoff_len": 64, "output_dir": str(out),
        "per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_steps": 8, "logging_steps": 1, "save_steps": 4,
        "report_to": "none", "use_cpu": True, "overwrite_cache": True,
    }  # fmt: skip


def test_sft_trains_every_weight_and_lowers_the_loss(trained: Path, tiny_model: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, trained))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    values = [float(x) for x in losses(trained)]
    assert len(values) == 8 and values[-1] < values[0]


def test_logs_and_model_card_name_the_type(trained: Path) -> None:
    log = (trained.parent / "log.txt").read_text(encoding="utf-8")
    assert "Fine-tuning method: CrossLore" in log and "Fine-tuning method: Full" not in log
    assert "rank 4, scale 8.0" in log
    card = (trained / "README.md").read_text(encoding="utf-8")
    assert "- crosslore\n" in card and "- full\n" not in card


def test_the_checkpoint_is_read_with_weights_only(trained: Path) -> None:
    state = torch.load(trained / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert len(state["state"]) == sum(len(group["params"]) for group in state["param_groups"])


def test_a_killed_run_goes_on_with_the_same_losses(
    trained: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """SIGKILL after the first checkpoint; started again, the losses equal those of the uninterrupted run."""
    config = training_config(tiny_model, tiny_data, tmp_path / "out")
    path = write_yaml(tmp_path, config)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "killed.txt", "w") as log:
        process = subprocess.Popen([CLI, "train", path], stdout=log, stderr=log, env=env, start_new_session=True)
        # The trainer writes this file last, so the checkpoint is complete.
        last = tmp_path / "out" / "checkpoint-4" / "trainer_state.json"
        for _ in range(3000):
            if last.exists() or process.poll() is not None:
                break
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
    assert last.exists(), (tmp_path / "killed.txt").read_text()[-3000:]
    result = run(CLI, "train", path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Resuming training from" in result.stdout + result.stderr or process.returncode == 0
    assert losses(tmp_path / "out")[-4:] == losses(trained)[-4:]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_overwrite_output_dir_starts_afresh_as_for_full(config: dict, trained: Path, tiny_model: Path) -> None:
    config |= {"output_dir": str(trained)}
    assert get_train_args(dict(config))[2].resume_from_checkpoint.endswith("checkpoint-8")
    assert get_train_args(config | {"overwrite_output_dir": True})[2].resume_from_checkpoint is None


def test_export_and_chat_take_a_configuration_with_the_type(trained: Path, tmp_path: Path) -> None:
    args = {"model_name_or_path": str(trained), "template": "chatml", "finetuning_type": "crosslore", "rank": 4}
    export_model({**args, "export_dir": str(tmp_path / "exported"), "export_device": "cpu", "infer_dtype": "float32"})
    ours, theirs = load_file(tmp_path / "exported" / "model.safetensors"), load_file(trained / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    chat = ChatModel({**args, "infer_dtype": "float32", "max_new_tokens": 4, "do_sample": False})
    assert chat.chat([{"role": "user", "content": "Count to 3."}])[0].response_length == 4


def test_pretraining_trains_where_startup_files_are_not_allowed(
    config: dict, without_startup_files: dict, tmp_path: Path
) -> None:
    """The module form brings the hook itself."""
    config |= {"stage": "pt", "dataset": "texts", "max_steps": 3, "save_steps": 100}
    del config["template"]
    python, module = without_startup_files["PYTHON"], "crosslore.integrations.llamafactory"
    result = run(python, "-m", module, "train", write_yaml(tmp_path, config), **without_startup_files)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(losses(tmp_path / "out")) == 3
    assert "Fine-tuning method: CrossLore" in result.stdout + result.stderr


def test_two_processes_train_through_torchrun_without_startup_files(
    config: dict, without_startup_files: dict, tmp_path: Path
) -> None:
    config |= {"max_steps": 2, "save_steps": 100, "per_device_train_batch_size": 1}
    python, module = without_startup_files["PYTHON"], "crosslore.integrations.llamafactory"
    environment = {**without_startup_files, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    result = run(python, "-m", module, "train", write_yaml(tmp_path, config), **environment)
    text = result.stdout + result.stderr
    assert result.returncode == 0, text[-3000:]
    assert "world size: 2" in text and len(losses(tmp_path / "out")) == 2


@pytest.mark.parametrize("stage", ["pt", "sft", "rm", "ppo", "dpo", "kto"])
def test_every_stages_trainer_has_our_optimizer_function(stage: str) -> None:
    """They import it by name, so it must be in place before they do."""
    import importlib

    module = importlib.import_module(f"llamafactory.train.{stage}.trainer")
    assert module.create_custom_optimizer.__crosslore__


@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_preference_stages_train(stage: str, config: dict) -> None:
    config |= {"stage": stage, "dataset": "pairs", "max_steps": 2, "save_steps": 100, "pref_loss": "sigmoid"}
    run_exp(dict(config))
    state = json.loads((Path(config["output_dir"]) / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_a_data_file_that_is_not_there_is_named(config: dict, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"count": {"file_name": "absent.json"}}')
    with pytest.raises(ValueError, match=r"absent\.json"):
        run_exp(config | {"dataset_dir": str(tmp_path)})


def test_a_rank_above_a_layers_size_names_the_layer(config: dict) -> None:
    with pytest.raises(ValueError, match=r"k_proj: rank must be in \[1, 16\] for a 16 x 32 matrix, got 20"):
        run_exp(config | {"rank": 20})
