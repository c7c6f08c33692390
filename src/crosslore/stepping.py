"""From a weight with its gradient to the step of its blocks: the loop path and the foreach path."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosslore.compiled import compiled_step, step_numbers, suits
from crosslore.config import Hyper, LowRankConfig
from crosslore.groups import largest_of_each
from crosslore.layout import Block
from crosslore.observing import Observer, all_refreshing
from crosslore.registry import build_rule
from crosslore.residuals.base import StepContext
from crosslore.step import Method, apply_update_, compact_gradient, fullrank_step, init_state, method_of

if TYPE_CHECKING:
    from crosslore.compact.factors import GradientFactors

State = dict[str, Tensor]


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch the caller's autocast off: the products of a step are as precise as its tensors."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@dataclass(frozen=True, kw_only=True)
class Item:
    """One weight, what its group says about it, and its state."""

    weight: Tensor
    state: State
    blocks: list[Block]
    config: LowRankConfig
    hp: Hyper
    name: str
    # Index of its group: items of one group share their options.
    group: int
    # Who looks on; see crosslore.observing.
    observers: Sequence[Observer] = ()

    def due_next(self) -> bool:
        """Return whether the next step fits a basis to the gradient."""
        t = steps_done(self.state) + 1
        methods = (method_of(self.config, block) for block in self.blocks)
        return any(method.projector.fitted and method.refresh.due(t) for method in methods)


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
    return t > 1 and all(method_of(item.config, block).ordinary(t) for block in item.blocks)


def step_compiled(item: Item, grad: Tensor) -> bool:
    """Do an ordinary step of every block by the compiled graph; return False, with nothing done, if one is not."""
    t = steps_done(item.state) + 1
    methods = [method_of(item.config, block) for block in item.blocks]
    if not all(suits(method, item.hp, block.take(grad), t) for method, block in zip(methods, item.blocks, strict=True)):
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
    for block in item.blocks:
        method = method_of(item.config, block)
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
    """Do the same for many blocks of one group, the rule on all of them at once."""
    rule, hp = pendings[0].method.rule, pendings[0].ctx.hp
    contexts = [pending.ctx for pending in pendings]
    ages = [ctx.age for ctx in contexts]
    updates = rule.update_many([ctx.low for ctx in contexts], [ctx.state for ctx in contexts], ages, hp)
    for pending, update in zip(pendings, updates, strict=True):
        apply(pending, update)


def full_step(item: Item, grad: Tensor) -> None:
    """Do one step of a weight at full rank."""
    t = advance(item.state)
    rule = build_rule(item.config.rule, eps_placement=item.config.eps_placement)
    fullrank_step(item.weight, grad, item.state, rule, Hyper(**{**asdict(item.hp), "scale": 1.0}), t, name=item.name)


def wait(item: Item, grad: Tensor) -> None:
    """Decay a weight whose basis is due but whose gradient is zero; its state is allocated, its step stays."""
    item.weight.mul_(item.hp.weight_factor)
    for block in item.blocks:
        if not block_state(item.state, block.key):
            fresh = init_state(block.take(grad), method_of(item.config, block), block.layout)
            write_back(item.state, block.key, fresh)


def complete_state_(item: Item) -> None:
    """Add the tensors that a checkpoint of an older version lacks, as they are before the first step."""
    if item.state.keys() <= {"step"}:
        return
    for block in item.blocks:
        fresh = init_state(block.take(item.weight), method_of(item.config, block), block.layout)
        write_back(item.state, block.key, fresh | block_state(item.state, block.key))


def needs_whole_gradient(method: Method) -> bool:
    """Return whether the method cannot do with compact parts of a gradient."""
    return method.residual is not None and method.residual.needs_whole_gradient


def block_state(state: State, key: str) -> State:
    """Return a block's own tensors, without the prefix of their keys."""
    return {k.removeprefix(key): v for k, v in state.items() if k.startswith(key) and k != "step"}


def write_back(state: State, key: str, part: State) -> None:
    """Put a block's tensors into the weight's state."""
    state.update({f"{key}{k}": v for k, v in part.items()})


def draw_name(name: str, key: str) -> str:
    """Return the name that seeds a block's draws: a part of a fused weight is named as a separate one would be."""
    return f"{name.rsplit('.', 2)[0]}.{key}weight" if key else name


def steps_done(state: State) -> int:
    """Return the steps of a weight so far; the counter lives on the CPU, so reading it asks no device."""
    if "step" not in state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
    return int(state["step"].item())


def advance(state: State) -> int:
    """Count one step and return its number."""
    t = steps_done(state) + 1
    state["step"] += 1
    return t
