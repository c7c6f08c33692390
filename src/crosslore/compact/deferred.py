"""Deferred weights: between refreshes P is fixed, so the updates of many steps are one compact tensor B beside W.

    W_t = c W_0 + P B_t,   B_t = (1 - lr wd) B_(t-1) - lr alpha N_t,   c the product of all 1 - lr wd

(on the right side: B_t P^T). Forward adds the second term, x (P B)^T = (x P) B^T, two thin products; nothing of the
weight's size is read or written by a step, and in bf16 the sum is rounded once, when it is merged. It is merged before
P changes, and before what reads the weight: `state_dict`, `eval`, copies, pickles, `to`, and on request. Who reads or
writes `layer.weight` itself, as moving averages of weights do, calls `optimizer.merge()` first.
"""

from dataclasses import replace
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from crosslore.config import Hyper
from crosslore.items import Item, write_back
from crosslore.kernels.rounding import stochastic_round
from crosslore.layout import MatrixLayout
from crosslore.rules.base import state_dtype
from crosslore.step import rounding_draws
from crosslore.stepping import Pending, finish

# Merge as soon as c is smaller: a residual's entries are added to W_0 divided by it, and rounded there.
SMALLEST_FACTOR = 2.0**-6
# Weight -> what is pending beside it.
_DEFERRED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class DeferredWeight:
    """What the steps since the last merge have done to one weight."""

    def __init__(self, weight: Tensor, layout: MatrixLayout) -> None:
        """Start with nothing pending; no tensor is held before the first step."""
        # Weakly: the weight must be able to go with its model.
        self._weight, self.layout = ref(weight), layout
        self.basis: Tensor | None = None
        # B, compact, fp32 or fp64; and c.
        self.low: Tensor | None = None
        self.factor = 1.0
        # Changes with every step and merge: a backward pass of an older forward is refused.
        self.version = 0
        self._hp: Hyper | None = None
        self._name, self._t = "", 0

    @property
    def weight(self) -> Tensor:
        """The weight, which is there as long as anybody can ask."""
        weight = self._weight()
        assert weight is not None
        return weight

    @property
    def is_pending(self) -> bool:
        """Whether the weight alone is not the whole truth."""
        return self.basis is not None

    def step_(self, pending: Pending, update: Tensor) -> None:
        """Take N_t and the residual of a step; lines 8-11 of Algorithm 1, without the weight."""
        ctx, hp = pending.ctx, pending.ctx.hp
        if self.is_pending and self.basis is not ctx.basis:
            self.merge_()
        if not self.is_pending:
            self.basis = ctx.basis
            self.low = torch.zeros(self.layout.low_shape, dtype=state_dtype(ctx.low), device=self.weight.device)
        assert self.low is not None
        self.low.mul_(hp.weight_factor).add_(update, alpha=hp.update_factor)  # line 11
        self.factor *= hp.weight_factor
        self.version += 1
        self._hp, self._name, self._t = hp, ctx.name, ctx.t
        if abs(self.factor) < SMALLEST_FACTOR:
            self.merge_()
        if pending.method.residual is not None:  # a few entries, of W_0: c is taken out of what is added
            scaled = replace(ctx, hp=replace(hp, scale=hp.scale / self.factor))
            pending.method.residual.apply_(self.weight, update, scaled)

    @torch.no_grad()
    def merge_(self) -> None:
        """Put what is pending into the weight: one pass over it, and one rounding."""
        if self.basis is None or self.low is None or self._hp is None:
            return
        draws = rounding_draws(self.weight, self._hp, f"{self._name}|merge", self._t)
        target = self.weight if draws is None else self.weight.float()
        a, b = self.layout.factors(self.low, self.basis)
        self.layout.add_product_(target, a, b, alpha=1.0, beta=self.factor)
        if draws is not None:
            self.weight.copy_(stochastic_round(target, self.weight.dtype, generator=draws))
        self.basis, self.low, self.factor = None, None, 1.0
        self.version += 1

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A (rows, r) and B (cols, r), the pending part being A B^T, in this dtype."""
        assert self.basis is not None and self.low is not None
        a, b = self.layout.factors(self.low, self.basis)
        return a.to(dtype), b.to(dtype)

    def add_output(self, y: Tensor, x: Tensor) -> Tensor:
        """Return c y + x (A B^T)^T for y = x W_0^T without the bias."""
        a, b = self.factors(y.dtype)
        thin = x.to(y.dtype) @ b
        y = y if self.factor == 1.0 else y * self.factor
        return torch.addmm(y.reshape(-1, y.shape[-1]), thin.reshape(-1, thin.shape[-1]), a.mT).view_as(y)

    def add_grad_input(self, grad_x: Tensor, grad_output: Tensor) -> Tensor:
        """Return c grad_x + grad_output A B^T, for grad_x = grad_output W_0."""
        a, b = self.factors(grad_output.dtype)
        thin = (grad_output @ a).reshape(-1, a.shape[-1])
        grad_x = grad_x if self.factor == 1.0 else grad_x * self.factor
        return torch.addmm(grad_x.reshape(-1, grad_x.shape[-1]), thin, b.mT).view_as(grad_x)


def defer(weight: Tensor, layout: MatrixLayout) -> DeferredWeight:
    """Let the updates of a weight be deferred."""
    _DEFERRED[weight] = deferred = DeferredWeight(weight, layout)
    return deferred


def undefer(weight: Tensor) -> None:
    """Merge what is pending and step the weight directly from now on."""
    deferred = _DEFERRED.pop(weight, None)
    if deferred is not None:
        deferred.merge_()


def deferred_of(weight: Tensor) -> DeferredWeight | None:
    """Return what is pending beside a weight, None if its updates are not deferred."""
    if not _DEFERRED.data:  # most optimizers defer nothing, and looking up costs more than asking
        return None
    found: DeferredWeight | None = _DEFERRED.get(weight)
    return found


def can_be_deferred(item: Item) -> bool:
    """Return whether the updates of a weight can be deferred: one matrix with a basis that is kept."""
    whole = len(item.blocks) == 1 and item.blocks[0].span is None
    return whole and item.methods[0].projector.stored


def finish_deferred(pending: Pending, update: Tensor | None = None) -> None:
    """Turn the compact gradient into an update and apply it, to what is pending where the weight is deferred."""
    deferred = deferred_of(pending.item.weight)
    if deferred is None:
        finish(pending, update)
        return
    if update is None:
        update = pending.method.rule.update(pending.ctx.low, pending.ctx.state, pending.ctx.age, pending.ctx.hp)
    deferred.step_(pending, update)
    write_back(pending.item.state, pending.block.key, pending.ctx.state)
