"""Layerwise: each weight steps inside backward as soon as its gradient is there, and the gradient is freed.

It is the same optimizer: the hooks step its weights with its groups' options, so learning-rate schedulers,
`state_dict` and resume work as without it. With gradient accumulation each micro-batch leaves its compact gradient
(and the gradient at the kept positions of the residual) behind, never the gradient itself; a basis that is due is
fitted to the first micro-batch (with a fit window: to the sketch of the steps before).
"""

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from crosslore.accumulation import add_gradient_, keep_compact_parts, norm_of, scale_
from crosslore.checks import check_limits, refuse_several_processes
from crosslore.hooks import GradientHook, refuse_other_layerwise
from crosslore.items import Item, advance, steps_done
from crosslore.stepping import (
    Pending,
    begin,
    finish,
    full_precision,
    full_step,
    needs_whole_gradient,
    wait,
)

if TYPE_CHECKING:
    from crosslore.optimizer import LowRankOptimizer

logger = logging.getLogger(__name__)

Clip = Literal["weight", "stale-global"]
# Added to a norm before dividing by it, as torch.nn.utils.clip_grad_norm_.
EPS = 1e-6
# Key of the first group under which the last step's norm is saved: "stale-global" needs it after a resume.
NORM_KEY = "last_grad_norm"


@dataclass
class Collected:
    """What the micro-batches of one step have left of a low-rank weight's gradient."""

    pendings: list[Pending] = field(default_factory=list)


