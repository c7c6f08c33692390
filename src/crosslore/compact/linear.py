"""A linear layer whose backward hands D and X to whoever asked for them, instead of forming the weight's gradient."""

import gc
from collections.abc import Callable, Sequence
from typing import Any, Literal
from weakref import WeakMethod, ref

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from crosslore.compact.deferred import DeferredWeight, deferred_of, undefer
from crosslore.compact.factors import GradientFactors
from crosslore.layout import as_dtype

# Takes a weight and the factors of its gradient; of an embedding, token numbers and output gradients.
Sink = Callable[[Tensor, Any], None]
# Weight -> a weak reference to its sink, so that neither keeps the other alive. A copied or reloaded model has other
# weights, and its layers are ordinary ones; so are those of a model whose optimizer is gone.
_SINKS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def sink_of(weight: Tensor) -> Sink | None:
    """Return who takes the gradient of a weight in factors, None if nobody does."""
    held = _SINKS.get(weight)
    sink: Sink | None = None if held is None else held()
    return sink


class CompactFunction(torch.autograd.Function):
    """y = x W^T + b; backward gives x and b their gradients and the sink the factors of W's.

    Forward is `F.linear`, bit for bit, autocast included; with a deferred weight it adds what is pending.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # Any: torch's own context
        """Return the layer's output."""
        ctx.save_for_backward(x, weight)
        ctx.owner = weight  # what was saved may come back as an alias, under gradient checkpointing
        ctx.deferred = deferred = pending_of(weight)
        ctx.version = 0 if deferred is None else deferred.version
        return output(x, weight, bias, deferred)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x and b; that of the weight goes to its sink in factors, or to who asks for it."""
        x, weight = ctx.saved_tensors
        wants_x, _, wants_bias = ctx.needs_input_grad
        grad_x = None
        if wants_x:
            grad_x = grad_output @ as_dtype(weight, grad_output.dtype)
            if ctx.deferred is not None:
                if ctx.version != ctx.deferred.version:
                    raise RuntimeError(
                        "a deferred weight has stepped between the forward and the backward pass. Call backward before "
                        "optimizer.step(), or run forward again."
                    )
                grad_x = ctx.deferred.add_grad_input(grad_x, grad_output)
            grad_x = as_dtype(grad_x, x.dtype)
        grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0) if wants_bias else None
        sink, asker = sink_of(ctx.owner), who_asks(ctx.owner, ctx.next_functions[1][0])
        factors = GradientFactors.of(grad_output, x)
        if asker == "backward" and sink is not None:
            sink(ctx.owner, factors)
            return grad_x, None, grad_bias
        return grad_x, factors.dense().to(weight.dtype) if asker else None, grad_bias


def who_asks(weight: Tensor, node: Any) -> Literal["backward", "grad", None]:  # Any: torch's own node
    """Return what wants a weight's gradient: `loss.backward()`, `torch.autograd.grad`, or nothing.

    Args:
        weight: the leaf.
        node: what accumulates its gradient, None if it was frozen in the forward pass.
    """
    if node is None or not weight.requires_grad:  # frozen since the forward pass
        return None
    try:
        # As torch's own register_multi_grad_hook asks.
        return "backward" if torch._C._will_engine_execute_node(node) else None
    except RuntimeError:  # its answer for a leaf that torch.autograd.grad is to return
        return "grad"


def pending_of(weight: Tensor) -> DeferredWeight | None:
    """Return what is pending beside a weight, None if the weight is the whole truth."""
    deferred = deferred_of(weight)
    return deferred if deferred is not None and deferred.is_pending else None


def output(x: Tensor, weight: Tensor, bias: Tensor | None, deferred: DeferredWeight | None) -> Tensor:
    """Return x W^T + b, W with what is pending."""
    if deferred is None:
        return nn.functional.linear(x, weight, bias)
    y = deferred.add_output(nn.functional.linear(x, weight), x)
    return y if bias is None else y + bias.to(y.dtype)


class CompactLinear(nn.Linear):
    """`nn.Linear` in every respect but one: while a sink asks for it, the weight's gradient is never formed.

    Whatever reads the weight as a whole (`state_dict`, copies, pickles, `to`) sees it with what is pending merged, and
    so does `eval`, in which some modules of torch read the weights of their layers instead of calling them.
    """

    # The weight that was handed over; what tracers put in its place has nothing pending beside it.
    _own_weight: "ref[Tensor] | None" = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        if torch.compiler.is_exporting() or isinstance(self.weight, torch.fx.Proxy):
            self._refuse_to_be_traced_without_what_is_pending()
            return nn.functional.linear(x, self.weight, self.bias)
        weight = self.weight
        handed_over = self._own_weight is not None and self._own_weight() is weight
        if handed_over and torch.is_grad_enabled() and weight.requires_grad:
            y: Tensor = _compact_forward(x, self.weight, self.bias)
            return y
        return output(x, self.weight, self.bias, pending_of(self.weight))

    def train(self, mode: bool = True) -> "CompactLinear":
        """Set the mode; merge for evaluation."""
        if not mode:
            self.merge()
        return super().train(mode)

    def _refuse_to_be_traced_without_what_is_pending(self) -> None:
        weight = None if self._own_weight is None else self._own_weight()
        if weight is not None and pending_of(weight):
            raise RuntimeError(
                "the model has deferred updates pending, which an exported or traced one would lack. Call model.eval() "
                "or optimizer.merge() first."
            )

    def merge(self) -> None:
        """Put what is pending into the weight."""
        deferred = deferred_of(self.weight)
        if deferred is not None:
            deferred.merge_()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:  # Any: torch's own arguments
        self.merge()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}weight" in state_dict:
            self.merge()  # what is refused, for its shape, leaves the weight as it was
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # Any: torch's own signature
        self.merge()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:  # Any: torch's own attributes
        """Return what copies and pickles hold."""
        self.merge()
        return {key: value for key, value in self.__dict__.items() if key != "_own_weight"}


@_disable_dynamo  # the sink steps an optimizer: not for a compiled graph
def _compact_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = CompactFunction.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class EmbeddingFunction(torch.autograd.Function):
    """y = W[tokens]; backward gives the sink the token numbers and the gradient of y."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, padding: int | None) -> Tensor:  # Any: torch's own context
        """Return the rows of the tokens."""
        ctx.save_for_backward(tokens)
        ctx.owner = weight
        ctx.padding = padding if padding is None else padding % weight.shape[0]  # -1: the last row
        return nn.functional.embedding(tokens, weight, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor | None, None]:
        """Return the weight's gradient to who asks for it; else it goes to its sink."""
        (tokens,) = ctx.saved_tensors
        weight, padding = ctx.owner, -1 if ctx.padding is None else ctx.padding
        sink, asker = sink_of(weight), who_asks(weight, ctx.next_functions[1][0])
        if asker == "backward" and sink is not None:
            if padding >= 0:
                grad_output = grad_output.masked_fill((tokens == padding).unsqueeze(-1), 0)
            sink(weight, (tokens, grad_output))
            return None, None, None
        if asker is None:
            return None, None, None
        whole = torch.ops.aten.embedding_dense_backward(grad_output, tokens, weight.shape[0], padding, False)
        return None, whole, None


