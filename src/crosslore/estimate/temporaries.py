"""The largest temporaries: fitting a basis, DoRA's norms, 8-bit steps on a CPU. One weight at a time.

What the CPU's allocator showed.

| basis of (m, n), m the longer side, l columns | bytes in fp32 |
|---|---|
| gradient in bf16: its fp32 copy; of chosen heads their rows, and their copy | 4 m n |
| randomized, l = r + oversampling; power, l = r: products, their QR and their copies | 4 l (3 m + 2 n + 2.5 l) |
| svd: LAPACK's copy, U, V; its work space is not counted | 4 (m n + m n + n^2) |
| random, gaussian | 12 r d |
| DoRA, each layer (in, out): identity, A B, W + A B | 4 in^2 + 12 in out |
| the same of a bf16 model, W in fp32 too; under autocast the identity in bf16 too | 4 or 6 in^2 + 16 in out |
| bitsandbytes' step on a CPU: both moments, gradient, two for the denominator; a bf16 weight | 20 m n; 24 m n |
"""

import math

import torch
from torch import nn

from crosslore.config import LowRankConfig
from crosslore.layout import Block
from crosslore.targets import select_targets


def refresh_bytes(block: Block, config: LowRankConfig, dtype: torch.dtype) -> int:
    """Return the most temporary bytes of fitting one block's basis, its gradient being there."""
    layout, wide = block.layout, max(4, dtype.itemsize)
    rows = layout.rows
    copies = 0
    if block.cross_head:
        rows = math.ceil(layout.rank / layout.head_width) * layout.head_width
        copies += dtype.itemsize * rows * layout.cols
    longer, shorter = max(rows, layout.cols), min(rows, layout.cols)
    if dtype.itemsize < wide and config.projector not in ("random", "gaussian"):
        copies += wide * rows * layout.cols
    if config.fit_momentum or config.residual not in (None, "sparse"):
        copies += dtype.itemsize * math.prod(layout.batch) * layout.rows * layout.cols
    if config.projector == "svd":
        return copies + wide * (2 * longer * shorter + shorter * shorter)
    if config.projector in ("random", "gaussian"):
        return copies + 3 * wide * math.prod(layout.basis_shape[-2:])
    width = min(layout.rank + (0 if config.projector == "power" else config.oversampling), shorter)
    return copies + round(wide * width * (3 * longer + 2 * shorter + 2.5 * width))


def dora_temporary_bytes(model: nn.Module, itemsize: int, *, autocast: bool) -> int:
    """Return the most temporary bytes of one layer's forward pass in peft's DoRA."""
    square, product = 6 if itemsize == 2 and autocast else 4, 16 if itemsize == 2 else 12
    shapes = [matrix.shape for matrix in select_targets(model, "all-linear").values()]
    return max(square * cols * cols + product * rows * cols for rows, cols in shapes)


def bitsandbytes_cpu_bytes(weights: list[nn.Parameter], itemsize: int) -> int:
    """Return the most temporary bytes of an 8-bit AdamW step, which bitsandbytes does in fp32 on a CPU."""
    return (24 if itemsize < 4 else 20) * max(weight.numel() for weight in weights)