class Layerwise:
    """The hooks of one optimizer, and what they hold between micro-batches. `attach_layerwise` makes one."""

    def __init__(
        self,
        optimizer: "LowRankOptimizer",
        *,
        accumulation_steps: int,
        max_grad_norm: float | None,
        clip: Clip,
        others: frozenset[int] = frozenset(),
    ) -> None:
        """Register one hook for each trained weight but `others`, which somebody else steps; ids."""
        self.optimizer = optimizer
        self.accumulation_steps = accumulation_steps
        self.max_grad_norm, self.clip = max_grad_norm, clip
        self._collected: dict[Tensor, Collected] = {}
        self._counts: dict[Tensor, int] = {}
        # Norm of each weight's last gradient.
        self._norms: dict[Tensor, float] = {}
        self._squares: list[float] = []
        self._poisoned: set[Tensor] = set()
        # Step of each weight's last refresh: a step that is begun again, after a micro-batch was lost, has had it.
        self._refreshed: dict[Tensor, int] = {}
        # Weights that have stepped since the last `optimizer.step()`.
        self._stepped: set[Tensor] = set()
        self._warned = False
        self._handles: list[Any] = []  # Any: torch's handles
        self.watch([p for group in optimizer.param_groups for p in group["params"] if id(p) not in others])

    def watch(self, weights: list[Tensor]) -> None:
        """Register the hooks of trained weights; frozen ones have no gradient."""
        trained = [weight for weight in weights if weight.requires_grad]
        self._handles += [weight.register_post_accumulate_grad_hook(GradientHook(self)) for weight in trained]

    def detach(self) -> None:
        """Remove the hooks; the optimizer then steps in `step()` as usual. What was collected is stepped first."""
        self.finish_step()
        for handle in self._handles:
            handle.remove()
        self.optimizer.layerwise = None
        if self.optimizer.compact is not None and self.optimizer.compact.layerwise is not None:
            self.optimizer.compact.detach()

    @torch.no_grad()
    @full_precision()
    def on_gradient(self, weight: Tensor) -> None:
        """Take one micro-batch's gradient of a weight; step it if it is the last one."""
        if weight.numel() == 0:
            return
        self._collect(weight)
        self._counts[weight] = self._counts.get(weight, 0) + 1
        if self._counts[weight] == self.accumulation_steps:
            self._flush(weight)

    def _collect(self, weight: Tensor) -> None:
        """Turn the gradient of a low-rank weight into compact parts; one at full rank stays in `.grad`."""
        grad, item = weight.grad, self.optimizer.items.of(weight)
        assert grad is not None
        if grad.is_sparse:
            raise RuntimeError("sparse gradients are not supported. Use nn.Embedding(sparse=False).")
        norm = self._norms[weight] = norm_of(grad)
        if not math.isfinite(norm):
            self._poisoned.add(weight)
        if not item.blocks:
            return
        weight.grad = None
        held = self._collected.setdefault(weight, Collected())
        if weight in self._poisoned or (norm == 0 and (held.pendings or item.due_next())):
            return
        if held.pendings:
            for pending in held.pendings:
                add_gradient_(pending, grad)
        else:
            held.pendings = self._begin(item, grad, norm)

    def _begin(self, item: Item, grad: Tensor, norm: float) -> list[Pending]:
        """Return the blocks of the first micro-batch; of several, only the compact parts live on."""
        whole = any(map(needs_whole_gradient, item.methods))
        if whole and self.max_grad_norm is not None:
            grad.mul_(self._clip_factor(norm))
        t = steps_done(item.state) + 1
        pendings = list(begin(item, grad, may_refresh=self._refreshed.get(item.weight) != t))
        if any(pending.method.refresh.due(t) for pending in pendings):
            self._refreshed[item.weight] = t
        if self.accumulation_steps > 1:
            for pending in pendings:
                keep_compact_parts(pending)
        return pendings

    def _flush(self, weight: Tensor) -> None:
        """Step one weight with what was collected, and forget it."""
        item = self.optimizer.items.of(weight)
        self.warn_of_second_step(weight, item.name)
        held, grad = self._collected.pop(weight, None), weight.grad
        self._counts.pop(weight, None)
        if weight in self._poisoned:
            self._poisoned.discard(weight)
            self.optimizer.count_skips([item.name])
        elif held is not None and held.pendings:
            self._flush_compact(item, held)
        elif held is not None:
            wait(item, torch.zeros_like(weight))
        elif grad is not None:
            factor = self.take_norm(self._norms[weight])  # of what `.grad` has accumulated
            if factor < 1:
                grad.mul_(factor)
            full_step(item, grad)
        weight.grad = None

    def warn_of_second_step(self, weight: Tensor, name: str) -> None:
        """Warn once if a weight steps twice between two calls of `optimizer.step()`."""
        if weight in self._stepped and not self._warned:
            self._warned = True
            logger.warning(
                "%s steps more than once between two calls of optimizer.step(), with accumulation_steps=%d. Set "
                "accumulation_steps to the backward passes of a step, and call optimizer.step() after them.",
                name,
                self.accumulation_steps,
            )
        self._stepped.add(weight)

    def _flush_compact(self, item: Item, held: Collected) -> None:
        clips = self.max_grad_norm is not None and self.clip == "weight"
        if clips or self.accumulation_steps > 1:  # else nobody asks for it, and it waits for the device
            compact = math.sqrt(sum(norm_of(pending.ctx.low) ** 2 for pending in held.pendings))
        else:
            compact = 0.0
        norm = self._norms[item.weight] if self.accumulation_steps == 1 else compact
        self._squares.append(norm * norm)
        factor = self._clip_factor(compact) if self.max_grad_norm is not None else 1.0
        advance(item.state)
        for pending in held.pendings:
            if factor < 1 and not needs_whole_gradient(pending.method):
                scale_(pending, factor)
            finish(pending)

    @property
    def clips_by_own_norm(self) -> bool:
        """Whether a weight's gradient is limited by its own norm, which must then be known first."""
        return self.max_grad_norm is not None and self.clip == "weight"

    def take_norm(self, norm: float) -> float:
        """Enter a weight's norm into the books; return what clipping multiplies its gradient by."""
        self.enter_norm(norm)
        return self.clip_factor(norm)

    def enter_norm(self, norm: float) -> None:
        """Enter a weight's norm into the books."""
        self._squares.append(norm * norm)

    def clip_factor(self, norm: float = 0.0) -> float:
        """Return what clipping multiplies a weight's gradient by; its norm matters if `clips_by_own_norm`."""
        return self._clip_factor(norm) if self.max_grad_norm is not None else 1.0

    def _clip_factor(self, norm: float) -> float:
        """Return what a weight's gradient is multiplied by, given its own norm."""
        assert self.max_grad_norm is not None
        reference = norm if self.clip == "weight" else self.optimizer.param_groups[0].get(NORM_KEY, 0.0)
        return min(1.0, self.max_grad_norm / (reference + EPS))

    @torch.no_grad()
    @full_precision()
    def finish_micro_batches(self) -> None:
        """Step the weights that have seen fewer micro-batches than expected."""
        for weight in list(self._counts):
            self._flush(weight)
        compact = self.optimizer.compact
        if compact is not None and compact.layerwise is not None:
            compact.layerwise.finish_micro_batches()

    def finish_step(self) -> None:
        """Step what is left and close the step's books."""
        self.finish_micro_batches()
        self._stepped = set()
        if self._squares:
            self.optimizer.param_groups[0][NORM_KEY] = math.sqrt(sum(self._squares))
            self._squares = []

    def forget(self, *, state_changed: bool = False) -> None:
        """Drop what was collected, and with another state what is known of the old one."""
        if state_changed:
            self._refreshed = {}
        self._collected, self._counts, self._norms, self._squares, self._poisoned = {}, {}, {}, [], set()

    def grad_norm(self) -> float:
        """Return the norm of the gradient of the step in progress or, after it, of the last one; before clipping.

        It is the full gradient's norm without accumulation, else that of its compact parts.
        """
        if self._squares:
            return math.sqrt(sum(self._squares))
        return float(self.optimizer.param_groups[0].get(NORM_KEY, 0.0))


