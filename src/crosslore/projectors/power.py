"""Warm start: block power iteration from the basis in use (LDAdam; Halko et al. 2011 with a known start)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from crosslore.layout import MatrixLayout
from crosslore.projectors.base import Projector, oriented
from crosslore.projectors.randomized import Randomized, iterated
from crosslore.projectors.svd import SVD


@dataclass(frozen=True)
class Power(Projector):
    """P <- orth(A A^T P), once or more often. Close to the old basis, so that the moments stay meaningful."""

    # Random columns beside the old basis, through which new directions come in; 0: none. Passes; 1 is LDAdam's.
    oversampling: int = 0
    power_iterations: int = 1
    # How the first basis is fitted.
    first_fit: Literal["randomized", "svd"] = "randomized"

    def fit(self, grad: Tensor, layout: MatrixLayout, *, previous: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return the improved basis; at the first fit the one of `first_fit`."""
        if previous is None:
            first = SVD() if self.first_fit == "svd" else Randomized(self.oversampling, self.power_iterations)
            return first.fit(grad, layout, previous=None, generator=generator)
        matrix = oriented(grad, layout)  # A, (m, n)
        basis = previous.to(matrix.dtype)
        extra = min(self.oversampling, min(matrix.shape) - layout.rank)
        if extra > 0:
            drawn = torch.randn(matrix.shape[0], extra, generator=generator, dtype=matrix.dtype, device="cpu")
            basis = torch.cat([basis, drawn.to(matrix.device)], dim=1)
        return iterated(matrix, basis, layout.rank, passes=self.power_iterations)
