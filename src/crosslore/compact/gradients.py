"""Compact gradients: linear layers hand R to the optimizer from backward, and G is formed only where it must be seen.

In an ordinary step each micro-batch adds R = P^T G, computed from the layer's input and output gradient without G, and
(for the sparse residual) G at the kept positions, a sampled product. A step that has to see G - the fit of a basis, a
window that collects its sketch, the warm-up of a residual that ranks by residual energy - forms it, one weight at a
time inside backward, and frees it. With gradient accumulation such a step waits for the sum of all micro-batches, as
it does with whole gradients: their factors are kept until then, or their sum where that is smaller. Refreshes are
staggered, so that in all steps but the first this concerns few weights.

`optimizer.step()` knows the compact gradients of all weights before any weight changes, so `max_grad_norm` limits
their global norm, that of what is applied. Layerwise (`compact/layerwise.py`) it is the weight's last use in backward
that ends a step, and what is held of a few weights goes together.
"""

import logging
import math
import threading
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from crosslore.accumulation import add_gradient_, keep_compact_parts, norm_of, norms_of, scale_
from crosslore.compact.begin import Held, add_compact_, begin_compact, entries_of, residual_starts_now, sees_whole
from crosslore.compact.deferred import can_be_deferred, defer, deferred_of, finish_deferred, undefer
from crosslore.compact.factors import GradientFactors
from crosslore.compact.layerwise import CompactLayerwise
from crosslore.compact.linear import hand_over, take_back
from crosslore.items import advance, steps_done
from crosslore.stepping import Pending, begin, finish_many, full_precision, wait

if TYPE_CHECKING:
    from crosslore.optimizer import LowRankOptimizer

logger = logging.getLogger(__name__)

# Added to a norm before dividing by it, as torch.nn.utils.clip_grad_norm_.
EPS = 1e-6
# Layerwise: entries of compact gradients that wait for each other, since one step of many small tensors is cheaper than
# many steps of one. At rank 128 these are two decoder layers of 4096 columns on a GPU, 32 MB.
READY = {"cpu": 1 << 18, "cuda": 1 << 23}