def attach_layerwise(
    optimizer: "LowRankOptimizer",
    *,
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    clip: Clip = "weight",
) -> Layerwise:
    """Let the weights of `optimizer` step inside backward; `optimizer.step()` is still called once per step.

    Args:
        optimizer: its weights get one hook each.
        accumulation_steps: backward passes per step. A step with fewer is finished by `optimizer.step()`.
        max_grad_norm: largest norm; None: no clipping.
        clip: what is compared with it. "weight": each weight's own compact gradient (at full rank: its gradient),
            which then has at most this norm by itself. "stale-global": the norm of all gradients of the *previous*
            step, by which all weights are scaled alike; the first step is not clipped.

    Returns:
        The handle, which is also `optimizer.layerwise`; `detach()` ends it.

    Raises:
        TypeError, ValueError: an argument is out of range, or the method needs the sum of all gradients of a step
            and `accumulation_steps` is not 1, or several processes train together.
    """
    if not hasattr(optimizer, "layerwise"):
        raise TypeError(
            f"attach_layerwise takes a LowRankOptimizer, got {type(optimizer).__name__}. Use create_optimizer."
        )
    check_limits(accumulation_steps, max_grad_norm, clip)
    named = [(optimizer.items.name_of(p), p) for group in optimizer.param_groups for p in group["params"]]
    refuse_other_layerwise(named, optimizer)
    for mode in ("layerwise", "compact"):
        if getattr(optimizer, mode) is not None:
            raise ValueError(f"the optimizer is {mode} already. Call `optimizer.{mode}.detach()` first.")
    refuse_several_processes("layerwise")
    if accumulation_steps > 1:
        _refuse_whole_gradients(optimizer, accumulation_steps)
    optimizer.param_groups[0].setdefault(NORM_KEY, 0.0)  # so that distributed checkpoints have a place for it
    optimizer.layerwise = Layerwise(
        optimizer, accumulation_steps=accumulation_steps, max_grad_norm=max_grad_norm, clip=clip
    )
    return optimizer.layerwise


def _refuse_whole_gradients(optimizer: "LowRankOptimizer", accumulation_steps: int) -> None:
    for group in optimizer.param_groups:
        if any(group["blocks"]) and group["residual"] not in (None, "sparse"):
            raise ValueError(
                f"accumulation_steps must be 1 for layerwise with residual={group['residual']!r}, got "
                f"{accumulation_steps}: it needs the sum of all gradients of a step, not their compact parts. "
                "Use a larger batch, or step with full gradients."
            )
