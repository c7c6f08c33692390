"""Bytes of weights, gradients and state of one method, from the optimizer that it would train with."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from crosslore.compact.begin import PARKED
from crosslore.compact.deferred import can_be_deferred
from crosslore.estimate.at_once import in_rows, row_entries, updates_together, waiting_compact
from crosslore.estimate.methods import Method, Setting
from crosslore.estimate.temporaries import bitsandbytes_cpu_bytes, dora_temporary_bytes, refresh_bytes
from crosslore.estimate.tensors import Tensors
from crosslore.factory import create_optimizer
from crosslore.items import Item
from crosslore.memory import block_bytes, item_bytes, state_bytes, state_itemsize
from crosslore.optimizer import LowRankOptimizer
from crosslore.residuals.sparse import SparseResidual
from crosslore.targets import embedding_weights, select_targets

# Bytes of the row and the column of a kept position, which wait beside R.
POSITION = 2 * torch.int64.itemsize


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
        return _inside_backward(model, method, setting, found=found, whole=whole, covered=[])
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
    step = whole if method.roots else 0
    if setting.device == "cpu" and group["rule"] == "adamw8bit":
        step = bitsandbytes_cpu_bytes(trained, trained[0].element_size())
    return Tensors(
        weights=weights,
        gradients=whole,
        state=state_bytes(LowRankOptimizer([group], lr=1e-6)),
        residual=0,
        deferred=0,
        refresh=0,
        carried=whole if setting.accumulation > 1 else 0,
        passing=0,
        late=whole,
        ending=whole,
        head_rows=0,
        logits_stay=False,
        step=step,
        first_step=0,
    )


def _adapters(model: nn.Module, method: Method, setting: Setting, base: int) -> Tensors:
    """Return the bytes of LoRA and DoRA: the model is frozen."""
    dora = method.trained == "dora"
    adapters = adapter_weights(model, setting.rank, dora=dora)
    found = _full_rank(adapters, method, setting, base + nbytes(list(adapters)))
    return replace(
        found, passing=dora_temporary_bytes(model, setting.itemsize, autocast=setting.autocast) if dora else 0
    )


def _low_rank(model: nn.Module, optimizer: LowRankOptimizer, method: Method, setting: Setting) -> Tensors:
    """Return the bytes of a preset."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    items = [optimizer.item(g, i) for g, size in enumerate(sizes) for i in range(size)]
    low_rank = [item for item in items if item.blocks]
    covered = _covered(optimizer)
    whole = {id(item.weight): nbytes([item.weight]) for item in items}
    # What a step keeps of a weight's gradient between its micro-batches, and until `step()`.
    kept = whole | {id(i.weight): _compact_bytes(i) for i in low_rank if method.is_layerwise or id(i.weight) in covered}
    residual = sum(_residual_bytes(item) for item in low_rank)
    blocks = [(block, item) for item in low_rank for block in item.blocks]
    deferrable = [item for item in low_rank if id(item.weight) in covered and can_be_deferred(item)]
    gradients = sum(kept.values())
    found = Tensors(
        weights=nbytes(model.parameters()),
        gradients=gradients,
        state=sum(item_bytes(item) for item in items) - residual,
        residual=residual,
        deferred=_deferred_bytes(deferrable) if method.weights == "deferred" else 0,
        refresh=max((refresh_bytes(block, item.config, item.weight.dtype) for block, item in blocks), default=0),
        carried=gradients if setting.accumulation > 1 else 0,
        passing=0,
        late=0,
        ending=gradients,
        head_rows=0,
        logits_stay=False,
        step=_step_temporaries(method, setting, [_low_entries(item) for item in low_rank]),
        first_step=0
        if method.is_layerwise or setting.device in PARKED
        else _waiting(low_rank, setting, covered=covered, kept=kept),
    )
    found = _inside_backward(model, method, setting, found=found, whole=whole, covered=covered)
    if not method.is_layerwise or setting.accumulation > 1:
        return found
    return _one_at_a_time(model, optimizer, setting, found=found, whole=whole)


