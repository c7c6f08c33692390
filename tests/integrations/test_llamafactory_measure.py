"""CROSSLORE_MEASURE: what a run took, on tiny random models; seconds are checked on a clock that the tests move."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from crosslore.integrations import measure
from crosslore.integrations.llamafactory import hooks
from crosslore.integrations.measure import MeasureCallback

from .conftest import BIN, run, write_yaml

PAD = 0


class Clock:
    """Seconds that only the tests let pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: found.now)
    monkeypatch.setattr(measure.time, "process_time", lambda: found.now / 2)
    return found


class Rows(torch.utils.data.Dataset):
    """Rows of 6 tokens and 2 of padding; to load one takes 100 seconds."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        self.clock.advance(100.0)
        ids = [index + 1 for _ in range(6)] + [PAD, PAD]
        return {"input_ids": ids, "labels": ids, "attention_mask": [1] * 6 + [0] * 2}


class At(TrainerCallback):
    """Calls a function at an event of a step."""

    def __init__(self, event: str, step: int | None, call: Callable[[], None]) -> None:
        def at(args, state, control, **kwargs):  # noqa: ANN001
            if step in (None, state.global_step):
                call()

        setattr(self, event, at)


def interrupt() -> None:
    raise KeyboardInterrupt


def trainer(folder: Path, clock: Clock, *callbacks: TrainerCallback, **options: object) -> Trainer:
    """Two rows a step in two micro-batches, 8 steps, a checkpoint every 4; a forward takes 1 second, 1000 otherwise."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    model = LlamaForCausalLM(config)
    model.register_forward_pre_hook(lambda m, _: clock.advance(1.0 if m.training else 1000.0))
    chosen = {
        "max_steps": 8, "save_steps": 4, "eval_steps": 4, "eval_strategy": "steps", "logging_steps": 1, **options,
    }  # fmt: skip
    arguments = TrainingArguments(
        str(folder / "out"), per_device_train_batch_size=1, gradient_accumulation_steps=2, report_to="none",
        use_cpu=True, disable_tqdm=True, **chosen,
    )  # fmt: skip
    rows = Rows(clock)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_seconds_are_those_of_steps_without_loading_evaluation_and_saving(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "new" / "measure.json"
    slow_save = At("on_save", None, lambda: clock.advance(5000.0))
    run = trainer(tmp_path, clock, slow_save, MeasureCallback(file))
    run.train()
    found = read(file)
    assert (found["train_seconds"], found["steps"], found["interrupted_seconds_before"]) == (16.0, 8, 0.0)
    assert found["cpu_seconds"] == 8.0 and found["tokens"] == 8 * 2 * 6
    logged = [[row["step"], row["loss"]] for row in run.state.log_history if "loss" in row]
    assert found["losses"] == logged and len(logged) == 8
    assert (found["loss_first"], found["loss_last"]) == (logged[0][1], logged[-1][1])
    assert found["eval_loss"] == [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row][-1]
    assert found["trainable_parameters"] == sum(p.numel() for p in run.model.parameters())
    assert found["device"]["kind"] == "cpu" and found["device"]["name"] and found["processes"] == 1


@pytest.mark.parametrize("event", ["on_step_end", "on_save"])
def test_a_resumed_run_reports_the_sum_of_the_steps_that_count(tmp_path: Path, clock: Clock, event: str) -> None:
    """Interrupted right after its checkpoint of step 4 (before callbacks hear of it), or two steps after."""
    step = {"on_step_end": 6, "on_save": 4}[event]
    file = tmp_path / "measure.json"
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, clock, At(event, step, interrupt), MeasureCallback(file)).train()
    assert not file.exists()
    again = trainer(tmp_path, clock, MeasureCallback(file))
    again.train(resume_from_checkpoint=True)
    found = read(file)
    assert (found["train_seconds"], found["interrupted_seconds_before"], found["steps"]) == (16.0, 8.0, 8)
    assert (
        found["cpu_seconds"] == 8.0
        and found["tokens"] == 8 * 2 * 6
        and [step for step, _ in found["losses"]] == list(range(1, 9))
    )


