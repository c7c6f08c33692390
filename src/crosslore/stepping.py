"""From a weight with its gradient to the step of its blocks: the loop path and the foreach path."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from crosslore.compiled import compiled_step, step_numbers, suits
from crosslore.config import Hyper, LowRankConfig
from crosslore.layout import Block
from crosslore.registry import build_rule
from crosslore.residuals.base import StepContext
from crosslore.step import Method, apply_update_, compact_gradient, fullrank_step, init_state, method_of

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


def step_items(
    items: list[Item], grads: list[Tensor], zeros: list[bool], *, foreach: bool, compiled: bool = False
) -> None:
    """Do one step of every item.

    Args:
        items: weights with state.
        grads: their finite gradients.
        zeros: which gradients are all zero: those weights only decay while a basis is due.
        foreach: work on all compact tensors of a group at once; the same numbers, more of them alive.
        compiled: take the compiled graph for ordinary steps.
    """
    waiting: dict[int, list[Pending]] = defaultdict(list)
    for item, grad, zero in zip(items, grads, zeros, strict=True):
        if not item.blocks:
            full_step(item, grad)
        elif zero and item.due_next():
            wait(item, grad)
        elif not (compiled and step_compiled(item, grad)):
            t = advance(item.state)
            for pending in begin(item, grad, t):
                if foreach and not needs_whole_gradient(pending.method):
                    waiting[item.group].append(pending)
                else:
                    finish(pending)
    for group in waiting.values():
        finish_many(group)


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


def begin(item: Item, grad: Tensor, t: int) -> Iterator[Pending]:
    """Yield each block with its compact gradient; what the block's state has become is written back."""
    for block in item.blocks:
        method = method_of(item.config, block)
        matrix, part = block.take(grad), block_state(item.state, block.key)
        # Of a fused weight one part may be all zero; asked at a refresh only.
        asked = block.span is not None and method.projector.fitted and method.refresh.due(t)
        may_fit = not asked or bool(matrix.any())
        name = draw_name(item.name, block.key)
        ctx = compact_gradient(matrix, part, method, block.layout, item.hp, t, name=name, may_fit=may_fit)
        write_back(item.state, block.key, part)
        yield Pending(item, block, method, ctx)


def finish(pending: Pending, update: Tensor | None = None) -> None:
    """Turn the compact gradient into an update and apply it."""
    item, block, ctx = pending.item, pending.block, pending.ctx
    if update is None:
        update = pending.method.rule.update(ctx.low, ctx.state, ctx.t, ctx.hp)
    matrix = block.take(item.weight)
    apply_update_(matrix, update, pending.method, ctx)
    write_back(item.state, block.key, ctx.state)
    block.put_(item.weight, matrix)


def finish_many(pendings: list[Pending]) -> None:
    """Do the same for many blocks of one group, the rule on all of them at once."""
    rule, hp = pendings[0].method.rule, pendings[0].ctx.hp
    contexts = [pending.ctx for pending in pendings]
    steps = [ctx.t for ctx in contexts]
    updates = rule.update_many([ctx.low for ctx in contexts], [ctx.state for ctx in contexts], steps, hp)
    for pending, update in zip(pendings, updates, strict=True):
        finish(pending, update)


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
