"""A linear layer whose backward hands D and X to whoever asked for them, instead of forming the weight's gradient."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from crosslore.compact.factors import GradientFactors

# Takes a weight and the factors of its gradient.
Sink = Callable[[Tensor, GradientFactors], None]
# Weight -> its sink. A copied or reloaded model has other weights, and its layers are ordinary ones.
_SINKS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class CompactFunction(torch.autograd.Function):
    """y = x W^T + b, forward as `F.linear`; backward gives x and b their gradients and the sink the factors of W's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # Any: torch's own context
        """Return the layer's output, bit for bit that of `F.linear`, autocast included."""
        ctx.save_for_backward(x, weight)
        ctx.owner = weight  # what was saved may come back as an alias, under gradient checkpointing
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        """Return the gradients of x and b; that of the weight goes to its sink in factors."""
        x, weight = ctx.saved_tensors
        wants_x, _, wants_bias = ctx.needs_input_grad
        grad_x = (grad_output @ weight.to(grad_output.dtype)).to(x.dtype) if wants_x else None
        grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0) if wants_bias else None
        sink = _SINKS.get(ctx.owner)
        if sink is not None:
            sink(ctx.owner, GradientFactors.of(grad_output, x))
        return grad_x, None, grad_bias


class CompactLinear(nn.Linear):
    """`nn.Linear` in every respect but one: while a sink asks for it, the weight's gradient is never formed."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad and self.weight in _SINKS):
            return super().forward(x)
        y: Tensor = _compact_forward(x, self.weight, self.bias)
        return y


@_disable_dynamo  # the sink steps an optimizer: not for a compiled graph
def _compact_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = CompactFunction.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


def reason_not_compact(module: nn.Module) -> str | None:
    """Return why a module's weight must keep its whole gradient, or None if it need not."""
    if type(module) not in (nn.Linear, CompactLinear):
        return f"{type(module).__name__} is not nn.Linear itself"
    return None


def hand_over(module: nn.Linear, sink: Sink) -> None:
    """Let a layer's backward hand the factors of its weight's gradient to `sink`."""
    module.__class__ = CompactLinear
    _SINKS[module.weight] = sink


def refuse_other_compact(weights: Iterable[Tensor]) -> None:
    """Raise a ValueError if one of the weights hands its gradient to an optimizer already."""
    for weight in weights:
        if weight in _SINKS:
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} hands its gradient to another optimizer already. Call that "
                "one's `compact.detach()` first, or load the model anew."
            )


def take_back(module: nn.Linear) -> None:
    """Make a layer an ordinary one again."""
    _SINKS.pop(module.weight, None)
    module.__class__ = nn.Linear
