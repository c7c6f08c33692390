"""Bytes of weights, gradients and state of one method, from the optimizer that it would train with."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from crosslore.compact.attach import compact_layers, low_rank_weights
from crosslore.compact.deferred import can_be_deferred
from crosslore.estimate.methods import Method, Setting
from crosslore.estimate.temporaries import dora_temporary_bytes, refresh_bytes
from crosslore.factory import create_optimizer
from crosslore.items import Item
from crosslore.memory import block_bytes, item_bytes, state_bytes, state_itemsize
from crosslore.optimizer import LowRankOptimizer
from crosslore.targets import embedding_weights, select_targets


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """Bytes of what a training run holds besides activations."""

    # The model, and adapters.
    weights: int
    # Most gradients that live at the same time, in the form in which they are held.
    gradients: int
    # Step counters, bases, moments; the residual's share apart.
    state: int
    residual: int
    # Compact updates that wait beside deferred weights.
    deferred: int
    # Largest temporary of fitting a basis, one weight at a time.
    refresh: int
    # What the loss meets of earlier micro-batches' gradients.
    carried: int
    # Whole gradients at the beginning of backward, where all activations are, on top of `carried`.
    passing: int
    # Gradients at the end of backward, where no activations are; a tied embedding's three times.
    ending: int
    # Temporaries of `step()` besides a refresh: compact gradients and updates of all weights.
    step: int
    # What waits in place of R in the first step until all micro-batches are there: every basis is fitted then.
    first_step: int

    @property
    def fixed(self) -> int:
        """What is there all the time."""
        return self.weights + self.state + self.residual + self.deferred


def count(model: nn.Module, method: Method, setting: Setting) -> Tensors:
    """Return the bytes of one method on a model of torch's meta device, which is as before afterwards.

    Raises:
        ValueError: the method does not go with this model or setting, such as a rank that does not fit.
    """
    base = nbytes(model.parameters())
    if method.trained != "all":
        return _adapters(model, method, setting, base)
    if method.preset is None:
        trained = [p for p in model.parameters() if p.requires_grad]
        found = _full_rank(trained, method, setting, base)
        whole = {id(p): nbytes([p]) for p in trained}
        return _inside_backward(model, method, setting, found=found, whole=whole, covered=set())
    with _optimizer(model, method, setting) as optimizer:
        return _low_rank(model, optimizer, method, setting)


def nbytes(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    """Return the bytes of all of them."""
    return sum(t.numel() * t.element_size() for t in tensors)


def adapter_weights(model: nn.Module, rank: int, *, dora: bool) -> list[nn.Parameter]:
    """Return peft's adapters of every linear layer but the head: A (r, in), B (out, r), fp32; for DoRA (out,) too.

    Raises:
        ValueError: if the rank is no rank of one of the layers.
    """
    found = []
    for matrix in select_targets(model, "all-linear").values():
        rows, cols = matrix.shape
        shapes = [(rank, cols), (rows, rank), *([(rows,)] if dora else [])]
        found += [nn.Parameter(torch.empty(shape, device="meta", dtype=torch.float32)) for shape in shapes]
    return found


@contextmanager
def _optimizer(model: nn.Module, method: Method, setting: Setting) -> Iterator[LowRankOptimizer]:
    """Build the optimizer as a training run does, so that what it refuses is refused; take it off the model again."""
    trained = {p: p.requires_grad for p in model.parameters()}
    assert method.preset is not None
    alone = method.gradients == "full"  # then accumulation and clipping are the caller's
    optimizer = create_optimizer(
        model,
        method.preset,
        lr=1e-6,
        gradients=method.gradients,
        weights=method.weights,
        accumulation_steps=1 if alone else setting.accumulation,
        rank=setting.rank,
        rule=method.rule or setting.rule,
        embeddings=setting.embeddings,
    )
    try:
        yield optimizer
    finally:
        for name in ("compact", "layerwise"):
            handle = getattr(optimizer, name)
            if handle is not None:
                handle.detach()
        for p, flag in trained.items():
            p.requires_grad_(flag)


def _full_rank(trained: list[nn.Parameter], method: Method, setting: Setting, weights: int) -> Tensors:
    """Return the bytes of a rule on whole tensors."""
    group = {"params": [(str(i), p) for i, p in enumerate(trained)], "rule": method.rule or setting.rule}
    whole = nbytes(list(trained))
    return Tensors(
        weights=weights,
        gradients=whole,
        state=state_bytes(LowRankOptimizer([group], lr=1e-6)),
        residual=0,
        deferred=0,
        refresh=0,
        carried=whole if setting.accumulation > 1 else 0,
        passing=0,
        ending=whole,
        step=0,
        first_step=0,
    )


def _adapters(model: nn.Module, method: Method, setting: Setting, base: int) -> Tensors:
    """Return the bytes of LoRA and DoRA: the model is frozen."""
    dora = method.trained == "dora"
    adapters = adapter_weights(model, setting.rank, dora=dora)
    found = _full_rank(adapters, method, setting, base + nbytes(list(adapters)))
    return replace(found, passing=dora_temporary_bytes(model, setting.itemsize) if dora else 0)


def _low_rank(model: nn.Module, optimizer: LowRankOptimizer, method: Method, setting: Setting) -> Tensors:
    """Return the bytes of a preset."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    items = [optimizer.item(g, i) for g, size in enumerate(sizes) for i in range(size)]
    low_rank = [item for item in items if item.blocks]
    covered = _covered(model, optimizer) if method.is_compact else set()
    whole = {id(item.weight): nbytes([item.weight]) for item in items}
    # What a step keeps of a weight's gradient between its micro-batches, and until `step()`.
    kept = whole | {id(i.weight): _compact_bytes(i) for i in low_rank if method.is_layerwise or id(i.weight) in covered}
    one_at_a_time = method.is_layerwise and setting.accumulation == 1
    gradients = max(whole.values()) if one_at_a_time else sum(kept.values())
    residual = sum(_residual_bytes(item) for item in low_rank)
    blocks = [(block, item) for item in low_rank for block in item.blocks]
    deferrable = [item for item in low_rank if id(item.weight) in covered and can_be_deferred(item)]
    found = Tensors(
        weights=nbytes(model.parameters()),
        gradients=gradients,
        state=sum(item_bytes(item) for item in items) - residual,
        residual=residual,
        deferred=_deferred_bytes(deferrable) if method.weights == "deferred" else 0,
        refresh=max((refresh_bytes(block, item.config, item.weight.dtype) for block, item in blocks), default=0),
        carried=gradients if setting.accumulation > 1 else 0,
        passing=0,
        ending=gradients,
        step=_step_temporaries(method, setting, sum(math.prod(block.layout.low_shape) for block, _ in blocks)),
        first_step=0
        if method.is_layerwise or setting.parks
        else _waiting(low_rank, setting, covered=covered, kept=kept),
    )
    return _inside_backward(model, method, setting, found=found, whole=whole, covered=covered)


