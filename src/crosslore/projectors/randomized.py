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
        q: Tensor
        matrix = oriented(grad, layout)  # A, (m, n)
        width = min(layout.rank + self.oversampling, *matrix.shape)  # l = r + p
        sketch = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype, device="cpu")
        q, _ = torch.linalg.qr(matrix @ sketch.to(matrix.device))  # Y = A Omega; Q, (m, l)
        for _ in range(self.power_iterations):  # Q <- orth(A orth(A^T Q)): re-orthonormalised, Algorithm 4.4
            q, _ = torch.linalg.qr(matrix.mT @ q)
            q, _ = torch.linalg.qr(matrix @ q)
        if width == layout.rank:
            return q
        # B = Q^T A is (l, n); its left singular vectors order the columns of Q by energy. QR first: the SVD is l x l.
        r_factor = torch.linalg.qr(matrix.mT @ q, mode="r").R  # B^T = Q' R, so B = R^T Q'^T
        u: Tensor = torch.linalg.svd(r_factor.mT)[0]
        return q @ u[:, : layout.rank]
