"""From a weight with its gradient to the step of its blocks: the loop path and the foreach path."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate, takewhile
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosslore.compiled import compiled_step, step_numbers, suits
from crosslore.config import Hyper
from crosslore.groups import largest_of_each
from crosslore.items import Item, advance, block_state, draw_name, steps_done, write_back
from crosslore.layout import Block
from crosslore.observing import all_refreshing
from crosslore.registry import build_rule
from crosslore.residuals.base import StepContext
from crosslore.rules.base import Rule
from crosslore.step import Method, apply_update_, compact_gradient, fullrank_step, init_state

if TYPE_CHECKING:
    from crosslore.compact.factors import GradientFactors


# Entries of compact gradients that a rule takes at once: updates of so many are alive together; on a CPU they should
# be in its cache still when they are applied.
AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 25}


class full_precision(ContextDecorator):  # noqa: N801  # as torch.no_grad
    """Switch the caller's autocast off: the products of a step are as precise as its tensors."""

    def __enter__(self) -> None:
        """Switch off what is on; asking is cheaper than switching off what is off."""
        self._off = ExitStack()
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                self._off.enter_context(torch.autocast(device, enabled=False))

    def __exit__(self, *_: object) -> None:
        """Switch it on again."""
        self._off.close()

    def _recreate_cm(self) -> "full_precision":
        return full_precision()  # each call of a decorated function has its own


@dataclass
class Pending:
    """One block between its compact gradient and its update."""

    item: Item
    block: Block
    method: Method
    ctx: StepContext


@dataclass
class Turn:
    """One weight's step before anything has changed."""

    item: Item
    grad: Tensor
    # Whether the compact gradient says that the gradient is finite; see `compact_tells`.
    tells: bool
    pendings: list[Pending] = field(default_factory=list)

    def begin_(self) -> None:
        """Compute the compact gradient of every block."""
        self.pendings = list(begin(self.item, self.grad))

    def evidence(self) -> list[Tensor]:
        """Return what is to be looked at; nothing before a compact gradient is there."""
        return [pending.ctx.low for pending in self.pendings] if self.tells else [self.grad]


def step_items(items: list[Item], grads: list[Tensor], *, foreach: bool, compiled: bool = False) -> list[str]:
    """Do one step of every item, and return the names of those whose gradient is not finite: nothing of them changes.

    Whether a gradient is finite is read off its compact form where a step is ordinary (`compact_tells`), which spares a
    pass over the gradient; of all weights at once on a GPU, with one transfer.

    Args:
        items: weights with state.
        grads: their gradients.
        foreach: work on all compact tensors of a group at once; the same numbers, more of them alive.
        compiled: take the compiled graph for ordinary steps.
    """
    at_once = foreach or any(grad.is_cuda for grad in grads)
    turns = [Turn(item, grad, not compiled and compact_tells(item)) for item, grad in zip(items, grads, strict=True)]
    for turn in turns:
        if at_once and any(block.interleaved for block in turn.item.blocks):
            turn.tells = False  # the copies of all of them would be alive together
        if turn.tells and at_once:
            turn.begin_()
    peaks = largest_of_each([turn.evidence() for turn in turns])
    waiting: dict[int, list[Pending]] = defaultdict(list)
    skipped = []
    for turn, peak in zip(turns, peaks, strict=True):
        item, grad = turn.item, turn.grad
        if turn.tells and not at_once:
            turn.begin_()
            (peak,) = largest_of_each([turn.evidence()])
        if peak == inf:
            skipped.append(item.name)
        elif not item.blocks:
            full_step(item, grad)
        elif not turn.tells and peak == 0 and item.due_next():
            wait(item, grad)
        elif not (compiled and step_compiled(item, grad)):
            for pending in turn.pendings or begin(item, grad):
                if foreach and not (needs_whole_gradient(pending.method) or pending.block.interleaved):
                    waiting[item.group].append(pending)
                else:
                    finish(pending)
            turn.pendings = []
            advance(item.state)
    for group in waiting.values():
        finish_many(group)
    return skipped


def compact_tells(item: Item) -> bool:
    """Return whether the next step's compact gradient is all that is needed to know that the gradient is finite.

    Every entry of a gradient goes into it, and infinity times anything is not finite. At a refresh, and while a window
    collects its sketch, the gradient does more than that before its compact form is known, and so it does where a
    residual prepares it.
    """
    if not item.blocks or "step" not in item.state:  # a skipped first step leaves no state at all
        return False
    t = steps_done(item.state) + 1
    return t > 1 and all(method.ordinary(t) for method in item.methods)