def test_a_run_resumed_twice_from_one_checkpoint_counts_no_step_twice(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "measure.json"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path, clock, At("on_step_end", 7, interrupt), MeasureCallback(file)).train(
                resume_from_checkpoint=(tmp_path / "out" / "checkpoint-4").is_dir()
            )
    trainer(tmp_path, clock, MeasureCallback(file)).train(resume_from_checkpoint=True)
    assert (read(file)["train_seconds"], read(file)["interrupted_seconds_before"]) == (16.0, 8.0)


def test_peaks_of_an_earlier_part_count(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"rss_gib": 9.0, "rss_above_loaded_gib": 0.5}
    monkeypatch.setattr(measure.Peak, "read", lambda self: dict(peaks))
    file = tmp_path / "measure.json"
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, clock, At("on_step_end", 6, interrupt), MeasureCallback(file)).train()
    peaks |= {"rss_gib": 8.0, "rss_above_loaded_gib": 0.75}
    trainer(tmp_path, clock, MeasureCallback(file)).train(resume_from_checkpoint=True)
    assert read(file)["peak"] == {"rss_gib": 9.0, "rss_above_loaded_gib": 0.75}


@pytest.mark.parametrize("lost", ["deleted", "of another run", "not written whole"])
def test_an_earlier_part_that_was_not_measured_is_null_and_named(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, lost: str
) -> None:
    file, part = tmp_path / "measure.json", tmp_path / "measure.json.part"
    trainer(tmp_path, clock, MeasureCallback(file), max_steps=4).train()
    if lost == "deleted":
        part.unlink()
    elif lost == "of another run":
        part.write_text(json.dumps(read(part) | {"output_dir": str(tmp_path / "another")}), encoding="utf-8")
    else:
        part.write_text(part.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger=measure.__name__):
        trainer(tmp_path, clock, MeasureCallback(file)).train(resume_from_checkpoint=True)
    found = read(file)
    assert (found["train_seconds"], found["interrupted_seconds_before"], found["steps"]) == (8.0, None, 4)
    assert found["tokens"] is None and found["cpu_seconds"] is None
    assert "does not say what the run" in caplog.text and "step 4" in caplog.text


def test_a_fresh_run_forgets_the_files_of_the_one_before(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "measure.json"
    trainer(tmp_path, clock, MeasureCallback(file)).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, clock, At("on_step_end", 1, interrupt), MeasureCallback(file)).train()
    assert not file.exists() and not file.with_name("measure.json.part").exists()


