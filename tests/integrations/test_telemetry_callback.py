"""Telemetry in the logs of a plain transformers.Trainer, as the callbacks of `report_to` see them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from crosslore import create_optimizer
from crosslore.integrations.measure import MeasureCallback
from crosslore.telemetry import Telemetry, TelemetryCallback

ERROR = "crosslore/subspace_error"


class Reporter(TrainerCallback):
    """Stands where TensorBoard's and W&B's callbacks stand: before the user's."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001
        self.seen.append((state.global_step, dict(logs)))


def trainer(folder: Path, *, by_callback: bool = True, every: int | None = 2, **options: object) -> tuple:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    )
    optimizer = create_optimizer(model, "galore", lr=1e-3, rank=2, refresh_every=100, gradients="compact")
    rows = [{"input_ids": [n + 1] * 6, "labels": [n + 1] * 6} for n in range(16)]
    arguments = TrainingArguments(
        str(folder / "out"), per_device_train_batch_size=1, report_to="none", use_cpu=True, disable_tqdm=True,
        **{"max_steps": 6, "save_steps": 4, "logging_steps": 1, **options},
    )  # fmt: skip
    reporter = Reporter()
    telemetry = TelemetryCallback(optimizer if by_callback else None, every=every)
    callbacks = [reporter, telemetry, MeasureCallback(folder / "m.json")]
    data = {"train_dataset": rows, "eval_dataset": rows}
    return Trainer(model, arguments, callbacks=callbacks, optimizers=(optimizer, None), **data), reporter


@pytest.mark.parametrize("by_callback", [True, False])
def test_callbacks_before_ours_and_the_history_see_it(tmp_path: Path, by_callback: bool) -> None:
    run, reporter = trainer(tmp_path, by_callback=by_callback, eval_strategy="steps", eval_steps=2)
    run.train()
    reported = {step: logs[ERROR] for step, logs in reporter.seen if ERROR in logs}
    assert list(reported) == [2, 4, 6] and all(0 < value < 1 for value in reported.values())
    assert reported == {row["step"]: row[ERROR] for row in run.state.log_history if ERROR in row}
    assert all("loss" in logs for _, logs in reporter.seen if ERROR in logs)  # not in those of an evaluation
    assert any("eval_loss" in logs for _, logs in reporter.seen)


def test_logs_that_come_seldom_hold_the_last_look(tmp_path: Path) -> None:
    run, reporter = trainer(tmp_path, logging_steps=3)
    run.train()
    assert [step for step, logs in reporter.seen if ERROR in logs] == [3, 6]
    assert [step for step, logs in reporter.seen if "loss" in logs] == [3, 6]


def test_a_resumed_run_looks_at_the_same_steps(tmp_path: Path) -> None:
    run, whole = trainer(tmp_path, every=3)
    run.train()
    again, reporter = trainer(tmp_path, every=3)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    found, expected = ([logs[ERROR] for _, logs in one.seen if ERROR in logs] for one in (reporter, whole))
    assert len(expected) == 2 and found == expected[1:]


def test_without_something_that_looks_nothing_is_logged(tmp_path: Path) -> None:
    run, reporter = trainer(tmp_path, by_callback=False, every=None)
    run.train()
    assert run.optimizer.optimizer.observers == []
    assert not any(key.startswith("crosslore/") for _, logs in reporter.seen for key in logs)
    assert "telemetry" not in (tmp_path / "m.json").read_text(encoding="utf-8")


def test_what_looks_already_is_logged_and_measured(tmp_path: Path) -> None:
    run, reporter = trainer(tmp_path, by_callback=False, every=None)
    telemetry = Telemetry(run.optimizer, every=3)
    run.train()
    assert [step for step, logs in reporter.seen if ERROR in logs] == [3, 6]
    assert json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))["telemetry"] == telemetry.summary()
    assert telemetry.summary()["looks"] == 2
