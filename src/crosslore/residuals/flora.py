"""Flora (Hao et al. 2024): Adafactor whose momentum is kept in a random low-rank projection."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from crosslore.config import Hyper
from crosslore.layout import MatrixLayout
from crosslore.residuals.base import Residual, StepContext
from crosslore.rules.adafactor import Adafactor, clip_, precondition
from crosslore.rules.base import Rule, State
from crosslore.rules.sgd import Average

PREFIX = "res_"


@dataclass(frozen=True)
class Flora(Residual):
    """The update is (1 - beta1) u + beta1 P m, u = Adafactor's G / sqrt(v); m = beta1 m + (1 - beta1) P^T u.

    What the projection of u leaves out is thus applied at once, only older steps are compressed. The update's root
    mean square is at most 1. State: Adafactor's statistics `res_exp_avg_sq_row` and `res_exp_avg_sq_col`; m is the
    compact `exp_avg`.
    """

    replaces_update: ClassVar[bool] = True
    prepares: ClassVar[bool] = True
    compact_rule: ClassVar[Rule | None] = Average()

    def init(self, grad: Tensor, layout: MatrixLayout) -> State:
        """Return zero statistics of the whole gradient."""
        return {f"{PREFIX}{key}": value for key, value in Adafactor().init(grad).items()}

    def prepare(self, grad: Tensor, state: State, hp: Hyper, t: int, carry: dict[str, Tensor]) -> Tensor:
        """Return u in place of the gradient, a new tensor."""
        carry["first"] = state["exp_avg"].clone()
        return precondition(grad, {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}, t)

    def on_refresh(self, state: State, rule: Rule, old: Tensor, hp: Hyper, carry: dict[str, Tensor]) -> None:
        """Remember the old basis: this step's update still uses it."""
        carry["old"] = old

    def apply_(self, weight: Tensor, update: Tensor, ctx: StepContext) -> None:
        """Apply the clipped update; u's memory holds it."""
        assert ctx.grad is not None
        hp, layout, full = ctx.hp, ctx.layout, ctx.grad
        basis = ctx.carry.get("old", ctx.basis).to(full.dtype)
        factors = layout.factors(ctx.carry["first"].to(full.dtype), basis)
        layout.add_product_(full, *factors, alpha=hp.betas[0], beta=1 - hp.betas[0])
        clip_(full)
        weight.copy_(full.mul_(hp.update_factor).add_(weight, alpha=hp.weight_factor))