def test_an_evaluation_after_training_is_added(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "measure.json"
    run = trainer(tmp_path, clock, MeasureCallback(file), eval_strategy="no")
    run.train()
    assert read(file)["eval_loss"] is None
    loss = run.evaluate()["eval_loss"]
    assert read(file)["eval_loss"] == loss and read(file)["train_seconds"] == 16.0


def test_a_loss_that_is_no_number_is_null(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "measure.json"
    run = trainer(tmp_path, clock, MeasureCallback(file), logging_nan_inf_filter=False, eval_strategy="no")
    with torch.no_grad():
        run.model.lm_head.weight.fill_(float("nan"))
    run.train()
    assert "NaN" not in file.read_text(encoding="utf-8") and read(file)["loss_last"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_the_peak_is_above_what_was_loaded_by_what_a_step_holds(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "measure.json"
    at_once = At("on_pre_optimizer_step", 2, lambda: torch.ones(64, 1024, 1024).sum())
    before = torch.ones(128, 1024, 1024)  # 0.5 GiB that are gone when training begins
    del before
    trainer(tmp_path, clock, at_once, MeasureCallback(file), save_steps=100).train()
    peak = read(file)["peak"]
    assert set(peak) == {"rss_gib", "rss_above_loaded_gib"}
    assert 0.2 < peak["rss_above_loaded_gib"] < 0.45 and peak["rss_gib"] > peak["rss_above_loaded_gib"]


def test_only_the_first_process_writes(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "measure.json"
    callback = MeasureCallback(file)
    run = trainer(tmp_path, clock)
    run.state.is_world_process_zero = False
    for event in ("on_train_begin", "on_step_begin", "on_step_end", "on_save", "on_train_end", "on_evaluate"):
        getattr(callback, event)(run.args, run.state, run.control, model=run.model)
    assert callback.steps == 1 and list(tmp_path.glob("measure*")) == []


def test_a_file_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "measure.json", tmp_path):
        with pytest.raises(
            ValueError, match="path or CROSSLORE_MEASURE must be a file in a folder that can be written to"
        ):
            MeasureCallback(path)


def test_a_folder_lost_during_training_is_one_error_and_costs_no_model(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "gone" / "measure.json"
    gone = At("on_train_end", None, lambda: shutil.rmtree(file.parent))
    run = trainer(tmp_path, clock, gone, MeasureCallback(file))
    with caplog.at_level(logging.ERROR, logger=measure.__name__):
        assert run.train().global_step == 8
    ours = [record for record in caplog.records if record.name == measure.__name__]
    assert len(ours) == 1 and f"could not write {file}" in ours[0].getMessage()


def test_without_the_variable_a_run_is_called_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple] = []
    module = ModuleType("llamafactory.train.tuner")
    module.run_exp = lambda args, callbacks: calls.append((args, callbacks))
    module.read_args = lambda args: args or {}
    hooks.patch(module)
    monkeypatch.delenv("CROSSLORE_MEASURE", raising=False)
    module.run_exp({"a": 1})
    given = [SimpleNamespace()]
    module.run_exp(callbacks=given)
    monkeypatch.setenv("CROSSLORE_MEASURE", "")
    module.run_exp(None, given)
    assert calls == [({"a": 1}, None), (None, given), (None, given)] and calls[1][1] is given
    monkeypatch.setenv("CROSSLORE_MEASURE", str(tmp_path / "measure.json"))
    module.run_exp(None, given)
    assert calls[-1][1][0] is given[0] and isinstance(calls[-1][1][1], MeasureCallback) and len(given) == 1


METHODS = {
    "lora": {"finetuning_type": "lora", "lora_rank": 2},
    "dora": {"finetuning_type": "lora", "lora_rank": 2, "use_dora": True},
    "full": {"finetuning_type": "full"},
    "galore": {"finetuning_type": "full", "use_galore": True, "galore_rank": 4, "optim": "adamw_torch"},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_type_is_measured(method: str, config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llamafactory.train.tuner import run_exp

    ours = ("rank", "alpha", "residual_ratio", "warmup_k", "crosslore_refresh_every")
    config = {key: value for key, value in config.items() if key not in ours} | METHODS[method] | {"max_steps": 3}
    file = tmp_path / "measure.json"
    monkeypatch.setenv("CROSSLORE_MEASURE", str(file))
    run_exp(config)
    found = read(file)
    everything = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(config["model_name_or_path"]).parameters())
    assert found["steps"] == 3 and found["train_seconds"] > 0 and found["tokens"] > 0 and len(found["losses"]) == 3
    assert (found["trainable_parameters"] == everything) == (method in ("full", "galore"))


@pytest.mark.slow
def test_the_command_line_measures_crosslore_only_when_asked(config: dict, tmp_path: Path) -> None:
    looks = {"crosslore_telemetry": True, "crosslore_telemetry_every": 2}
    path = write_yaml(tmp_path, config | looks | {"max_steps": 4, "val_size": 4, "do_eval": True})
    result = run(BIN / "llamafactory-cli", "train", path, CROSSLORE_MEASURE=str(tmp_path / "m.json"))
    assert result.returncode == 0, result.stderr[-3000:]
    found = read(tmp_path / "m.json")
    assert found["steps"] == 4 and found["train_seconds"] > 0
    assert found["eval_loss"] == read(tmp_path / "out" / "eval_results.json")["eval_loss"]  # evaluated after training
    assert found["telemetry"]["looks"] == 2 and 0 < found["telemetry"]["subspace_error"] < 1
    history = read(tmp_path / "out" / "trainer_state.json")["log_history"]
    assert [row["step"] for row in history if "crosslore/subspace_error" in row] == [2, 4]
    shutil.rmtree(tmp_path / "out")
    for left in tmp_path.glob("m.json*"):
        left.unlink()
    path = write_yaml(tmp_path, config | {"max_steps": 1})
    result = run(BIN / "llamafactory-cli", "train", path, CROSSLORE_MEASURE="")
    assert result.returncode == 0 and (tmp_path / "out" / "model.safetensors").is_file()
    assert list(tmp_path.glob("m.json*")) == []
    assert "crosslore/" not in (tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8")
