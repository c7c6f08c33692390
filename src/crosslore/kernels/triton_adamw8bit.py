"""One AdamW step on 8-bit moments as one Triton kernel; the moments never exist in fp32. Twin of `AdamW8bit.update`."""

import math

import torch
import triton  # type: ignore[import-untyped]  # triton ships no types
import triton.language as tl  # type: ignore[import-untyped]  # triton ships no types
from torch import Tensor

# Elements that share one scale; the same as `rules.adamw8bit.BLOCK_SIZE`.
BLOCK_SIZE = 256
# The same as `rules.adamw8bit.LOWEST_SECOND`, which says why.
LOWEST_SECOND = 1


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
    """Advance both 8-bit moments in place (Eq. 7) and return N_t = m_hat / (sqrt(v_hat) + eps), fp32.

    The update is made from the new moments before they are rounded to codes, as `AdamW8bit` does.

    Args:
        low: R_t, fp32 or bf16, any shape.
        exp_avg: codes of M'_{t-1}, uint8, shape of `low`; become those of M'_t.
        exp_avg_scale: largest magnitude of each 256 elements of M', fp32, (blocks,); changes in place.
        exp_avg_sq: codes of V'_{t-1}, likewise.
        exp_avg_sq_scale: the scales of V', likewise.
        code_signed: (256,) ascending, fp32; the values that the codes of M' stand for.
        code_unsigned: (256,) ascending, fp32; the values that the codes of V' stand for.
        t: step, counted from 1.
        beta1: decay rate of M'.
        beta2: decay rate of V'.
        eps: added to the denominator of the update.
        update: where the update is written, fp32, shape of `low`, may be `low` itself; None allocates it.

    Raises:
        ValueError: if a tensor is not contiguous, or has another number of elements or another dtype than above.

    Differs from bitsandbytes: no second moment gets the code of 0, which its block's scale makes 0 where all are; in a
    block of zeros the codes of M' are the one of 0; there it is the lowest code.
    """
    if update is None:
        update = torch.empty_like(low, dtype=torch.float32, memory_format=torch.contiguous_format)
    check(update, low.numel(), torch.float32)
    blocks = check_moments(low, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, code_signed, code_unsigned)
    if blocks:
        # Triton launches on the current device, which need not be that of `low`; -1, the CPU's, changes nothing.
        with torch.cuda.device(low.get_device()):
            _adamw8bit_kernel[(blocks,)](
                *(low, update, low.numel()),
                *(exp_avg, exp_avg_scale, code_signed, exp_avg_sq, exp_avg_sq_scale, code_unsigned),
                *numbers(t, beta1, beta2, eps),
                BLOCK_SIZE=BLOCK_SIZE,
                LOWEST_SECOND=LOWEST_SECOND,
            )
    return update


def numbers(t: int, beta1: float, beta2: float, eps: float) -> tuple[float, ...]:
    """Return what a kernel takes for a step, in its order."""
    return beta1, 1 - beta1, beta2, 1 - beta2, 1 - beta1**t, math.sqrt(1 - beta2**t), eps


