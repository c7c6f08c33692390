"""Rounding from fp32 to bf16 up or down at random, so that small updates are not lost."""

import torch
from torch import Tensor

# Entries whose random bits are alive at once.
PIECE = 1 << 20


def stochastic_round(values: Tensor, dtype: torch.dtype, *, generator: torch.Generator) -> Tensor:
    """Return `values` in `dtype`; each is rounded up with a probability equal to the share it is above the lower one.

    The mean of the rounded values is the value itself. bf16 is the upper half of fp32, so adding 16 random bits and
    dropping the lower half does it. Infinities and NaN stay; other dtypes than bf16 are rounded to the nearest.

    Args:
        values: fp32 tensor.
        dtype: what comes back.
        generator: draws the bits; on the device of `values`.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    out = torch.empty(values.numel(), dtype=dtype, device=values.device)
    for piece, into in zip(values.reshape(-1).split(PIECE), out.split(PIECE), strict=True):
        noise = torch.randint(1 << 16, piece.shape, dtype=torch.int32, device=piece.device, generator=generator)
        bits = piece.float().contiguous().view(torch.int32)
        rounded = bits.add(noise).bitwise_and_(-(1 << 16)).view(torch.float32)
        into.copy_(torch.where(piece.isfinite(), rounded, piece))
    return out.view(values.shape)