def step_compiled(item: Item, grad: Tensor) -> bool:
    """Do an ordinary step of every block by the compiled graph; return False, with nothing done, if one is not."""
    t = steps_done(item.state) + 1
    pairs = zip(item.methods, item.blocks, strict=True)
    if not all(suits(method, item.hp, block.take(grad), t) for method, block in pairs):
        return False
    advance(item.state)
    numbers = step_numbers(item.hp, t, item.config.eps_placement, grad.device)
    for block in item.blocks:
        matrix, part = block.take(item.weight), block_state(item.state, block.key)
        tensors = (part["basis"], part["exp_avg"], part["exp_avg_sq"])
        compiled_step()(matrix, block.take(grad), *tensors, numbers, left=block.layout.side == "left")
        block.put_(item.weight, matrix)
    return True


def begin(item: Item, grad: Tensor, *, may_refresh: bool = True) -> Iterator[Pending]:
    """Yield each block with its compact gradient of the next step; what its state has become is written back.

    Args:
        item: the weight.
        grad: its gradient.
        may_refresh: False keeps basis and moments even if a refresh is due, because this step has done it already.
    """
    t = steps_done(item.state) + 1
    for block, method in zip(item.blocks, item.methods, strict=True):
        matrix, part = block.take(grad), block_state(item.state, block.key)
        # Of a fused weight one part may be all zero; asked at a refresh only.
        asked = block.span is not None and method.projector.fitted and method.refresh.due(t)
        says_nothing = asked and not bool(matrix.any()) and not ("sketch" in part and bool(part["sketch"].any()))
        may_fit = may_refresh and not says_nothing
        name = draw_name(item.name, block.key)
        watched = item.observers and may_refresh and method.refresh.due(t)
        with all_refreshing(item.observers, matrix) if watched else nullcontext():
            ctx = compact_gradient(matrix, part, method, block.layout, item.hp, t, name=name, may_fit=may_fit)
        write_back(item.state, block.key, part)
        yield shown(Pending(item, block, method, ctx))


def shown(pending: Pending, *, factors: "GradientFactors | None" = None) -> Pending:
    """Return a block at the beginning of its step, after the optimizer's observers have seen it."""
    pending.ctx.observers = pending.item.observers
    for observer in pending.item.observers:
        observer.on_gradient(pending, factors=factors)
    return pending


def finish(pending: Pending, update: Tensor | None = None) -> None:
    """Turn the compact gradient into an update and apply it."""
    item, block, ctx = pending.item, pending.block, pending.ctx
    if update is None:
        update = pending.method.rule.update(ctx.low, ctx.state, ctx.age, ctx.hp)
    matrix = block.take(item.weight)
    apply_update_(matrix, update, pending.method, ctx)
    write_back(item.state, block.key, ctx.state)
    block.put_(item.weight, matrix)


def finish_many(pendings: list[Pending], apply: Callable[[Pending, Tensor], None] = finish) -> None:
    """Do the same for many blocks of one group, the rule on as many of them at once as `AT_ONCE` allows."""
    rule, hp = pendings[0].method.rule, pendings[0].ctx.hp
    limit = AT_ONCE.get(pendings[0].ctx.low.device.type, AT_ONCE["cpu"])
    while pendings:
        entries = accumulate(pending.ctx.low.numel() for pending in pendings)
        count = max(1, sum(1 for _ in takewhile(lambda total: total <= limit, entries)))
        some, pendings = pendings[:count], pendings[count:]
        contexts = [pending.ctx for pending in some]
        ages = [ctx.age for ctx in contexts]
        updates = rule.update_many([ctx.low for ctx in contexts], [ctx.state for ctx in contexts], ages, hp)
        for pending, update in zip(some, updates, strict=True):
            apply(pending, update)
        del update, updates  # before those of the next group are made


def full_step(item: Item, grad: Tensor) -> None:
    """Do one step of a weight at full rank."""
    t = advance(item.state)
    fullrank_step(item.weight, grad, item.state, rule_of(item), hyper_of_full_rank(item), t, name=item.name)


def rule_of(item: Item) -> Rule:
    """Return the rule of a weight at full rank."""
    return build_rule(item.config.rule, eps_placement=item.config.eps_placement)


def hyper_of_full_rank(item: Item) -> Hyper:
    """Return the numbers of a step at full rank, which `scale` does not concern."""
    return replace(item.hp, scale=1.0)


def wait(item: Item, grad: Tensor) -> None:
    """Decay a weight whose basis is due but whose gradient is zero; its state is allocated, its step stays."""
    item.weight.mul_(item.hp.weight_factor)
    for block, method in zip(item.blocks, item.methods, strict=True):
        if not block_state(item.state, block.key):
            fresh = init_state(block.take(grad), method, block.layout)
            write_back(item.state, block.key, fresh)


def complete_state_(item: Item) -> None:
    """Add the tensors that a checkpoint of an older version lacks, as they are before the first step."""
    if item.state.keys() <= {"step"}:
        return
    for block, method in zip(item.blocks, item.methods, strict=True):
        fresh = init_state(block.take(item.weight), method, block.layout)
        write_back(item.state, block.key, fresh | block_state(item.state, block.key))


def needs_whole_gradient(method: Method) -> bool:
    """Return whether the method cannot do with compact parts of a gradient."""
    return method.residual is not None and method.residual.needs_whole_gradient
