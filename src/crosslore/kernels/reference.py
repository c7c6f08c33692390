"""Plain-torch routines on compact matrices; the oracle of any faster twin."""

import torch
from torch import Tensor

# Entries of the gathered factors that are alive at once; 4 MiB each in fp32.
CHUNK_ELEMENTS = 1 << 20


def sampled_product(a: Tensor, b: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return (A B^T)[rows, cols] without the full product.

    Args:
        a: (m, r).
        b: (n, r), dtype and device of `a`.
        rows: (k,) row indices.
        cols: (k,) column indices.

    Returns:
        (k,) tensor. Works in chunks, so that no more than 2 * `CHUNK_ELEMENTS` gathered entries are alive.
    """
    chunk = max(1, CHUNK_ELEMENTS // a.shape[1])
    pairs = zip(torch.split(rows, chunk), torch.split(cols, chunk), strict=True)
    return torch.cat([torch.linalg.vecdot(a[r], b[c]) for r, c in pairs])