def _covered(model: nn.Module, optimizer: LowRankOptimizer) -> set[int]:
    """Return the ids of the weights whose layers hand over R."""
    layers, _ = compact_layers(model, {id(weight): weight for weight in low_rank_weights(optimizer)})
    return {id(layer.weight) for layer in layers}


def _deferred_bytes(items: list[Item]) -> int:
    """Return the bytes of B of deferred weights, which have one block each."""
    return sum(state_itemsize(i.weight.dtype) * math.prod(i.blocks[0].layout.low_shape) for i in items)


def _residual_bytes(item: Item) -> int:
    """Return the residual's share of a weight's state."""
    without = replace(item.config, residual=None, residual_ratio=0.0)
    dtype = item.weight.dtype
    return sum(block_bytes(b, item.config, dtype) - block_bytes(b, without, dtype) for b in item.blocks)


def _compact_bytes(item: Item) -> int:
    """Return the bytes of R and of the gradient at the kept positions, which a step's micro-batches add to."""
    wide, config = state_itemsize(item.weight.dtype), item.config
    kept = config.residual == "sparse" and config.residual_ratio > 0
    total = 0
    for block in item.blocks:
        total += wide * math.prod(block.layout.low_shape)
        if kept and block.residual:
            total += wide * max(1, round(config.residual_ratio * block.layout.rows * block.layout.cols))
    return total


def _inside_backward(
    model: nn.Module, method: Method, setting: Setting, *, found: Tensors, whole: dict[int, int], covered: set[int]
) -> Tensors:
    """Return the bytes with those of whole gradients inside backward.

    The output layer's gradient is the first one. A tied embedding's stays from there until the end, where it, the
    input's share and their sum are there together. Others are formed one at a time and go where weights step at once,
    where R is all that stays, and where they are added to those of earlier micro-batches.
    """
    ends = [id(w) for w in embedding_weights(model).values()]
    head = whole.get(ends[-1], 0) if ends else 0
    tied = head if len(ends) == 1 else 0
    goes = whole if method.is_layerwise or setting.accumulation > 1 else {w: whole[w] for w in covered}
    formed = max((size for w, size in goes.items() if w not in ends), default=0)
    alternate = method.is_layerwise and not tied
    last = tied if method.is_layerwise and setting.accumulation == 1 else found.gradients
    copies = 2 if setting.accumulation == 1 else 3  # the sum of earlier micro-batches is another one
    return replace(found, passing=max(head, formed) if alternate else head + formed, ending=last + copies * tied)


def _step_temporaries(method: Method, setting: Setting, low: int) -> int:
    """Return what `step()` holds of compact gradients and updates, all weights together on a GPU."""
    if not setting.foreach or method.is_layerwise:
        return 0
    fresh = setting.itemsize if method.gradients == "full" else 0  # R of whole gradients is computed in the step
    updates = 4 * (3 if (method.rule or setting.rule) == "adamw" else 1)  # N; AdamW's roots and fp32 R too
    return low * (fresh + updates)


def _waiting(low_rank: list[Item], setting: Setting, *, covered: set[int], kept: dict[int, int]) -> int:
    """Return the bytes of D and X of all micro-batches, or of G where it is smaller, beyond those of R."""
    if setting.accumulation == 1:
        return 0
    tokens, total = setting.accumulation * setting.batch * setting.seq, 0
    for item in low_rank:
        if id(item.weight) in covered:
            rows, cols = item.weight.shape
            total += item.weight.element_size() * min(tokens * (rows + cols), rows * cols) - kept[id(item.weight)]
    return max(0, total)


def smallest_side(model: nn.Module) -> int:
    """Return the largest rank that fits every layer."""
    return min(min(matrix.shape) for matrix in select_targets(model, "all-linear").values())
