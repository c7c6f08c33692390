"""The beginning of a step whose gradient comes in factors: what must see G, and what does without."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crosslore.compact.factors import GradientFactors
from crosslore.items import Item, block_state, draw_name, steps_done
from crosslore.layout import as_dtype
from crosslore.residuals.sparse import SparseResidual, kept_positions
from crosslore.rules.base import state_dtype
from crosslore.step import Method, context_of
from crosslore.stepping import Pending, shown

logger = logging.getLogger(__name__)

# Devices whose sums wait in the host's memory: in the first step all bases are due, and their gradients would not fit.
PARKED = ("cuda",)


@dataclass
class Held:
    """What the backward passes of one step have left of a weight's gradient."""

    item: Item
    # Compact gradients, once the basis of the step is known.
    pendings: list[Pending] = field(default_factory=list)
    # The gradient in factors, or whole, while a step that must see it waits for the sum of all micro-batches.
    factors: GradientFactors | None = None
    whole: Tensor | None = None
    # A gradient that is not finite was seen whole: the step is skipped.
    poisoned: bool = False
    # Backward pass in which the step began.
    began_in: int = field(default_factory=torch._C._current_graph_task_id)

    def dense(self, factors: GradientFactors) -> Tensor:
        """Return the gradient as `.grad` would hold it: a product in autocast's dtype, kept in that of the weight."""
        return factors.dense().to(self.item.weight.dtype)

    def join(self, factors: GradientFactors) -> None:
        """Add a micro-batch to the sum."""
        if self.item.weight.device.type in PARKED:
            grad = self.dense(factors).to("cpu")
            self.whole = grad if self.whole is None else self.whole.add_(grad)
            return
        if self.whole is not None:
            self.whole += self.dense(factors)
            return
        self.factors = factors if self.factors is None else self.factors.joined(factors)
        if self.factors.larger_than_dense:
            self.whole, self.factors = self.dense(self.factors), None

    def warn_of_second_pass(self, warned: set[str], accumulation_steps: int) -> None:
        """Warn once if a step that has fitted a basis, to all that it was told to expect, goes on in another pass.

        autograd takes a segment of reentrant checkpointing for a pass of its own.
        """
        if not warned and self.item.due_next() and self.began_in != torch._C._current_graph_task_id():
            warned.add(self.item.name)
            logger.warning(
                "%s is used in another backward pass, or another segment of reentrant checkpointing, after its basis "
                "was fitted to what came before. Set accumulation_steps, now %d, to the backward passes of a step, and "
                "ask for norms after the last one.",
                self.item.name,
                accumulation_steps,
            )

    def take_sum(self) -> tuple[Tensor | None, GradientFactors | None]:
        """Return the sum, None if there is none, with its factors where they are there; forget both."""
        factors, whole = self.factors, self.whole
        self.factors, self.whole = None, None
        if factors is not None:
            return self.dense(factors), factors
        return None if whole is None else whole.to(self.item.weight.device), None


def entries_of(grad: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what reads entries of a gradient, in fp32 or fp64."""
    return lambda rows, cols: grad[rows, cols].to(state_dtype(grad))


def sees_whole(item: Item) -> bool:
    """Return whether the next step of a weight must see the gradient itself."""
    if "step" not in item.state:
        return True
    t = steps_done(item.state) + 1
    return any(_sees_whole(method, t) for method in item.methods)


def _sees_whole(method: Method, t: int) -> bool:
    residual = method.residual
    ranks = isinstance(residual, SparseResidual) and residual.residual_select == "residual"
    return t == 1 or not method.ordinary(t) or (ranks and t <= max(1, residual.warmup_steps))  # type: ignore[union-attr]


def residual_starts_now(method: Method, t: int) -> bool:
    """Return whether a residual acts in the very step that chooses its positions: in step 1, without a warm-up."""
    return isinstance(method.residual, SparseResidual) and method.residual.warmup_steps == 0 and t == 1


def begin_compact(item: Item, factors: GradientFactors, *, keep_positions: bool) -> Iterator[Pending]:
    """Yield each block with its compact gradient of the next step; G is not formed. Lines 2-5 of Algorithm 1.

    Args:
        item: the weight.
        factors: of its gradient.
        keep_positions: leave the rows and columns of the residual for the update, which is near (int64).
    """
    t = steps_done(item.state) + 1
    for block, method in zip(item.blocks, item.methods, strict=True):
        layout, own = block.layout, factors.take(block)
        part, name = block_state(item.state, block.key), draw_name(item.name, block.key)
        basis = method.basis(block.take(item.weight), part, layout, item.hp, t, name=name)
        low = own.project(basis, layout)  # R_t = P_t^T G_t
        low = as_dtype(low, state_dtype(low))  # the sum of many is as precise as the moments
        ctx = context_of(None, low, basis, part, method, layout, item.hp, t, name=name)
        if isinstance(method.residual, SparseResidual) and method.residual.active(t):
            positions = kept_positions(part, layout)
            ctx.kept = own.entries(*positions)
            ctx.positions = positions if keep_positions else None
        yield shown(Pending(item, block, method, ctx), factors=own)


def add_compact_(pending: Pending, own: GradientFactors) -> None:
    """Add the gradient of a micro-batch, in factors of the block, to a step that has begun; G is not formed."""
    ctx, layout = pending.ctx, pending.block.layout
    ctx.low += own.project(ctx.basis, layout)
    if ctx.kept is not None:
        ctx.kept += own.entries(*(ctx.positions or kept_positions(ctx.state, layout)))
