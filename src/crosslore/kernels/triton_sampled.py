"""The sampled product as one Triton kernel: no gathered factors, no chunks. Twin of `reference.sampled_product`."""

import torch
import triton  # type: ignore[import-untyped]  # triton ships no types
import triton.language as tl  # type: ignore[import-untyped]  # triton ships no types
from torch import Tensor

# Pairs of one program, and entries of r that it multiplies at once: 2048 products, 16 for each of 128 threads.
BLOCK_PAIRS = 32
MAX_BLOCK_RANK = 64


def sampled_product(a: Tensor, b: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return (A B^T)[rows, cols] without the full product.

    Args:
        a: (m, r), fp32 or bf16, any strides.
        b: (n, r), device of `a`, any strides.
        rows: (k,) row indices in [0, m), int32 or int64; not checked.
        cols: (k,) column indices in [0, n), likewise.

    Returns:
        (k,) tensor, fp32, summed in fp32. Allocates nothing else.
    """
    out = torch.empty(rows.shape, dtype=torch.float32, device=a.device)
    pairs, rank = rows.numel(), a.shape[1]
    if pairs:
        # Triton launches on the current device, which need not be that of `a`; -1, the CPU's, changes nothing.
        with torch.cuda.device(a.get_device()):
            _sampled_product_kernel[(triton.cdiv(pairs, BLOCK_PAIRS),)](
                *(a, b, rows.contiguous(), cols.contiguous(), out, pairs, rank),
                *(*a.stride(), *b.stride()),
                BLOCK_PAIRS=BLOCK_PAIRS,
                BLOCK_RANK=min(MAX_BLOCK_RANK, triton.next_power_of_2(rank)),
            )
    return out


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def _sampled_product_kernel(
    a: tl.tensor,
    b: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    out: tl.tensor,
    pairs: tl.tensor,
    rank: tl.tensor,  # no constant: of a gradient's factors it is the number of tokens, another one in each batch
    a_row_stride: tl.tensor,
    a_rank_stride: tl.tensor,
    b_row_stride: tl.tensor,
    b_rank_stride: tl.tensor,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
) -> None:
    """One program for `BLOCK_PAIRS` pairs. 64-bit offsets: an embedding's factor can pass 2^31 entries."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    inside = pair < pairs
    a_row = a + tl.load(rows + pair, mask=inside, other=0).to(tl.int64) * a_row_stride
    b_row = b + tl.load(cols + pair, mask=inside, other=0).to(tl.int64) * b_row_stride
    products = tl.zeros((BLOCK_PAIRS, BLOCK_RANK), dtype=tl.float32)
    start = tl.zeros((), dtype=tl.int32)
    while start < rank:  # Triton's interpreter has no `range` up to an argument
        j = start + tl.arange(0, BLOCK_RANK).to(tl.int64)
        mask = inside[:, None] & (j < rank)[None, :]
        left = tl.load(a_row[:, None] + (j * a_rank_stride)[None, :], mask=mask, other=0.0)
        right = tl.load(b_row[:, None] + (j * b_rank_stride)[None, :], mask=mask, other=0.0)
        products += left.to(tl.float32) * right.to(tl.float32)
        start += BLOCK_RANK
    tl.store(out + pair, tl.sum(products, axis=1), mask=inside)