def _covered(optimizer: LowRankOptimizer) -> list[int]:
    """Return the ids of the weights whose layers hand over R, in the order of backward."""
    layers = [] if optimizer.compact is None else optimizer.compact.layers
    return list(dict.fromkeys(id(layer.weight) for layer in reversed(layers)))


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
    return state_itemsize(item.weight.dtype) * (_low_entries(item) + _kept(item))


def _kept(item: Item) -> int:
    """Return the number of kept positions."""
    residuals = [(block.layout, method.residual) for block, method in zip(item.blocks, item.methods, strict=True)]
    return sum(residual.kept(layout) for layout, residual in residuals if isinstance(residual, SparseResidual))


def _low_entries(item: Item) -> int:
    """Return the entries of R."""
    return sum(math.prod(block.layout.low_shape) for block in item.blocks)


def _inside_backward(
    model: nn.Module, method: Method, setting: Setting, *, found: Tensors, whole: dict[int, int], covered: list[int]
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
    copies = 2 if setting.accumulation == 1 else 3  # the sum of earlier micro-batches is another one
    return replace(
        found,
        passing=max(head, formed) if method.is_layerwise and not tied else head + formed,
        late=found.gradients - (0 if tied or not ends else whole.get(ends[0], 0)) + formed,
        ending=found.gradients + copies * tied,
    )


def _one_at_a_time(
    model: nn.Module, optimizer: LowRankOptimizer, setting: Setting, *, found: Tensors, whole: dict[int, int]
) -> Tensors:
    """Return the bytes where weights step inside backward: nothing is held of one that has stepped.

    Compact gradients wait for a few others, and those of embeddings and heads are there in rows.
    """
    covered, rows = _covered(optimizer), in_rows(optimizer)
    items = [optimizer.items.of(weight) for weight in _weights(optimizer, covered)]
    sizes, entries = [_compact_bytes(item) for item in items], [_low_entries(item) for item in items]
    waits, left = waiting_compact(entries, setting.device, sizes=sizes)
    piece = whole | {w: weight.element_size() * row_entries(weight, setting.device) for w, weight in rows.items()}
    ends = [id(w) for w in embedding_weights(model).values()]
    first, head = (piece.get(ends[0], 0), piece.get(ends[-1], 0)) if ends else (0, 0)
    gradients = max(waits, left + first, *(size for w, size in piece.items() if w not in covered))
    found = replace(found, gradients=gradients, late=0)
    # From here on with the positions that wait beside them.
    sizes = [size + POSITION * _kept(item) for size, item in zip(sizes, items, strict=True)]
    waits, left = waiting_compact(entries, setting.device, sizes=sizes)
    tied = len(ends) == 1
    if not ends or ends[-1] not in rows:
        return replace(found, passing=found.passing + waits, ending=left + (3 * head if tied else first))
    formed = max((size for w, size in whole.items() if w not in ends), default=0)
    # A group's updates are as large as what they are made from; nothing is fitted then.
    ending = left if tied else left + max(left, first)
    return replace(found, passing=waits + max(formed, waits), ending=ending, head_rows=head, logits_stay=tied)


def _weights(optimizer: LowRankOptimizer, ids: list[int]) -> list[Tensor]:
    """Return the weights of these ids."""
    by_id = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    return [by_id[one] for one in ids]


def _step_temporaries(method: Method, setting: Setting, lows: list[int]) -> int:
    """Return what `step()` holds of R that it computes, and of the updates of a group of weights."""
    if method.is_layerwise or (setting.device == "cpu" and not method.is_compact):
        return 0
    group = updates_together(lows, setting.device)
    if method.is_compact:
        return 4 * group
    widened = 4 * group if setting.itemsize < 4 and (method.rule or setting.rule) == "adamw" else 0
    return setting.itemsize * sum(lows) + 4 * group + widened


def _waiting(low_rank: list[Item], setting: Setting, *, covered: list[int], kept: dict[int, int]) -> int:
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
