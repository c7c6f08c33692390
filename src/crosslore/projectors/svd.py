"""Eq. 2: the first r singular vectors of the whole gradient, as GaLore does."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crosslore.layout import MatrixLayout
from crosslore.projectors.base import Projector, as_float


@dataclass(frozen=True)
class SVD(Projector):
    """Exact singular vectors. Best basis, and the cost that the paper sets out to avoid."""

    def fit(self, grad: Tensor, layout: MatrixLayout, *, previous: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return P = U[:, :r] on the left (Eq. 2), V[:, :r] on the right; O(m n min(m, n)).

        G itself is factorised on both sides, as galore-torch does: the signs of singular vectors are arbitrary, and
        since the moments are kept at a refresh, another choice of signs gives other weights from then on.
        """
        u: Tensor
        vh: Tensor
        u, _, vh = torch.linalg.svd(as_float(grad), full_matrices=False)
        basis = u[:, : layout.rank] if layout.side == "left" else vh[: layout.rank].mT
        return basis.clone(memory_format=torch.contiguous_format)  # a view would keep all of U alive
