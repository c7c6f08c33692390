"""Random bases, which look at no gradient: Flora and APOLLO (Gaussian), GoLore (orthonormal)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crosslore.layout import MatrixLayout
from crosslore.projectors.base import Projector
from crosslore.rules.base import state_dtype


@dataclass(frozen=True)
class Gaussian(Projector):
    """P with entries N(0, 1/r), so that P P^T is the identity in the mean.

    Not stored: it is drawn again from its seed at each step, on the device of the gradient. 0 bytes of state.
    """

    stored: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = False
    fitted: ClassVar[bool] = False

    def fit(self, grad: Tensor, layout: MatrixLayout, *, previous: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return the draw; `grad` gives the device and dtype only."""
        draw = torch.randn(layout.basis_shape[-2:], generator=generator, dtype=torch.float32, device=generator.device)
        return draw.to(grad.device, state_dtype(grad)).mul_(layout.rank**-0.5)


@dataclass(frozen=True)
class RandomOrthonormal(Projector):
    """An orthonormal P whose span is uniformly distributed: Q of a Gaussian matrix."""

    fitted: ClassVar[bool] = False

    def fit(self, grad: Tensor, layout: MatrixLayout, *, previous: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return the draw; `grad` gives the device and dtype only."""
        draw = torch.randn(layout.basis_shape[-2:], generator=generator, dtype=torch.float32, device="cpu")
        q, r = torch.linalg.qr(draw.to(grad.device, state_dtype(grad)))
        basis: Tensor = q * r.diagonal().sign()  # so that no direction is preferred
        return basis
