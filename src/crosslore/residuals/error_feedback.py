"""LDAdam: what a step leaves out is added to the next gradient."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crosslore.config import Hyper
from crosslore.layout import MatrixLayout
from crosslore.residuals.base import Residual, StepContext
from crosslore.rules.base import Rule


@dataclass(frozen=True)
class ErrorFeedback(Residual):
    """A_t = G_t + E_{t-1} is what is projected; E_t = A_t - P R_t + beta1 / (1 - beta1) (P_- M - P M~).

    The second part is what the first moment loses when it is carried from the old basis P_- to the new one. State:
    `error`, (rows, cols), dtype of the gradient.

    Differs from the package: E is state, saved and restored. There it lives in `p.grad`, which `model.zero_grad()`
    and gradient clipping change.
    """

    prepares: ClassVar[bool] = True

    def init(self, grad: Tensor, layout: MatrixLayout) -> dict[str, Tensor]:
        """Return a zero error."""
        return {"error": torch.zeros_like(grad, memory_format=torch.contiguous_format)}

    def prepare(self, grad: Tensor, state: dict[str, Tensor], hp: Hyper, t: int, carry: dict[str, Tensor]) -> Tensor:
        """Return A_t, which is formed in the error's own memory."""
        return state["error"].add_(grad)

    def on_refresh(
        self, state: dict[str, Tensor], rule: Rule, old: Tensor, hp: Hyper, carry: dict[str, Tensor]
    ) -> None:
        """Remember the old basis and first moment."""
        first = rule.first_moment(state)
        if first is not None:
            carry["old"], carry["first"] = old, first.clone()

    def apply_(self, weight: Tensor, update: Tensor, ctx: StepContext) -> None:
        """Turn A_t into E_t; the weight is not touched."""
        layout, error, basis = ctx.layout, ctx.state["error"], ctx.basis
        layout.add_product_(error, *layout.factors(ctx.low, basis), alpha=-1.0, beta=1.0)
        if "old" not in ctx.carry:
            return
        first = ctx.carry["first"]
        old, basis = ctx.carry["old"].to(first.dtype), basis.to(first.dtype)
        share = ctx.hp.betas[0] / (1 - ctx.hp.betas[0])
        change = basis.mT @ old  # C = P^T P_-
        moved = change @ first if layout.side == "left" else first @ change.mT  # M~
        layout.add_product_(error, *layout.factors(first, old), alpha=share, beta=1.0)
        layout.add_product_(error, *layout.factors(moved, basis), alpha=-share, beta=1.0)
