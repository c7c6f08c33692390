"""Compact gradients, layerwise: a weight steps inside backward, when the last layer that uses it has handed over R.

Nothing is held of a weight that has stepped. R of a few weights are alive at a time, because they step together; the
gradient of a linear layer is never formed between refreshes, and that of an embedding never whole (`rows.py`). With
gradient accumulation a basis that is due is fitted to the first micro-batch, so that none waits for the sum. Weights
that keep their whole gradient step through `crosslore.layerwise`, whose books (norms, the factor of clipping) are those
of both.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod, ref

import torch
from torch import Tensor

from crosslore.accumulation import norms_of, scale_
from crosslore.compact.begin import Held
from crosslore.layerwise import Layerwise

if TYPE_CHECKING:
    from crosslore.compact.gradients import CompactGradients
    from crosslore.compact.rows import RowStepper


class CompactLayerwise:
    """What ends the steps of compact layers inside backward."""

    def __init__(self, compact: "CompactGradients", books: Layerwise) -> None:
        """Ask autograd to say when a backward pass is done with a weight."""
        self._compact, self.books = ref(compact), books
        # Steps embeddings and heads, whose gradient is never whole; None with gradient accumulation.
        self.rows: RowStepper | None = None
        self._passes: dict[Tensor, int] = {}
        self._ends = PassEnds(WeakMethod(self.on_pass))
        for layer in compact.layers:
            self._ends.watch(layer.weight)

    def begin(self, weight: Tensor) -> None:
        """Get ready for the first use of a weight in a backward pass."""
        self._ends.watch(weight)
        compact = self._compact()
        if compact is not None and weight in compact.ready:  # another pass has used it already
            compact.finish_ready()

    def on_pass(self, weight: Tensor) -> None:
        """Count a backward pass that has used a weight; step it if it is the last one of the step."""
        compact = self._compact()
        if compact is None or not compact.holds(weight):
            return
        self._passes[weight] = self._passes.get(weight, 0) + 1
        if self._passes[weight] == self.books.accumulation_steps:
            self._finish(compact, weight)

    def finish_micro_batches(self) -> None:
        """Step the weights that have seen fewer backward passes than expected."""
        compact = self._compact()
        for weight in list(self._passes) if compact is not None else []:
            self._finish(compact, weight)  # type: ignore[arg-type]
        if compact is not None:
            compact.finish_ready()
        if self.rows is not None:
            self.rows.forget()  # what is left is of a backward pass that ended in an error

    def _finish(self, compact: "CompactGradients", weight: Tensor) -> None:
        self._passes.pop(weight)
        self.books.warn_of_second_step(weight, compact.optimizer.items.of(weight).name)
        compact.finish_layerwise(weight)

    def clip_(self, ready: list[Held]) -> list[float]:
        """Clip compact gradients; return the norm of each weight's before that, NaN of one that is to be skipped."""
        norms = iter(norms_of([pending.ctx.low for held in ready for pending in held.pendings]))
        found = []
        for held in ready:
            norm = math.hypot(*(next(norms) for _ in held.pendings), *(math.nan,) * held.poisoned)
            factor = self.books.take_norm(norm) if math.isfinite(norm) else 1.0
            if factor < 1:
                for pending in held.pendings:
                    scale_(pending, factor)
            found.append(norm)
        return found

    def forget(self) -> None:
        """Drop the counts, and what embeddings and heads have handed over."""
        self._passes = {}
        if self.rows is not None:
            self.rows.forget()

    def detach(self) -> None:
        """Step what is left, remove the hooks, and those of the weights with whole gradients."""
        self.finish_micro_batches()
        self._ends.remove()
        if self.rows is not None:
            self.rows.detach()
        compact = self._compact()
        if compact is not None:
            compact.layerwise = None  # before the other half comes here again
        if self.books.optimizer.layerwise is self.books:
            self.books.detach()


class PassEnds:
    """Calls with a weight when a backward pass is done with it."""

    def __init__(self, call: WeakMethod[Callable[[Tensor], None]]) -> None:
        """Begin with no weight."""
        self._call = call
        # Any: torch's nodes, alive only as long as somebody holds them, and handles.
        self._hooks: dict[Tensor, tuple[Any, Any]] = {}

    def watch(self, weight: Tensor) -> None:
        """Ask autograd; again if it has given the weight another node, as after `model.to`."""
        node, known = torch.autograd.graph.get_gradient_edge(weight).node, self._hooks.get(weight)
        if known is None or known[0] is not node:
            self._hooks[weight] = node, node.register_hook(Done(self._call, weight))

    def remove(self) -> None:
        """Call no more."""
        for _, handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()


class Done:
    """A hook of the node that would accumulate a weight's gradient: it runs once all uses of the weight are through."""

    def __init__(self, call: WeakMethod[Callable[[Tensor], None]], weight: Tensor) -> None:
        """Call with the weight, as long as both are there."""
        self._call, self._weight = call, ref(weight)

    def __call__(self, grad_inputs: Any, grad_outputs: Any) -> None:  # Any: torch's own tuples
        """Say that the weight's pass is over."""
        call, weight = self._call(), self._weight()
        if call is not None and weight is not None:
            call(weight)
