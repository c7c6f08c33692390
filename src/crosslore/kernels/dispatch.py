"""Chooses between the plain-torch routines and their Triton twins, by what the tensors and the machine can do.

Triton takes fp32 and bf16 tensors on a GPU wherever it can be imported. The environment variable `CROSSLORE_TRITON`
changes that: "0" switches the kernels off; "1" together with `TRITON_INTERPRET=1`, set before the first import of
triton, runs them on the CPU, slowly, for tests. Nothing here imports triton before a kernel is to run.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from crosslore.kernels import reference

TRITON_DTYPES = (torch.float32, torch.bfloat16)


def use_triton(tensor: Tensor) -> bool:
    """Return whether the Triton kernels take this tensor.

    A caller with its own plain-torch path asks this and imports the kernel only then, as `sampled_product` does.
    """
    switch = os.environ.get("CROSSLORE_TRITON")
    if switch == "0" or tensor.dtype not in TRITON_DTYPES:
        return False
    interpreted = switch == "1" and os.environ.get("TRITON_INTERPRET") == "1"
    return (tensor.is_cuda or interpreted) and _triton_imports()


def sampled_product(a: Tensor, b: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return (A B^T)[rows, cols] without the full product: (k,), fp32, or fp64 for fp64 factors.

    Args:
        a: (m, r).
        b: (n, r), dtype and device of `a`.
        rows: (k,) row indices in [0, m).
        cols: (k,) column indices in [0, n).
    """
    if use_triton(a):
        from crosslore.kernels.triton_sampled import sampled_product as fused

        return fused(a, b, rows, cols)
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return reference.sampled_product(a.to(dtype), b.to(dtype), rows, cols)


def adamw8bit_update_(
    low: Tensor,
    exp_avg: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor,
    *,
    code_signed: Tensor,
    code_unsigned: Tensor,
    t: int,
    beta1: float,
    beta2: float,
    eps: float,
    update: Tensor | None = None,
) -> Tensor:
    """Return N_t from one fused step on 8-bit moments; arguments and errors: see `triton_adamw8bit`.

    Only where `use_triton(low)` holds; elsewhere `rules.adamw8bit.AdamW8bit` does the same in plain torch.
    """
    from crosslore.kernels.triton_adamw8bit import adamw8bit_update_ as fused

    return fused(
        *(low, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale),
        code_signed=code_signed,
        code_unsigned=code_unsigned,
        t=t,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        update=update,
    )


def adamw8bit_update_many_(lows: Sequence[Tensor], states: Sequence[dict[str, Tensor]], **numbers: Any) -> list[Tensor]:
    """Do the same to many tensors by one launch; arguments and errors: see `triton_adamw8bit_many`."""
    from crosslore.kernels.triton_adamw8bit_many import adamw8bit_update_many_ as fused

    return fused(lows, states, **numbers)


def adamw8bit_weight_(weight: Tensor, grad: Tensor, state: dict[str, Tensor], **numbers: Any) -> None:
    """Step a whole weight by one launch; arguments and errors: see `triton_adamw8bit_many`."""
    from crosslore.kernels.triton_adamw8bit_many import adamw8bit_weight_ as fused

    fused(weight, grad, state, **numbers)


@lru_cache(maxsize=1)
def _triton_imports() -> bool:
    """Return whether triton can be imported; it cannot on Windows and macOS, where plain torch does the work."""
    try:
        import triton  # type: ignore[import-untyped]  # noqa: F401  # triton ships no types
    except ImportError:
        return False
    return True
