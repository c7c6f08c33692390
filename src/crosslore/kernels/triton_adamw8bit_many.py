"""The 8-bit AdamW step where launches cost more than arithmetic: many compact gradients at once, or a whole weight.

A model of 7B weights has 224 low-rank ones, and a launch takes the processor longer than the kernel takes the GPU.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton  # type: ignore[import-untyped]  # triton ships no types
import triton.language as tl  # type: ignore[import-untyped]  # triton ships no types
from torch import Tensor

from crosslore.kernels.triton_adamw8bit import BLOCK_SIZE, LOWEST_SECOND, advance, check, check_moments, numbers


def _moments(state: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes and scales of both moments, in the order of the kernels."""
    return state["exp_avg"], state["exp_avg_scale"], state["exp_avg_sq"], state["exp_avg_sq_scale"]


def adamw8bit_update_many_(
    lows: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    *,
    code_signed: Tensor,
    code_unsigned: Tensor,
    t: int,
    beta1: float,
    beta2: float,
    eps: float,
) -> list[Tensor]:
    """Do `adamw8bit_update_` on many tensors of one dtype and device by one launch; return the updates.

    Args:
        lows: R_t of each, fp32 or bf16.
        states: `exp_avg`, `exp_avg_scale`, `exp_avg_sq`, `exp_avg_sq_scale` of each; change in place.
        code_signed: see `adamw8bit_update_`, as the others.
        code_unsigned: likewise.
        t: step, counted from 1; one for all.
        beta1: decay rate of M'.
        beta2: decay rate of V'.
        eps: added to the denominator of the update.

    Raises:
        ValueError: if a tensor is not contiguous, or has another number of elements or another dtype.
    """
    device, dtype = lows[0].device, lows[0].dtype
    blocks = []
    for low, state in zip(lows, states, strict=True):
        check(low, low.numel(), dtype)
        blocks.append(check_moments(low, *_moments(state), code_signed, code_unsigned))
    # A whole number of blocks for each, so that every part starts where a block does.
    flat = torch.empty(sum(blocks) * BLOCK_SIZE, dtype=torch.float32, device=device)
    parts = flat.split([count * BLOCK_SIZE for count in blocks])
    updates = [part[: low.numel()].view(low.shape) for part, low in zip(parts, lows, strict=True)]
    if not flat.numel():
        return updates
    rows = [
        [low.data_ptr(), update.data_ptr(), *map(Tensor.data_ptr, _moments(state)), low.numel()]
        for low, update, state in zip(lows, updates, states, strict=True)
    ]
    table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
    owner, first_block = _owners(tuple(blocks), device)
    with torch.cuda.device(lows[0].get_device()):
        _many_kernel[(len(owner),)](
            *(table, owner, first_block, code_signed, code_unsigned, *numbers(t, beta1, beta2, eps)),
            BF16=dtype == torch.bfloat16,
            BLOCK_SIZE=BLOCK_SIZE,
            LOWEST_SECOND=LOWEST_SECOND,
        )
    return updates


@lru_cache(maxsize=64)
def _owners(blocks: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tensor to which each block belongs, and the first block of each tensor."""
    counts = torch.tensor(blocks)
    owner = torch.arange(len(blocks), dtype=torch.int32).repeat_interleave(counts)
    return owner.to(device), (counts.cumsum(0) - counts).to(device)


def adamw8bit_weight_(
    weight: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    *,
    code_signed: Tensor,
    code_unsigned: Tensor,
    t: int,
    beta1: float,
    beta2: float,
    eps: float,
    weight_factor: float,
    update_factor: float,
) -> None:
    """Set weight <- weight_factor * weight + update_factor * N_t in one pass, rounded once; moments change in place.

    Args:
        weight: fp32 or bf16, any shape.
        grad: its gradient, likewise.
        state: as for `adamw8bit_update_many_`, as the others.
        code_signed: see there.
        code_unsigned: see there.
        t: step, counted from 1.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the denominator of the update.
        weight_factor: 1 - lr * weight_decay.
        update_factor: -lr.

    Raises:
        ValueError: if a tensor is not contiguous, or has another number of elements or another dtype.
    """
    check(weight, grad.numel(), torch.float32, torch.bfloat16)
    blocks = check_moments(grad, *_moments(state), code_signed, code_unsigned)
    if blocks:
        first, first_scale, second, second_scale = _moments(state)
        with torch.cuda.device(grad.get_device()):
            _weight_kernel[(blocks,)](
                *(weight, grad, grad.numel(), weight_factor, update_factor),
                *(first, first_scale, code_signed, second, second_scale, code_unsigned),
                *numbers(t, beta1, beta2, eps),
                BLOCK_SIZE=BLOCK_SIZE,
                LOWEST_SECOND=LOWEST_SECOND,
            )


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def _many_kernel(
    table: tl.tensor,  # (tensors, 7): addresses of gradient, update, codes and scales of both moments; elements
    owner: tl.tensor,
    first_block: tl.tensor,
    code_signed: tl.tensor,
    code_unsigned: tl.tensor,
    beta1: tl.tensor,
    one_minus_beta1: tl.tensor,
    beta2: tl.tensor,
    one_minus_beta2: tl.tensor,
    correction1: tl.tensor,
    correction2: tl.tensor,
    eps: tl.tensor,
    BF16: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LOWEST_SECOND: tl.constexpr,
) -> None:
    """One program for each block of each tensor."""
    program = tl.program_id(0)
    which = tl.load(owner + program)
    row = table + which.to(tl.int64) * 7
    block = program.to(tl.int64) - tl.load(first_block + which)
    at = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = at < tl.load(row + 6)
    if BF16:
        low = tl.load(row).to(tl.pointer_type(tl.bfloat16))
    else:
        low = tl.load(row).to(tl.pointer_type(tl.float32))
    update = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    exp_avg = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
    exp_avg_scale = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    exp_avg_sq = tl.load(row + 4).to(tl.pointer_type(tl.uint8))
    exp_avg_sq_scale = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    grad = tl.load(low + at, mask=inside, other=0.0).to(tl.float32)
    value = advance(
        *(grad, block, at, inside, exp_avg, exp_avg_scale, code_signed, exp_avg_sq, exp_avg_sq_scale, code_unsigned),
        *(beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, LOWEST_SECOND),
    )
    tl.store(update + at, value, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def _weight_kernel(
    weight: tl.tensor,
    grad: tl.tensor,
    elements: tl.tensor,
    weight_factor: tl.tensor,
    update_factor: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_scale: tl.tensor,
    code_signed: tl.tensor,
    exp_avg_sq: tl.tensor,
    exp_avg_sq_scale: tl.tensor,
    code_unsigned: tl.tensor,
    beta1: tl.tensor,
    one_minus_beta1: tl.tensor,
    beta2: tl.tensor,
    one_minus_beta2: tl.tensor,
    correction1: tl.tensor,
    correction2: tl.tensor,
    eps: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    LOWEST_SECOND: tl.constexpr,
) -> None:
    """One program for each block of the weight."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = at < elements
    value = advance(
        *(tl.load(grad + at, mask=inside, other=0.0).to(tl.float32), block, at, inside),
        *(exp_avg, exp_avg_scale, code_signed, exp_avg_sq, exp_avg_sq_scale, code_unsigned),
        *(beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, LOWEST_SECOND),
    )
    old = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(weight + at, value * update_factor + old * weight_factor, mask=inside)
