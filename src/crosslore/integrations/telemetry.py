"""Telemetry in the logs of transformers' Trainer, and so in TensorBoard, W&B and whatever else `report_to` names."""

import functools
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from crosslore.optimizer import LowRankOptimizer
from crosslore.telemetry import EVERY, Telemetry

# What transformers passes to a callback: TrainingArguments, TrainerState, TrainerControl and keyword arguments.
Passed = Any  # transformers is not typed


class TelemetryCallback(TrainerCallback):  # type: ignore[misc]
    """Adds telemetry to what a Trainer logs with its loss, whichever callbacks come first.

        Trainer(model, args, ..., optimizers=(optimizer, None), callbacks=[TelemetryCallback(optimizer, every=50)])

    The keys are those of `Telemetry.take_logs`; they are in `trainer_state.json` too.

    Args:
        optimizer: the Trainer's; None: it is taken from the Trainer when training begins.
        every: steps between two looks at all weights, >= 1; None: only what looks at the optimizer already is logged.
        per_layer: log the error of each weight too.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range.
    """

    def __init__(
        self, optimizer: LowRankOptimizer | None = None, *, every: int | None = EVERY, per_layer: bool = False
    ) -> None:
        """Look at the optimizer, if it is there."""
        self.every, self.per_layer = every, per_layer
        self.telemetry: Telemetry | None = None
        if optimizer is not None:
            self.telemetry = Telemetry(optimizer, every=EVERY if every is None else every, per_layer=per_layer)

    def on_train_begin(self, args: Passed, state: Passed, control: Passed, **kwargs: Passed) -> None:
        """Find the optimizer, and count steps from where the run goes on."""
        if self.telemetry is None:
            optimizer = unwrapped(kwargs.get("optimizer"))
            self.telemetry = telemetry_of(optimizer)
            if self.telemetry is None and self.every is not None:
                self.telemetry = Telemetry(optimizer, every=self.every, per_layer=self.per_layer)
        if self.telemetry is not None:
            self.telemetry.step = state.global_step
            _add_before_callbacks()

    def add(self, state: Passed, logs: dict[str, Any]) -> None:  # Any: numbers and texts
        """Add what is new to the logs of a training step, which are the last ones of the history."""
        if self.telemetry is None or "loss" not in logs:
            return
        new = self.telemetry.take_logs()
        logs.update(new)
        if state.log_history:
            state.log_history[-1].update(new)


def telemetry_of(optimizer: object) -> Telemetry | None:
    """Return what looks at an optimizer, None if nothing does."""
    observers = getattr(unwrapped(optimizer), "observers", ())
    return next((observer for observer in observers if isinstance(observer, Telemetry)), None)


def unwrapped(optimizer: Any) -> Any:  # Any: accelerate's wrapper or a torch optimizer
    """Return the optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _add_before_callbacks() -> None:
    """Let every `TelemetryCallback` see the logs before the other callbacks of its Trainer; once per process.

    The callbacks of `report_to` are called before a user's own, so that what these added to the logs came too late,
    and a callback has no other way to log: it does not know its Trainer.
    """
    original = CallbackHandler.on_log
    if hasattr(original, "__crosslore__"):
        return

    @functools.wraps(original)
    def on_log(self: Any, args: Passed, state: Passed, control: Passed, logs: Any, **kwargs: Passed) -> Any:
        for callback in self.callbacks:
            if isinstance(callback, TelemetryCallback):
                callback.add(state, logs)
        return original(self, args, state, control, logs, **kwargs)

    on_log.__crosslore__ = True  # type: ignore[attr-defined]
    CallbackHandler.on_log = on_log