class CompactGradients:
    """The sinks of one optimizer's linear layers. `attach_compact` makes one."""

    def __init__(
        self,
        optimizer: "LowRankOptimizer",
        layers: list[nn.Linear],
        *,
        accumulation_steps: int,
        max_grad_norm: float | None,
        deferred: bool = False,
    ) -> None:
        """Let the layers hand over the factors of their weights' gradients, and defer the updates of those that can."""
        self.optimizer, self.layers = optimizer, layers
        self.accumulation_steps, self.max_grad_norm = accumulation_steps, max_grad_norm
        self._held: dict[Tensor, Held] = {}
        # Layerwise: weights whose backward pass is over, which step together; the pass that ends with it.
        self.ready: dict[Tensor, Held] = {}
        self._ready_entries, self._pass = 0, -1
        # Step of each weight's last refresh: a step that is begun again, after its gradient was dropped, has had it.
        self._refreshed: dict[Tensor, int] = {}
        self._last_norm, self._warned = 0.0, set[str]()
        # Several threads may call backward at once.
        self._taking = threading.RLock()
        # Ends a weight's step inside backward; None: `optimizer.step()` does.
        self.layerwise: CompactLayerwise | None = None
        # One line: what is compact and what is not.
        self.summary = ""
        for layer in layers:
            hand_over(layer, self.take)
            item = optimizer.items.of(layer.weight)
            if deferred and can_be_deferred(item) and deferred_of(layer.weight) is None:
                defer(layer.weight, item.blocks[0].layout)

    def detach(self) -> None:
        """Make the layers ordinary ones again; what they handed over is dropped."""
        if self.layerwise is not None:
            self.layerwise.detach()
        for layer in self.layers:
            undefer(layer.weight)
            take_back(layer)
        self.forget()
        self.optimizer.compact = None

    def merge(self) -> None:
        """Put what deferred weights have pending into them."""
        for layer in self.layers:
            deferred = deferred_of(layer.weight)
            if deferred is not None:
                deferred.merge_()

    def forget(self, *, state_changed: bool = False) -> None:
        """Drop what was handed over, and with another state what is known of the old one."""
        self._held, self.ready, self._ready_entries = {}, {}, 0
        if self.layerwise is not None:
            self.layerwise.forget()
        if state_changed:
            self._refreshed = {}

    def take(self, weight: Tensor, factors: GradientFactors) -> None:
        """Take one micro-batch's gradient of a weight, in factors; called from backward, where no graph is built."""
        if weight.numel() > 0:
            with self._taking, full_precision():
                self._take(weight, factors)

    def _take(self, weight: Tensor, factors: GradientFactors) -> None:
        held = self._held.get(weight)
        if held is None:
            if self.layerwise is not None:
                self.layerwise.begin(weight)
            held = self._held[weight] = Held(self.optimizer.items.of(weight))
        if held.poisoned:
            return
        if held.pendings:
            self._add(held, factors)
        elif not sees_whole(held.item):
            near = self.layerwise is not None and self.accumulation_steps == 1
            held.pendings = list(begin_compact(held.item, factors, keep_positions=near))
        elif self.accumulation_steps == 1 or self.layerwise is not None:
            self._begin_whole(held, held.dense(factors), factors)
        else:
            held.join(factors)

    def _add(self, held: Held, factors: GradientFactors) -> None:
        """Add a micro-batch to a step that has begun."""
        if sees_whole(held.item):
            if self.layerwise is None:
                held.warn_of_second_pass(self._warned, self.accumulation_steps)
            self._add_whole(held, held.dense(factors))
            return
        for pending in held.pendings:
            add_compact_(pending, factors.take(pending.block))

    def _add_whole(self, held: Held, grad: Tensor) -> None:
        if not math.isfinite(norm_of(grad)):  # before it is in a sketch, or among what ranks positions
            held.poisoned = True
            return
        for pending in held.pendings:
            add_gradient_(pending, grad)

    def _begin_whole(self, held: Held, grad: Tensor, factors: GradientFactors | None = None) -> None:
        """Begin a step that must see the gradient; only compact parts of it live on."""
        item = held.item
        norm = norm_of(grad)
        if not math.isfinite(norm):
            held.poisoned = True
            return
        if norm == 0 and item.due_next():
            return  # nothing to fit to: the weight waits
        t = steps_done(item.state) + 1
        held.pendings = list(begin(item, grad, may_refresh=self._refreshed.get(item.weight) != t))
        self._refreshed[item.weight] = t
        for pending in held.pendings:
            keep_compact_parts(pending)
            if self.layerwise is not None and self.accumulation_steps > 1:
                continue  # more of the gradient is to come, so a residual without warm-up starts late, as in layerwise
            pending.ctx.late = False
            if residual_starts_now(pending.method, t):  # its positions are not known before the update is
                own = factors.take(pending.block) if factors else None
                pending.ctx.entries = own.entries if own else entries_of(pending.block.take(grad))

    def complete(self) -> None:
        """Begin the steps that have waited for the sum, and add gradients that came without their factors."""
        for weight, held in self._held.items():
            self._complete(weight, held)

    def _complete(self, weight: Tensor, held: Held) -> None:
        whole, factors = held.take_sum()
        if whole is not None:
            self._begin_whole(held, whole, factors)
        if weight.grad is not None:  # used outside its layer too
            grad, weight.grad = weight.grad, None
            if held.pendings and not held.poisoned:
                self._add_whole(held, grad)
            elif not held.poisoned:  # what came in factors was all zero
                self._begin_whole(held, grad)
            self._stop_deferring(weight, held.item.name)

    def holds(self, weight: Tensor) -> bool:
        """Return whether a step of a weight is in progress."""
        return weight in self._held

    @torch.no_grad()
    @full_precision()
    def finish_layerwise(self, weight: Tensor) -> None:
        """Step one weight with what its layers handed over; within this backward pass, with the next few."""
        held = self._held.pop(weight)
        self._complete(weight, held)
        current = torch._C._current_graph_task_id()
        if current not in (-1, self._pass):  # at the end of the pass, if not before; -1: `step()` asks, which does it
            torch.autograd.Variable._execution_engine.queue_callback(self.finish_ready)
            self._pass = current
        self.ready[weight] = held
        self._ready_entries += sum(pending.ctx.low.numel() for pending in held.pendings)
        if self._ready_entries >= READY.get(weight.device.type, READY["cpu"]):
            self.finish_ready()

    @torch.no_grad()
    @full_precision()
    def finish_ready(self) -> None:
        """Step the weights whose backward pass is over."""
        if self.ready and self.layerwise is not None:
            ready, self.ready, self._ready_entries = list(self.ready.values()), {}, 0
            self._finish(ready, self.layerwise.clip_(ready))

    def _stop_deferring(self, weight: Tensor, name: str) -> None:
        """Step a weight directly from now on that is read outside its layer, where what is pending is not added."""
        deferred = deferred_of(weight)
        if deferred is not None:
            if deferred.is_pending:
                logger.warning("%s is used outside its layer, without its pending update: not deferred any more.", name)
            undefer(weight)

    @torch.no_grad()
    @full_precision()
    def grad_norm(self) -> float:
        """Return the norm of the step in progress, before clipping; after the step, of that one.

        It is the norm of what is applied: compact gradients of low-rank weights, whole ones of the others.
        """
        norms, whole = self._norms()
        if norms or whole:
            self._last_norm = math.sqrt(sum(norm**2 for norm in [*norms, *whole]))
        return self._last_norm

    def _norms(self) -> tuple[list[float], list[float]]:
        """Return the norm of each weight that was handed over, NaN of those that will be skipped; and of whole ones."""
        self.complete()
        held = self._held.values()
        lows = [pending.ctx.low for one in held for pending in one.pendings]
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = iter(norms_of([*lows, *grads]))
        own = [math.hypot(*(next(norms) for _ in one.pendings), *(math.nan,) * one.poisoned) for one in held]
        return own, list(norms)

    @torch.no_grad()
    @full_precision()
    def finish_step(self, *, factor: float = 1.0) -> None:
        """Step every weight whose gradient was handed over; clip those and the gradients of the others.

        Args:
            factor: on all gradients before anything else: 1 / loss scale.
        """
        if self.layerwise is not None:
            return  # `Layerwise.finish_step` has asked for what was left
        self.complete()
        self._scale(factor)
        own, whole = self._norms()
        if own or whole:
            self._last_norm = math.sqrt(sum(norm**2 for norm in [*own, *whole]))
        if self.max_grad_norm is not None:  # of what is applied: weights with a gradient that is not finite are skipped
            norm = math.sqrt(sum(norm**2 for norm in [*own, *whole] if math.isfinite(norm)))
            self._scale(min(1.0, self.max_grad_norm / (norm + EPS)))
        held, self._held = list(self._held.values()), {}
        self._finish(held, own)

    def _finish(self, held: list[Held], norms: list[float]) -> None:
        """Step weights, but for those whose norm is not finite."""
        waiting: dict[int, list[Pending]] = defaultdict(list)
        foreach = self.optimizer.foreach is not False and len(held) > 1
        skipped = []
        for one, norm in zip(held, norms, strict=True):
            if not math.isfinite(norm):
                skipped.append(one.item.name)
                continue
            item = self.optimizer.items.of(one.item.weight)  # a scheduler may have stepped
            if not one.pendings:
                undeferred = deferred_of(item.weight)
                if undeferred is not None:
                    undeferred.merge_()
                wait(item, torch.zeros_like(item.weight))
            else:
                for pending in one.pendings:
                    pending.ctx.hp = item.hp
                    if foreach and not pending.block.interleaved:
                        waiting[one.item.group].append(pending)
                    else:
                        finish_deferred(pending)
                advance(one.item.state)
        for group in waiting.values():
            finish_many(group, finish_deferred)
        if skipped:
            self.optimizer.count_skips(skipped)

    def _scale(self, factor: float) -> None:
        if factor == 1.0:
            return
        for held in self._held.values():
            for pending in held.pendings:
                scale_(pending, factor)
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(factor)
