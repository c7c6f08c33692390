"""What a training run took (seconds, peak memory, tokens, losses) as one JSON file, for transformers' Trainer.

`CROSSLORE_MEASURE=FILE llamafactory-cli train config.yaml` adds `MeasureCallback(FILE)` for every fine-tuning type.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from crosslore.integrations.device import describe_device
from crosslore.integrations.telemetry import telemetry_of

logger = logging.getLogger(__name__)

VARIABLE = "CROSSLORE_MEASURE"
# What transformers passes to a callback: TrainingArguments, TrainerState, TrainerControl and keyword arguments.
Passed = Any  # transformers is not typed
Json = dict[str, Any]  # Any: what JSON holds


class MeasureCallback(TrainerCallback):  # type: ignore[misc]
    """Times the steps of a training run and writes what it took to a JSON file when it ends.

    The seconds are those between the begin of a step and its end, on a GPU with a synchronisation at both: loading,
    evaluation and the saving of checkpoints are not in them. `cpu_seconds` is the processor time of all threads in the
    same steps: other work on the machine is not in it. Peaks count from the begin of training to its end.
    Beside the file lies `FILE.part`, with the sums at each checkpoint: a run that goes on from one reports the sum
    of all steps that led to its result. A file of an earlier run is removed when training begins.

    Args:
        path: the file to write; its folder is made. Only the first process of several writes.

    Raises:
        ValueError: if no file can be written there.
    """

    def __init__(self, path: Path | str) -> None:
        """Check that the file can be written, before anything is loaded."""
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.path.parent, os.W_OK) and not self.path.is_dir()
        except OSError:
            writable = False
        if not writable:
            raise ValueError(
                f"MeasureCallback's path or {VARIABLE} must be a file in a folder that can be written to, got "
                f"{str(path)!r}. Name another file, or leave the callback out, or unset {VARIABLE}."
            )
        self.begun: float | None = None
        self.result: Json | None = None  # once training has ended

    def on_train_begin(self, args: Passed, state: Passed, control: Passed, **kwargs: Passed) -> None:
        """Start to count; take over what an earlier part of a resumed run took."""
        model: nn.Module = kwargs["model"]
        self.device: torch.device = args.device
        self.steps, self.seconds, self.cpu_seconds, self.before = 0, 0.0, 0.0, Earlier()
        self.result = None
        self.counter = None if args.torch_compile else TokenCounter(model, self.device)
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.output_dir = str(Path(args.output_dir).resolve())
        if state.global_step > 0:
            self.before = read_part(self.part, state.global_step, output_dir=self.output_dir)
        if state.is_world_process_zero:
            self.path.unlink(missing_ok=True)
            if state.global_step == 0:
                self.part.unlink(missing_ok=True)
        self.peak = Peak(self.device)

    def on_step_begin(self, args: Passed, state: Passed, control: Passed, **kwargs: Passed) -> None:
        """Start the clock."""
        self.begun, self.cpu_begun = self._now(), time.process_time()

    def on_step_end(self, args: Passed, state: Passed, control: Passed, **kwargs: Passed) -> None:
        """Stop the clock."""
        if self.begun is not None:
            self.seconds += self._now() - self.begun
            self.cpu_seconds += time.process_time() - self.cpu_begun
            self.steps, self.begun = self.steps + 1, None
        # A checkpoint is about to be written. Should the run be killed right after it, its sums are there already.
        if control.should_save:
            self._write_part(state)

    def on_epoch_end(self, args: Passed, state: Passed, control: Passed, **kwargs: Passed) -> None:
        """Keep the sums if a checkpoint follows."""
        if control.should_save:
            self._write_part(state)

    def on_save(self, args: Passed, state: Passed, control: Passed, **kwargs: Passed) -> None:
        """Keep the sums of a checkpoint that was just written."""
        self._write_part(state)

    def on_train_end(self, args: Passed, state: Passed, control: Passed, **kwargs: Passed) -> None:
        """Write the file."""
        losses = [[row["step"], finite(row["loss"])] for row in state.log_history if "loss" in row]
        sums = self._sums()
        self.result = {
            "train_seconds": sums["seconds"],
            "cpu_seconds": sums["cpu_seconds"],
            "interrupted_seconds_before": self.before.seconds,
            "steps": sums["steps"],
            "tokens": sums["tokens"],
            "loss_first": losses[0][1] if losses else None,
            "loss_last": losses[-1][1] if losses else None,
            "losses": losses,
            "eval_loss": last_eval_loss(state),
            "peak": sums["peak"],
            "trainable_parameters": self.trainable,
            "device": describe_device(self.device),
            "processes": args.world_size,
        }
        telemetry = telemetry_of(kwargs.get("optimizer"))
        if telemetry is not None:
            self.result["telemetry"] = telemetry.summary()
        if self.counter is not None:
            self.counter.remove()
        self._write(self.path, self.result, state=state)

    def on_evaluate(self, args: Passed, state: Passed, control: Passed, **kwargs: Passed) -> None:
        """Add the loss of an evaluation after training."""
        if self.result is not None:
            self.result["eval_loss"] = last_eval_loss(state)
            self._write(self.path, self.result, state=state)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _sums(self) -> Json:
        """Return seconds, steps, tokens and peaks up to now, earlier parts of the run included."""
        tokens = None if self.counter is None or self.before.tokens is None else self.before.tokens + self.counter.total
        return {
            "seconds": (self.before.seconds or 0.0) + self.seconds,
            "cpu_seconds": None if self.before.cpu_seconds is None else self.before.cpu_seconds + self.cpu_seconds,
            "steps": self.before.steps + self.steps,
            "tokens": tokens,
            "peak": larger(self.before.peak, self.peak.read()),
        }

    def _write_part(self, state: Passed) -> None:
        """Add the sums at this step to the part file."""
        if state.is_world_process_zero and self.before.seconds is not None:
            known = read_json(self.part).get("checkpoints", {})
            checkpoints = {step: sums for step, sums in known.items() if int(step) < state.global_step}
            checkpoints[str(state.global_step)] = self._sums()
            self._write(self.part, {"output_dir": self.output_dir, "checkpoints": checkpoints}, state=state)

    def _write(self, path: Path, value: Json, *, state: Passed) -> None:
        """Write a file at once. A failure must not cost the trained model: it is logged."""
        if not state.is_world_process_zero:
            return
        temporary = path.with_name(path.name + ".tmp")
        try:
            temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            logger.error(
                "%s: could not write %s (%s). Training is not affected, its measurement is lost. Name a file in a "
                "folder with free space and run again.",
                VARIABLE,
                path,
                error,
            )


class Earlier:
    """What an earlier part of a resumed run took; `seconds` is None if nobody measured it."""

    def __init__(self, sums: Mapping[str, Any] | None = None, *, known: bool = True) -> None:
        """Take the sums of a checkpoint; without them nothing came before, or (`known=False`) nobody knows what."""
        nothing = 0 if known else None
        found = sums or {"seconds": nothing, "cpu_seconds": nothing, "tokens": nothing, "steps": 0, "peak": {}}
        self.seconds: float | None = found["seconds"]
        self.cpu_seconds: float | None = found.get("cpu_seconds")
        self.steps: int = found["steps"]
        self.tokens: int | None = found["tokens"]
        self.peak: dict[str, float | None] = found["peak"]


def read_part(path: Path, step: int, *, output_dir: str) -> Earlier:
    """Return what the run in `output_dir` took up to its checkpoint of `step`; warns if the file does not say."""
    part = read_json(path)
    sums = part.get("checkpoints", {}).get(str(step)) if part.get("output_dir") == output_dir else None
    if sums is None:
        logger.warning(
            "%s: %s does not say what the run in %s took up to step %d, from which it goes on. The steps from here on "
            "are measured, and interrupted_seconds_before is null. Start the run afresh to measure all of it.",
            VARIABLE,
            path,
            output_dir,
            step,
        )
    return Earlier(sums, known=sums is not None)


def read_json(path: Path) -> Json:
    """Return the object in a JSON file, or an empty one if there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class TokenCounter:
    """Counts the tokens (padding is none) that a model sees while it trains; the sum stays on the device."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Hook onto the model's forward."""
        self._sum = torch.zeros((), dtype=torch.int64, device=device)
        self._handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: Json) -> None:  # Any: a forward's arguments
        ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        if not model.training or not isinstance(ids, torch.Tensor):
            return
        if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
            self._sum += mask.ne(0).sum()
        else:
            self._sum += ids.numel()

    @property
    def total(self) -> int:
        """Return the tokens up to now."""
        return int(self._sum.item())

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()


