"""accelerate, and so transformers.Trainer, must report the norm of gradients that are in no `.grad`."""

import functools
from typing import Any

import torch

from crosslore.compact.gradients import CompactGradients
from crosslore.layerwise import Layerwise


def report_true_norm() -> None:
    """Let `Accelerator.clip_grad_norm_` return the norm that layerwise or compact training sees; once per process.

    In layerwise mode the weights have stepped when it is called. Compact gradients are clipped by `step()`, together
    with the whole ones, by their global norm. Accelerators of other optimizers are untouched.
    """
    from accelerate import Accelerator

    original = Accelerator.clip_grad_norm_
    if hasattr(original, "__crosslore__"):
        return

    @functools.wraps(original)
    def clip_grad_norm_(self: Any, parameters: Any, max_norm: Any, norm_type: Any = 2) -> Any:  # Any: accelerate's own
        match _mode_of(self):
            case Layerwise() as layerwise:
                layerwise.finish_micro_batches()
                return torch.tensor(layerwise.grad_norm())
            case CompactGradients() as compact:
                scaler = getattr(self, "scaler", None)
                return torch.tensor(compact.grad_norm() / (scaler.get_scale() if scaler is not None else 1.0))
        return original(self, parameters, max_norm, norm_type)

    clip_grad_norm_.__crosslore__ = True  # type: ignore[attr-defined]
    Accelerator.clip_grad_norm_ = clip_grad_norm_


def _mode_of(accelerator: Any) -> Layerwise | CompactGradients | None:  # Any: accelerate's Accelerator
    """Return what holds the gradients of the accelerator's optimizer, if it is one of ours in such a mode."""
    for wrapped in getattr(accelerator, "_optimizers", ()):
        optimizer = getattr(wrapped, "optimizer", wrapped)
        for name in ("layerwise", "compact"):
            mode = getattr(optimizer, name, None)
            if isinstance(mode, Layerwise | CompactGradients):
                return mode
    return None
