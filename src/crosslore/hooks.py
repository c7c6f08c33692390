"""The hooks by which a weight steps inside backward, and what two optimizers must not do to one weight."""

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import ref

from torch import Tensor

if TYPE_CHECKING:
    from crosslore.layerwise import Layerwise
    from crosslore.optimizer import LowRankOptimizer


class GradientHook:
    """What a weight calls with its gradient; weak, because torch's hooks hide a cycle from the garbage collector."""

    def __init__(self, owner: "Layerwise") -> None:
        """Call `owner` as long as it is there."""
        self.owner = ref(owner)

    def __call__(self, weight: Tensor) -> None:
        """Hand over the weight, whose `.grad` is there."""
        owner = self.owner()
        if owner is not None:
            owner.on_gradient(weight)


def refuse_other_layerwise(weights: Sequence[tuple[str, Tensor]], optimizer: "LowRankOptimizer | None" = None) -> None:
    """Raise a ValueError if one of the named weights steps inside backward for another optimizer than this one."""
    if any(_steps_for_other(weight, optimizer) for _, weight in weights):
        gc.collect()  # an optimizer that nobody holds any more is part of cycles
    for name, weight in weights:
        if _steps_for_other(weight, optimizer):
            raise ValueError(
                f"{name} steps inside backward for another optimizer already. Call that one's `layerwise.detach()` "
                "first, `del` it, or load the model anew."
            )


def _steps_for_other(weight: Tensor, optimizer: "LowRankOptimizer | None") -> bool:
    hooks = (getattr(weight, "_post_accumulate_grad_hooks", None) or {}).values()
    owners = [hook.owner() for hook in hooks if isinstance(hook, GradientHook)]
    return any(owner is not None and owner.optimizer is not optimizer for owner in owners)