class CompactEmbedding(nn.Embedding):
    """`nn.Embedding` in every respect but one: while a sink asks for it, the weight's gradient is never formed."""

    _own_weight: "ref[Tensor] | None" = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the tokens."""
        weight = self.weight
        handed_over = self._own_weight is not None and self._own_weight() is weight
        wanted = handed_over and is_plain(self) and torch.is_grad_enabled() and weight.requires_grad
        if not wanted or torch.compiler.is_exporting():
            return super().forward(input)
        y: Tensor = _embedding_forward(input, weight, self.padding_idx)
        return y

    def __getstate__(self) -> dict[str, Any]:  # Any: torch's own attributes
        """Return what copies and pickles hold."""
        return {key: value for key, value in self.__dict__.items() if key != "_own_weight"}


@_disable_dynamo  # the sink steps an optimizer: not for a compiled graph
def _embedding_forward(tokens: Tensor, weight: Tensor, padding: int | None) -> Tensor:
    y: Tensor = EmbeddingFunction.apply(tokens, weight, padding)  # type: ignore[no-untyped-call]
    return y


def is_plain(module: nn.Embedding) -> bool:
    """Return whether an embedding does nothing but look up, whose gradient is the sum over tokens."""
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


def reason_not_compact(module: nn.Module) -> str | None:
    """Return why a module's weight must keep its whole gradient, or None if it need not."""
    if type(module) not in (nn.Linear, CompactLinear):
        return f"{type(module).__name__} is not nn.Linear itself"
    if "forward" in vars(module):
        return "a layer whose forward was replaced"
    if module.weight._backward_hooks or module.weight._post_accumulate_grad_hooks:
        return "a layer with a hook on its weight's gradient"
    return None


def hand_over(module: nn.Linear, sink: Sink) -> None:
    """Let a layer's backward hand the factors of its weight's gradient to `sink`."""
    module.__class__ = CompactLinear
    vars(module)["_own_weight"] = ref(module.weight)
    _SINKS[module.weight] = WeakMethod(sink)


def hand_over_embedding(module: nn.Embedding, sink: Sink) -> None:
    """Let an embedding's backward hand token numbers and output gradients to `sink`."""
    module.__class__ = CompactEmbedding
    vars(module)["_own_weight"] = ref(module.weight)
    _SINKS[module.weight] = WeakMethod(sink)


def refuse_other_compact(weights: Sequence[tuple[str, Tensor]]) -> None:
    """Raise a ValueError if one of the named weights hands its gradient to an optimizer already.

    What an optimizer that is gone has left pending is merged.
    """
    if any(sink_of(weight) is not None for _, weight in weights):
        gc.collect()  # an optimizer that nobody holds any more is part of cycles
    for name, weight in weights:
        if sink_of(weight) is not None:
            raise ValueError(
                f"{name} hands its gradient to another optimizer already. Call that one's `compact.detach()` first, "
                "`del` it, or load the model anew."
            )
        undefer(weight)


def take_back(module: nn.Module) -> None:
    """Make a layer an ordinary one again."""
    _SINKS.pop(module.weight, None)
    vars(module).pop("_own_weight", None)
    module.__class__ = nn.Embedding if isinstance(module, nn.Embedding) else nn.Linear
