"""Section 4.1.2: randomized subspace iteration of Halko, Martinsson and Tropp (2011)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crosslore.layout import MatrixLayout
from crosslore.projectors.base import Projector, oriented


@dataclass(frozen=True)
class Randomized(Projector):
    """Leading singular vectors from a random sketch; O(m n (r + oversampling)) per pass."""

    # Extra sketch columns (p) and power iterations (q); see LowRankConfig.
    oversampling: int = 8
    power_iterations: int = 2

    def fit(self, grad: Tensor, layout: MatrixLayout, *, previous: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return an orthonormal P close to U[:, :r]: Halko et al., Algorithms 4.4 and 5.1."""
        matrix = oriented(grad, layout)  # A, (m, n)
        width = layout.rank + self.oversampling  # l = r + p
        if min(matrix.shape) <= width:
            return thin_basis(matrix, layout.rank)
        sketch = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype, device="cpu")
        basis = matrix @ sketch.to(matrix.device)  # Y = A Omega
        return iterated(matrix, basis, layout.rank, iterations=self.power_iterations)


def iterated(matrix: Tensor, basis: Tensor, rank: int, *, iterations: int) -> Tensor:
    """Return the r leading directions of A's column space, from A and a basis Y of a guess at it.

    Args:
        matrix: A, (m, n).
        basis: Y, (m, l) with l >= rank; any full-rank columns.
        rank: r, the columns that come back.
        iterations: passes Q <- orth(A orth(A^T Q)), re-orthonormalised as in Algorithm 4.4.
    """
    q: Tensor
    q, _ = torch.linalg.qr(basis)
    for _ in range(iterations):
        q, _ = torch.linalg.qr(matrix.mT @ q)
        q, _ = torch.linalg.qr(matrix @ q)
    if q.shape[1] == rank:
        return q
    # B = Q^T A is (l, n); its left singular vectors order the columns of Q by energy. QR first: the SVD is l x l.
    r_factor = torch.linalg.qr(matrix.mT @ q, mode="r").R  # B^T = Q' R, so B = R^T Q'^T
    u: Tensor = torch.linalg.svd(r_factor.mT)[0]
    return q @ u[:, :rank]


def thin_basis(matrix: Tensor, rank: int) -> Tensor:
    """Return the r leading left singular vectors of a matrix with one short side, such as one head's gradient.

    The eigenvectors of the small Gram matrix order the directions, a final QR makes them orthonormal: forming the
    Gram matrix halves the digits of the small singular values.
    """
    rows, cols = matrix.shape
    if cols == rank:
        directions = matrix
    elif rows <= cols:
        directions = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, -rank:].flip(-1)
    else:
        directions = matrix @ torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, -rank:].flip(-1)
    q: Tensor = torch.linalg.qr(directions).Q
    return q
