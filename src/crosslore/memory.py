"""How many bytes of state a weight takes, by formula; no tensor is allocated.

| part | bytes of a matrix (m, n), basis side d, compact entries c = r * (m + n - d) |
|---|---|
| basis | d * r * bytes of its dtype; none for `gaussian` |
| sketch (`fit_window` > 1) | 4 * d * r |
| adamw / adagrad, sgd | 8 c / 4 c |
| adamw8bit | 2 c + 8 * ceil(c / 256); 8 c below 4096 entries |
| adafactor | 4 * (rows + columns of the compact matrix) |
| residual sparse | 12 * round(residual_ratio * m * n); `residual_select` "residual": and 4 * (m + n) |
| residual norm_scaled, scaled_gradient | 4, for each stacked matrix |
| residual error_feedback | m * n * bytes of the weight's dtype |
| residual flora | 4 * (m + n) + 4 c, and no rule |
| step counter | 4, once for each weight |

A weight at full rank has its rule's share with c = its entries.
"""

import math

import torch

from crosslore.config import LowRankConfig
from crosslore.items import Item
from crosslore.layout import Block
from crosslore.optimizer import LowRankOptimizer
from crosslore.rules.adamw8bit import BLOCK_SIZE, MIN_8BIT_SIZE


def state_bytes(optimizer: LowRankOptimizer) -> int:
    """Return the bytes that the optimizer's state takes once every weight has stepped.

    Raises:
        TypeError: if it is another optimizer.
    """
    if not isinstance(optimizer, LowRankOptimizer):
        raise TypeError(f"state_bytes takes a LowRankOptimizer, got {type(optimizer).__name__}.")
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    return sum(item_bytes(optimizer.item(g, i)) for g, size in enumerate(sizes) for i in range(size))


def item_bytes(item: Item) -> int:
    """Return the bytes of one weight's state."""
    weight = item.weight
    if not item.blocks:
        return 4 + rule_bytes(item.config.rule, tuple(weight.shape), weight.dtype)
    return 4 + sum(block_bytes(block, item.config, weight.dtype) for block in item.blocks)


def block_bytes(block: Block, config: LowRankConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one low-rank matrix's state, all stacked ones together."""
    layout, wide = block.layout, state_itemsize(dtype)
    entries = math.prod(layout.batch) * layout.rows * layout.cols
    basis = math.prod(layout.basis_shape)
    total = 0
    if config.projector != "gaussian":
        total += basis * (max(4, dtype.itemsize) if config.basis_dtype == "float32" else dtype.itemsize)
    if config.fit_window > 1:
        total += wide * basis
    if config.residual != "flora":
        total += rule_bytes(config.rule, layout.low_shape, dtype)
    if config.residual == "sparse" and block.residual and config.residual_ratio > 0:
        total += (4 + 2 * wide) * max(1, round(config.residual_ratio * entries))
        total += wide * (layout.rows + layout.cols) if config.residual_select == "residual" else 0
    elif config.residual in ("norm_scaled", "scaled_gradient"):
        total += wide * math.prod(layout.batch)
    elif config.residual == "error_feedback":
        total += entries * dtype.itemsize
    elif config.residual == "flora":
        total += wide * (math.prod(layout.batch) * (layout.rows + layout.cols) + math.prod(layout.low_shape))
    return total


def rule_bytes(rule: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of a rule's state for a tensor of this shape; fp32 (fp64 for fp64 weights) or 8-bit moments."""
    entries, wide = math.prod(shape), state_itemsize(dtype)
    if rule.endswith("8bit") and entries >= MIN_8BIT_SIZE:
        return 2 * entries + 8 * math.ceil(entries / BLOCK_SIZE)
    if rule == "adafactor":
        return wide * (entries if len(shape) < 2 else math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])
    if rule.endswith("8bit"):
        wide = 4
    return (1 if rule in ("adagrad", "sgd") else 2) * wide * entries


def state_itemsize(dtype: torch.dtype) -> int:
    """Return the bytes of one entry of a moment."""
    return max(4, dtype.itemsize)
