"""Fira and APOLLO: the gradient itself, scaled as the low-rank update scales the compact gradient."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from crosslore.layout import MatrixLayout
from crosslore.residuals.base import Residual, StepContext
from crosslore.rules.base import state_dtype

# Largest growth of the residual's norm from one step to the next; Fira's and APOLLO's constant.
LIMIT = 1.01
# Added to denominators of norms; theirs.
EPS = 1e-8
# Entries that are converted at once; 4 MiB in fp32.
PIECE = 1 << 20


@dataclass(frozen=True)
class NormScaled(Residual):
    """Fira: W <- W - lr (alpha P N + S), S = (G - alpha P R) * phi, phi = |N| / |R| per channel or matrix.

    A channel is a row on the right side, a column on the left, where the compact gradient has the same ones. The
    norm of S may grow by 1 % per step at most. State: `res_norm`, its last value, one for each stacked matrix.

    Differs from the paper: alpha multiplies the projection that is taken off the gradient too, as in the package
    fira, so that S is orthogonal to the subspace for alpha = 1 only.
    """

    replaces_update: ClassVar[bool] = True
    norm_granularity: Literal["channel", "tensor"] = "channel"

    def init(self, grad: Tensor, layout: MatrixLayout) -> dict[str, Tensor]:
        """Return the last norm of each stacked matrix, 0 before the first step."""
        return {"res_norm": torch.zeros(layout.batch, dtype=state_dtype(grad), device=grad.device)}

    def apply_(self, weight: Tensor, update: Tensor, ctx: StepContext) -> None:
        """Apply the projected update and S in two passes over the weight, without a temporary of its size."""
        assert ctx.grad is not None
        hp, alpha = ctx.hp, ctx.hp.scale
        low = ctx.low.to(update.dtype)
        scaling = self.scaling(update, low, ctx.layout)
        whole, inside = self.norms(ctx.grad, ctx.layout), self.norms(low, ctx.layout)
        # |G_j - alpha P R_j|^2 = |G_j|^2 + (alpha^2 - 2 alpha) |R_j|^2, since P has orthonormal columns.
        squares = scaling.square() * (whole.square() + (alpha * alpha - 2 * alpha) * inside.square())
        scaling = self.limited_(scaling, squares.clamp_(min=0).sum((-2, -1)).sqrt(), ctx)
        a, b = ctx.layout.factors((alpha * (update - scaling * low)).to(weight.dtype), ctx.basis.to(weight.dtype))
        ctx.layout.add_product_(weight, a, b, alpha=hp.step_factor, beta=hp.weight_factor)
        add_scaled_(weight, ctx.grad, scaling, factor=hp.step_factor)

    def scaling(self, update: Tensor, low: Tensor, layout: MatrixLayout) -> Tensor:
        """Return phi, broadcastable to the gradient and to the compact gradient."""
        return self.norms(update, layout) / (self.norms(low, layout) + EPS)

    def norms(self, matrix: Tensor, layout: MatrixLayout) -> Tensor:
        """Return the norm of each channel or of the matrix, dimensions kept; fp32 or fp64."""
        channel = -1 if layout.side == "right" else -2
        dims = channel if self.norm_granularity == "channel" else (-2, -1)
        norms: Tensor = torch.linalg.vector_norm(matrix, dim=dims, keepdim=True, dtype=state_dtype(matrix))
        return norms

    def limited_(self, scaling: Tensor, norm: Tensor, ctx: StepContext) -> Tensor:
        """Return `scaling` divided so that the norm grows by at most 1 %; the state keeps the norm reached."""
        last = ctx.state["res_norm"]
        norm = norm / ctx.rule.bias_factor(ctx.age, ctx.hp)  # peers apply the bias correction afterwards
        growth = torch.where(last > 0, (norm / (last + EPS)).clamp(min=LIMIT) / LIMIT, torch.ones_like(norm))
        last.copy_(norm / growth)
        return scaling / growth[..., None, None]


@dataclass(frozen=True)
class ScaledGradient(NormScaled):
    """APOLLO: W <- W - lr sqrt(alpha) G * phi; the projection serves to find phi only.

    `scale_front` of the package apollo-torch is off, as it is there in effect (the option is not read).
    """

    def apply_(self, weight: Tensor, update: Tensor, ctx: StepContext) -> None:
        """Apply the scaled gradient in one pass over the weight."""
        assert ctx.grad is not None
        scaling = self.scaling(update, ctx.low.to(update.dtype), ctx.layout)
        norm = (scaling * self.norms(ctx.grad, ctx.layout)).square().sum((-2, -1)).sqrt()
        scaling = self.limited_(scaling, norm, ctx) * ctx.hp.scale**0.5
        if ctx.hp.weight_factor != 1:
            weight.mul_(ctx.hp.weight_factor)
        add_scaled_(weight, ctx.grad, scaling, factor=ctx.hp.step_factor)


def add_scaled_(weight: Tensor, grad: Tensor, scaling: Tensor, *, factor: float) -> None:
    """Add factor * scaling * G to the weight; in groups of rows where something must be converted.

    fp16 cannot hold the scaling, which is the inverse of a gradient's size: it is applied in fp32.
    """
    half = weight.dtype == torch.float16
    scaling = scaling.to(torch.float32 if half else weight.dtype).expand(weight.shape)
    one_dtype = grad.dtype == weight.dtype and not half
    rows = len(weight) if one_dtype else max(1, PIECE * len(weight) // weight.numel())
    for into, part, scale in zip(weight.split(rows), grad.split(rows), scaling.split(rows), strict=True):
        if half:
            into.copy_(into.float().addcmul_(part.float(), scale, value=factor))
        else:
            into.addcmul_(part.to(weight.dtype), scale, value=factor)