class Peak:
    """Peak memory of this process in GiB, counted from the object's making."""

    def __init__(self, device: torch.device) -> None:
        """Reset the counters of the system and of the GPU."""
        self._device = device
        with suppress(OSError):  # not allowed everywhere: the peak then counts from the process's start
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._loaded = memory_gib("VmRSS")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> dict[str, float | None]:
        """Return the peaks: of the process, of what it has over the start, and of CUDA's allocator."""
        rss = memory_gib("VmHWM")
        above = None if rss is None or self._loaded is None else rss - self._loaded
        found = {"rss_gib": rss, "rss_above_loaded_gib": above}
        if self._device.type == "cuda":
            found["allocated_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
            found["reserved_gib"] = torch.cuda.max_memory_reserved(self._device) / 2**30
        return found


def memory_gib(field: str) -> float | None:
    """Return a field of /proc/self/status in GiB; None where the system has no such file."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{field}:")), None)


def larger(first: Mapping[str, float | None], second: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the larger of two peaks, name by name."""
    values = {name: [v for v in (first.get(name), second.get(name)) if v is not None] for name in {**first, **second}}
    return {name: max(found, default=None) for name, found in values.items()}


def finite(value: float) -> float | None:
    """Return a number as JSON may hold it: NaN and infinity become None."""
    return value if math.isfinite(value) else None


def last_eval_loss(state: Passed) -> float | None:
    """Return the loss of the last evaluation, or None."""
    found = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
    return finite(found[-1]) if found else None
