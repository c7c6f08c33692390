"""What every projector shares: projecting, projecting back, and applying an update."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from crosslore.layout import MatrixLayout, as_dtype

if TYPE_CHECKING:
    from crosslore.config import LowRankConfig


@dataclass(frozen=True)
class Projector(ABC):
    """Fits a basis and moves matrices between full and compact space.

    A subclass writes `fit` alone. Its dataclass fields are its options and carry the names of
    `LowRankConfig` fields.
    """

    # Whether the basis is kept in the state; if not, `fit` must depend on the generator alone.
    stored: ClassVar[bool] = True
    # Whether its columns are orthonormal.
    orthonormal: ClassVar[bool] = True
    # Whether it looks at the gradient at all.
    fitted: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: "LowRankConfig") -> Self:
        """Return the projector with its options taken from `config`."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})

    @abstractmethod
    def fit(self, grad: Tensor, layout: MatrixLayout, *, previous: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return P with orthonormal columns: (rows, r) for side "left", (cols, r) for "right".

        Args:
            grad: gradient, (rows, cols), any float dtype.
            layout: shape, side and rank; `grad` has its shape.
            previous: the basis in use, or None at the first fit.
            generator: CPU generator for whatever is drawn.

        Returns:
            fp32 tensor (fp64 for fp64 gradients) on the device of `grad`.
        """

    def sketch_(
        self, sketch: Tensor, grad: Tensor, low: Tensor, layout: MatrixLayout, *, generator: torch.Generator
    ) -> None:
        """Add one step's share to the sketch that a window of steps collects: G^T (G P), on the left G (G^T P).

        The sum over steps is one power iteration, from the basis in use, on the sum of G^T G.

        Args:
            sketch: shape of the basis, fp32 or fp64; changed in place.
            grad: G_t.
            low: R_t, which holds the inner product already.
            layout: shape and side.
            generator: CPU generator for whatever is drawn.
        """
        if grad.dtype == torch.float16:
            grad = grad.float()
        product = grad.mT @ low.to(grad.dtype) if layout.side == "right" else grad @ low.to(grad.dtype).mT
        sketch.add_(product)

    def project(self, grad: Tensor, basis: Tensor, layout: MatrixLayout) -> Tensor:
        """Return the compact gradient R: P^T G (r, cols) on the left, G P (rows, r) on the right; Eq. 7."""
        if grad.dtype == torch.float16:  # products of finite fp16 entries overflow
            grad, basis = grad.float(), basis.float()
        basis = as_dtype(basis, grad.dtype)
        return basis.mT @ grad if layout.side == "left" else grad @ basis

    def project_back(self, low: Tensor, basis: Tensor, layout: MatrixLayout) -> Tensor:
        """Return the (rows, cols) matrix that `low` stands for: P R or R P^T; Eq. 4.

        Allocates rows * cols elements: in a step use `add_back_`.
        """
        a, b = layout.factors(low, basis)
        return a @ b.mT

    def add_back_(
        self, weight: Tensor, low: Tensor, basis: Tensor, layout: MatrixLayout, *, alpha: float, beta: float
    ) -> None:
        """Set weight <- beta * weight + alpha * P R in one pass, without a (rows, cols) temporary.

        Args:
            weight: (rows, cols), changed in place.
            low: compact update, cast to the weight's dtype.
            basis: P, cast to the weight's dtype.
            layout: shape and side.
            alpha: factor on the update, -lr * scale.
            beta: factor on the weight, 1 - lr * weight_decay.
        """
        a, b = layout.factors(low, basis)
        layout.add_product_(weight, a, b, alpha=alpha, beta=beta)


def as_float(grad: Tensor) -> Tensor:
    """Return the gradient in a dtype that factorisations take: fp32, or fp64 as it is."""
    return grad if grad.dtype in (torch.float32, torch.float64) else grad.float()


def oriented(grad: Tensor, layout: MatrixLayout) -> Tensor:
    """Return the matrix whose column space is wanted: G on the left, G^T on the right; fp32 or fp64."""
    return as_float(grad) if layout.side == "left" else as_float(grad).mT
