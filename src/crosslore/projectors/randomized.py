"""Section 4.1.2: randomized subspace iteration of Halko, Martinsson and Tropp (2011)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crosslore.layout import MatrixLayout
from crosslore.projectors.base import Projector, oriented


@dataclass(frozen=True)
class Randomized(Projector):
    """Leading singular vectors from a random start; two products with the gradient for each pass."""

    # Extra columns (p) and power iterations (q) after the first pass; see LowRankConfig.
    oversampling: int = 8
    power_iterations: int = 1

    def fit(self, grad: Tensor, layout: MatrixLayout, *, previous: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return an orthonormal P close to U[:, :r]."""
        matrix = oriented(grad, layout)  # A, (m, n)
        width = layout.rank + self.oversampling  # l = r + p
        if min(matrix.shape) <= width:
            return thin_basis(matrix, layout.rank)
        start = torch.randn(matrix.shape[0], width, generator=generator, dtype=matrix.dtype, device="cpu")
        return iterated(matrix, start.to(matrix.device), layout.rank, passes=1 + self.power_iterations)


def iterated(matrix: Tensor, basis: Tensor, rank: int, *, passes: int) -> Tensor:
    """Return the r leading directions of A's column space by subspace iteration from a start.

    Halko et al., Algorithms 4.4 and 5.1, applied to A^T: the last product is A Q itself, whose SVD orders the
    directions, so that no further pass over A is needed for it.

    Args:
        matrix: A, (m, n).
        basis: start, (m, l) with l >= rank; any full-rank columns.
        rank: r, the columns that come back.
        passes: times Y <- A orth(A^T orth(Y)).
    """
    q: Tensor
    r_factor: Tensor
    q, r_factor = basis, basis
    for _ in range(passes):
        rows = torch.linalg.qr(matrix.mT @ q).Q
        q, r_factor = torch.linalg.qr(matrix @ rows)
    if not passes:
        return torch.linalg.qr(basis[:, :rank]).Q  # type: ignore[no-any-return]
    if q.shape[1] == rank:
        return q
    u: Tensor = torch.linalg.svd(r_factor)[0]  # l x l
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
