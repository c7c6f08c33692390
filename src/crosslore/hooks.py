"""The hooks by which a weight steps inside backward, and what two optimizers must not do to one weight."""

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


def refuse_other_layerwise(weights: list[Tensor], optimizer: "LowRankOptimizer | None" = None) -> None:
    """Raise a ValueError if one of the weights steps inside backward for another optimizer than this one."""
    for weight in weights:
        hooks = (getattr(weight, "_post_accumulate_grad_hooks", None) or {}).values()
        owners = [hook.owner() for hook in hooks if isinstance(hook, GradientHook)]
        other = next((owner for owner in owners if owner is not None), None)
        if other is not None and other.optimizer is not optimizer:
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} steps inside backward for another optimizer already. Call "
                "that one's `layerwise.detach()` first, or load the model anew."
            )