def check_moments(
    low: Tensor,
    exp_avg: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor,
    code_signed: Tensor,
    code_unsigned: Tensor,
) -> int:
    """Check a gradient and its moments as `check` does; return the number of blocks."""
    blocks = -(-low.numel() // BLOCK_SIZE)
    check(low, low.numel(), torch.float32, torch.bfloat16)
    for codes, scale, code in ((exp_avg, exp_avg_scale, code_signed), (exp_avg_sq, exp_avg_sq_scale, code_unsigned)):
        check(codes, low.numel(), torch.uint8)
        check(scale, blocks, torch.float32)
        check(code, 256, torch.float32)
    return blocks


def check(tensor: Tensor, elements: int, *dtypes: torch.dtype) -> None:
    """Refuse what a kernel, which sees addresses only, would read wrongly or past its end."""
    if tensor.numel() != elements or tensor.dtype not in dtypes or not tensor.is_contiguous():
        raise ValueError(
            f"the fused 8-bit step needs a contiguous tensor of {elements} elements, "
            f"{' or '.join(map(str, dtypes))}, got {tuple(tensor.shape)} with strides {tensor.stride()}, "
            f"{tensor.dtype}. Pass the state of rule 'adamw8bit' unchanged, or set CROSSLORE_TRITON=0."
        )


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def _adamw8bit_kernel(
    low: tl.tensor,
    update: tl.tensor,
    elements: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_scale: tl.tensor,
    code_signed: tl.tensor,
    exp_avg_sq: tl.tensor,
    exp_avg_sq_scale: tl.tensor,
    code_unsigned: tl.tensor,
    beta1: tl.tensor,
    one_minus_beta1: tl.tensor,  # rounded once, from fp64: in fp32 1 - 0.999 has three digits less
    beta2: tl.tensor,
    one_minus_beta2: tl.tensor,
    correction1: tl.tensor,
    correction2: tl.tensor,
    eps: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    LOWEST_SECOND: tl.constexpr,
) -> None:
    """One program for each block of `BLOCK_SIZE` elements; the arithmetic is that of `adamw_update_`, in its order."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = at < elements
    grad = tl.load(low + at, mask=inside, other=0.0).to(tl.float32)
    value = advance(
        *(grad, block, at, inside, exp_avg, exp_avg_scale, code_signed, exp_avg_sq, exp_avg_sq_scale, code_unsigned),
        *(beta1, one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, LOWEST_SECOND),
    )
    tl.store(update + at, value, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def advance(
    grad: tl.tensor,
    block: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
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
    LOWEST_SECOND: tl.constexpr,
) -> tl.tensor:
    """Advance both moments of one block and return its update; what all kernels here do."""
    first = _dequantise(exp_avg, exp_avg_scale, code_signed, block, at, inside)
    second = _dequantise(exp_avg_sq, exp_avg_sq_scale, code_unsigned, block, at, inside)
    first = first * beta1 + one_minus_beta1 * grad  # Eq. 7
    second = second * beta2 + one_minus_beta2 * grad * grad  # Eq. 7
    denominator = (tl.div_rn(tl.sqrt_rn(second), correction2) + eps) * correction1
    _quantise(first, exp_avg, exp_avg_scale, code_signed, block, at, inside, LOWEST=0)
    _quantise(second, exp_avg_sq, exp_avg_sq_scale, code_unsigned, block, at, inside, LOWEST=LOWEST_SECOND)
    return tl.div_rn(first, denominator)


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def _dequantise(
    codes: tl.tensor, scales: tl.tensor, code: tl.tensor, block: tl.tensor, at: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """Return the values of one block; 0 past the end, where code 0 would stand for the smallest value."""
    index = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    return tl.where(inside, tl.load(code + index) * tl.load(scales + block), 0.0)


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def _quantise(
    values: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    code: tl.tensor,
    block: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    LOWEST: tl.constexpr,
) -> None:
    """Store the scale of one block and the nearest code of each value, at least LOWEST; a tie goes to the even code.

    So does bitsandbytes' CUDA kernel (`dQuantize`, csrc/kernels.cu): its search ends on an even code, which
    keeps what is not beyond a midpoint. Dividing, where it multiplies by 1 / scale, is safe for the smallest scales.
    """
    scale = tl.max(tl.abs(values), axis=0)
    value = tl.div_rn(values, tl.where(scale > 0, scale, 1.0))
    below = tl.zeros_like(at).to(tl.int32)  # the last code below the value, or 0
    for bit in tl.static_range(8):
        candidate = below + (128 >> bit)
        below = tl.where(tl.load(code + candidate) < value, candidate, below)
    above = tl.minimum(below + 1, 255)
    midpoint = (tl.load(code + below) + tl.load(code + above)) * 0.5
    goes_up = (value > midpoint) | ((value == midpoint) & (below % 2 == 1))
    nearest = tl.maximum(tl.where(goes_up, above, below), LOWEST)
    tl.store(codes + at, nearest.to(tl.uint8), mask=inside)
    tl.store(scales + block, scale)
