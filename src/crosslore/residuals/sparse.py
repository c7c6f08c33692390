"""The sparsely coded residual: Eq. 5, 8, 9, 12 and Algorithm 2, on the kept positions only."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from crosslore.kernels.reference import sampled_product
from crosslore.layout import MatrixLayout
from crosslore.residuals.base import StepContext
from crosslore.rules.adamw import adamw_update_, state_dtype

if TYPE_CHECKING:
    from crosslore.config import LowRankConfig

# `paper`: Eq. 12's radicand P V' + dV is negative for about half of the entries. It is floored at this share of
# the mean guarded radicand, so that |delta| stays within about 10 times a typical Adam update. Our choice.
PAPER_FLOOR = 0.01


@dataclass(frozen=True)
class SparseResidual:
    """Residual moments at the positions L that are chosen once, at the end of the warm-up.

    During the first k steps nothing is added. At the end of step k (of step 1 if k = 0) the positions are
    recorded; the residual acts at every step t > k. State, per weight, zeros until the positions are known:
    `res_index` int32 (kept,): flat positions, ascending; `res_avg`, `res_avg_sq` (kept,): dM and dV of Algorithm 2,
    for rule "exact" the moments of the gradient itself. While `residual_select` is "residual" and the warm-up
    runs, `res_avg_sq` is (rows, cols) and accumulates dG * dG.

    Differs from the paper: `residual_rule` "guarded" and "exact"; see `_radicand` and `_exact`.
    """

    residual_ratio: float
    warmup_steps: int
    residual_rule: str = "guarded"
    residual_select: str = "moment"

    @classmethod
    def from_config(cls, config: "LowRankConfig") -> Self:
        """Return the residual that `config` describes."""
        return cls(config.residual_ratio, config.warmup_steps, config.residual_rule, config.residual_select)

    def apply_(self, weight: Tensor, ctx: StepContext, *, alpha: float) -> None:
        """Add alpha * delta_t at the kept positions (Algorithm 1, lines 9-12).

        Raises:
            ValueError: if the rule has no moments.
        """
        if ctx.t <= max(1, self.warmup_steps):
            self._warm_up(ctx)
        if ctx.t > self.warmup_steps:
            rows, cols = _positions(ctx)
            delta = self._delta(ctx, rows, cols)
            # The positions are distinct, so reading, adding and writing back is exact and deterministic.
            changed = weight[rows, cols].to(delta.dtype).add_(delta, alpha=alpha)
            weight.index_put_((rows, cols), changed.to(weight.dtype))

    def init(self, grad: Tensor, layout: MatrixLayout) -> dict[str, Tensor]:
        """Return the state before the positions are known: zeros, so that the keys never change."""
        moments = torch.zeros(self.kept(layout), dtype=state_dtype(grad), device=grad.device)
        index = torch.zeros(self.kept(layout), dtype=torch.int32, device=grad.device)
        return {"res_index": index, "res_avg": moments, "res_avg_sq": moments.clone()}

    def kept(self, layout: MatrixLayout) -> int:
        """Return the number of kept positions: the ratio of all entries, at least one."""
        return max(1, round(self.residual_ratio * layout.rows * layout.cols))

    def _warm_up(self, ctx: StepContext) -> None:
        """Collect what the choice needs; at the end of the warm-up record the positions (section 4.2.2)."""
        if self.residual_select == "residual":
            gap = _dense(ctx, ctx.low).sub_(ctx.grad)  # Eq. 5, up to its sign
            if ctx.t == 1:
                ctx.state["res_avg_sq"] = torch.zeros_like(gap)
            ctx.state["res_avg_sq"].addcmul_(gap, gap)
            del gap
        if ctx.t < max(1, self.warmup_steps):
            return
        if self.residual_select == "residual":
            importance = ctx.state["res_avg_sq"]
        else:
            first = ctx.rule.first_moment(ctx.state)
            if first is None:
                raise ValueError("the residual needs a rule with moments. Use rule='adamw' or residual=None.")
            importance = _dense(ctx, first).abs_()  # |P_t M'_t|
        index = importance.view(-1).topk(self.kept(ctx.layout), sorted=False).indices.sort().values
        ctx.state["res_index"] = index.to(torch.int32)
        ctx.state["res_avg_sq"] = torch.zeros_like(ctx.state["res_avg"])

    def _delta(self, ctx: StepContext, rows: Tensor, cols: Tensor) -> Tensor:
        """Return delta_t at the kept positions, (kept,); Algorithm 2."""
        exp_avg, exp_avg_sq = ctx.state["res_avg"], ctx.state["res_avg_sq"]
        beta1, beta2 = ctx.hp.betas
        grad = ctx.grad[rows, cols].to(exp_avg.dtype)
        if self.residual_rule == "exact":
            return self._exact(ctx, grad, rows, cols)
        projected = _sampled(ctx, ctx.low, rows, cols)  # line 2: G_hat = P P^T G
        gap = grad - projected  # line 3
        exp_avg.mul_(beta1).add_(gap, alpha=1 - beta1)  # line 4
        if self.residual_rule == "paper":
            exp_avg_sq.mul_(beta2).addcmul_(projected, gap, value=2 * (1 - beta2))  # line 5
        else:
            exp_avg_sq.mul_(beta2).addcmul_(gap, gap, value=1 - beta2)
        radicand = self._radicand(ctx, rows, cols).div_(1 - beta2**ctx.t)
        return exp_avg.div(1 - beta1**ctx.t).div_(radicand.sqrt_().add_(ctx.hp.eps))  # lines 6-8

    def _radicand(self, ctx: StepContext, rows: Tensor, cols: Tensor) -> Tensor:
        """Return the uncorrected radicand of line 8.

        guarded: (P * P) V' + dV with dV the moving average of dG * dG. Never negative. <G_hat, dG> = 0, since
        P P^T is an orthogonal projection: the cross term that Eq. 9 keeps averages to zero, the dG * dG that it
        drops does not. paper: P V' + dV as printed, floored (see PAPER_FLOOR).
        """
        second = ctx.rule.second_moment(ctx.state)
        if second is None:
            raise ValueError("the residual needs a rule with moments. Use rule='adamw' or residual=None.")
        basis = ctx.state["basis"].to(second.dtype)
        guarded = sampled_product(*ctx.layout.factors(second, basis * basis), rows, cols)
        if self.residual_rule == "guarded":
            return guarded.add_(ctx.state["res_avg_sq"])
        printed = sampled_product(*ctx.layout.factors(second, basis), rows, cols).add_(ctx.state["res_avg_sq"])
        return torch.maximum(printed, guarded.mean() * PAPER_FLOOR)

    def _exact(self, ctx: StepContext, grad: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Return the first line of Eq. 12 with nothing approximated: Adam's own update minus P N.

        The moments are those of the gradient at the kept positions. They start after the warm-up, so their bias
        correction counts from there.
        """
        kept = ctx.state["res_avg"], ctx.state["res_avg_sq"]
        age, placement = ctx.t - self.warmup_steps, ctx.rule.eps_placement
        full = adamw_update_(grad, *kept, t=age, hp=ctx.hp, eps_placement=placement)  # Eq. 6, 10
        return full.sub_(_sampled(ctx, ctx.update, rows, cols))  # Eq. 12, first line


def _positions(ctx: StepContext) -> tuple[Tensor, Tensor]:
    flat = ctx.state["res_index"].long()
    rows = torch.div(flat, ctx.layout.cols, rounding_mode="floor")
    return rows, flat - rows * ctx.layout.cols


def _sampled(ctx: StepContext, low: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return (P low) at the kept positions, fp32 or fp64."""
    dtype = ctx.state["res_avg"].dtype
    return sampled_product(*ctx.layout.factors(low.to(dtype), ctx.state["basis"].to(dtype)), rows, cols)


def _dense(ctx: StepContext, low: Tensor) -> Tensor:
    """Return P low in full, (rows, cols); only during the warm-up, one weight at a time."""
    dtype = state_dtype(ctx.grad)
    a, b = ctx.layout.factors(low.to(dtype), ctx.state["basis"].to(dtype))
    return a @ b.mT
