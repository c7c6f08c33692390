"""accelerate, and so transformers.Trainer, must report the gradient norm of layerwise training, not 0."""

import functools
from typing import Any

import torch

from crosslore.layerwise import Layerwise


def report_true_norm() -> None:
    """Let `Accelerator.clip_grad_norm_` return the norm that layerwise training saw; once per process.

    In layerwise mode no gradient is left to be measured or clipped when it is called: the weights have stepped.
    Accelerators of other optimizers are untouched.
    """
    from accelerate import Accelerator

    original = Accelerator.clip_grad_norm_
    if hasattr(original, "__crosslore__"):
        return

    @functools.wraps(original)
    def clip_grad_norm_(self: Any, parameters: Any, max_norm: Any, norm_type: Any = 2) -> Any:  # Any: accelerate's own
        layerwise = _layerwise_of(self)
        if layerwise is None:
            return original(self, parameters, max_norm, norm_type)
        layerwise.finish_micro_batches()
        return torch.tensor(layerwise.grad_norm())

    clip_grad_norm_.__crosslore__ = True  # type: ignore[attr-defined]
    Accelerator.clip_grad_norm_ = clip_grad_norm_


def _layerwise_of(accelerator: Any) -> Layerwise | None:  # Any: accelerate's Accelerator
    """Return the hooks of the accelerator's optimizer, if it is one of ours that steps inside backward."""
    for wrapped in getattr(accelerator, "_optimizers", ()):
        layerwise = getattr(getattr(wrapped, "optimizer", wrapped), "layerwise", None)
        if isinstance(layerwise, Layerwise):
            return layerwise
    return None
