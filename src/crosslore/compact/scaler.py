"""Loss scaling: compact gradients are no `.grad` that a GradScaler could divide, so `step()` undoes its scale."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from crosslore.compact.gradients import CompactGradients
    from crosslore.optimizer import LowRankOptimizer


@contextmanager
def scale_dropped_on_error(optimizer: "LowRankOptimizer") -> Iterator[None]:
    """Remove what a GradScaler has left for a step that ends in an error: it would do so after a good one only."""
    try:
        yield
    except RuntimeError:
        for name in ("grad_scale", "found_inf"):
            vars(optimizer).pop(name, None)
        raise


def refuse_loss_scale(optimizer: "LowRankOptimizer") -> None:
    """Raise a RuntimeError if a GradScaler calls the step of an optimizer whose weights step inside backward."""
    if optimizer.layerwise is not None and hasattr(optimizer, "grad_scale"):
        mode = "layerwise" if optimizer.compact is None else "compact-layerwise"
        raise RuntimeError(
            f"GradScaler is not for gradients={mode!r}: the weights have stepped, with the scaled gradients, before "
            "the scale is undone. Use bf16 or fp32, or gradients='compact'."
        )


def finish_unscaled(compact: "CompactGradients") -> bool:
    """Undo a GradScaler's loss scale and finish the step; return False if it found an overflow: nothing is done.

    Raises:
        RuntimeError: if the scale cannot be undone; says why and what to do.
    """
    optimizer = compact.optimizer
    if not hasattr(optimizer, "grad_scale"):
        compact.finish_step()
        return True
    scale, found = optimizer.grad_scale, getattr(optimizer, "found_inf", None)
    if scale is None:
        raise RuntimeError(
            "GradScaler.unscale_ was called, but compact gradients are no `.grad` that it could divide. Leave it "
            "out, and give `max_grad_norm` to create_optimizer instead of clipping in between."
        )
    if not isinstance(found, Tensor):
        raise RuntimeError(
            "GradScaler looks for overflows in whole gradients, and all trained weights have compact ones. Train "
            "another weight too (an embedding, a norm), use bf16 or fp32, or gradients='full'."
        )
    if any(group["fit_momentum"] for group in optimizer.param_groups):
        raise RuntimeError(
            "GradScaler must not be used with gradients='compact' and fit_momentum > 0: a basis is fitted to the "
            "scaled gradient and the unscaled momentum together. Set fit_momentum=0, or use bf16 or fp32."
        )
    if float(found) > 0:
        compact.forget()
        return False
    compact.finish_step(factor=1.0 / float(scale))
    return True
