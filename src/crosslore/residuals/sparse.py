"""The sparsely coded residual: Eq. 5, 8, 9, 12 and Algorithm 2, on the kept positions only."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from crosslore.kernels.dispatch import sampled_product
from crosslore.kernels.rounding import stochastic_round
from crosslore.layout import MatrixLayout
from crosslore.refresh import draw_generator
from crosslore.residuals.base import Residual, StepContext
from crosslore.rules.base import state_dtype

# `paper`: Eq. 12's radicand P V' + dV is negative for about half of the entries. It is floored at this share of
# the mean guarded radicand, so that |delta| stays within about 10 times a typical Adam update. Our choice.
PAPER_FLOOR = 0.01
# Entries of a full matrix that are alive at once while positions are chosen; 4 MiB in fp32.
PIECE = 1 << 20


@dataclass(frozen=True)
class SparseResidual(Residual):
    """Residual moments at the positions L that are chosen once, at the end of the warm-up.

    During the first k steps nothing is added. At the end of step k (of step 1 if k = 0) the positions are
    recorded; the residual acts at every step t > k (where layerwise accumulates, not in step 1: the gradients are gone
    by the time the positions are known). State, per weight, zeros until the positions are known:
    `res_index` int32 (kept,): flat positions, ascending; `res_avg`, `res_avg_sq` (kept,): dM and dV of Algorithm 2,
    for rule "exact" the moments of the gradient itself. With `residual_select` "residual" also `res_row_sq` (rows,)
    and `res_col_sq` (cols,): the row and column sums of dG * dG over the warm-up, whose outer product ranks the
    positions. The full sum would need a matrix as large as the weight; `benchmarks/kept_positions.py` compares them.

    Differs from the paper: `residual_rule` "guarded" and "exact", see `_radicand` and `_delta`; the choice "residual".
    """

    needs_whole_gradient: ClassVar[bool] = False

    residual_ratio: float = 0.012
    warmup_steps: int = 100
    residual_rule: Literal["guarded", "paper", "exact"] = "guarded"
    residual_select: Literal["moment", "residual"] = "moment"

    def apply_(self, weight: Tensor, update: Tensor, ctx: StepContext) -> None:
        """Add -lr * scale * delta_t at the kept positions (Algorithm 1, lines 9-12).

        Raises:
            ValueError: if the rule does not say how it accumulates moments.
        """
        if ctx.t <= max(1, self.warmup_steps):
            self._warm_up(ctx)
        if ctx.t > self.warmup_steps and any(found is not None for found in (ctx.grad, ctx.kept, ctx.entries)):
            rows, cols = ctx.positions or kept_positions(ctx.state, ctx.layout)
            delta = self._delta(update, ctx, rows, cols).mul_(ctx.hp.update_factor)
            for observer in ctx.observers:
                observer.on_residual(ctx.name, delta)
            # The positions are distinct, so reading, adding and writing back is exact and deterministic.
            changed = delta.add_(weight[rows, cols])
            weight.index_put_((rows, cols), _rounded(changed, weight.dtype, ctx))

    def init(self, grad: Tensor, layout: MatrixLayout) -> dict[str, Tensor]:
        """Return the state before the positions are known: zeros, so that the keys never change."""
        moments = torch.zeros(self.kept(layout), dtype=state_dtype(grad), device=grad.device)
        index = torch.zeros(self.kept(layout), dtype=torch.int32, device=grad.device)
        state = {"res_index": index, "res_avg": moments, "res_avg_sq": moments.clone()}
        if self.residual_select == "residual":
            state |= {"res_row_sq": moments.new_zeros(layout.rows), "res_col_sq": moments.new_zeros(layout.cols)}
        return state

    def kept(self, layout: MatrixLayout) -> int:
        """Return the number of kept positions: the ratio of all entries, at least one."""
        return max(1, round(self.residual_ratio * layout.rows * layout.cols))

    def active(self, t: int) -> bool:
        """Return whether step t adds a residual at positions that are known before it."""
        return t > max(1, self.warmup_steps)

    def collect_(
        self, grad: Tensor, low: Tensor, basis: Tensor, state: dict[str, Tensor], layout: MatrixLayout
    ) -> None:
        """Add dG * dG of one gradient to what the choice "residual" ranks (Eq. 5); a few rows at a time."""
        row, col = state["res_row_sq"], state["res_col_sq"]
        for rows, back in _dense(low, basis, layout, row.dtype):
            squares = back.sub_(grad[rows]).square_()
            row[rows].add_(squares.sum(1))
            col.add_(squares.sum(0))

    def _warm_up(self, ctx: StepContext) -> None:
        """Collect what the choice needs; at the end of the warm-up record the positions (section 4.2.2)."""
        if self.residual_select == "residual" and ctx.grad is not None:
            self.collect_(ctx.grad, ctx.low, ctx.basis, ctx.state, ctx.layout)
        if ctx.t < max(1, self.warmup_steps):
            return
        kept = self.kept(ctx.layout)
        if self.residual_select == "residual":
            row, col = ctx.state["res_row_sq"], ctx.state["res_col_sq"]
            pieces = (torch.outer(part, col) for part in row.split(_rows_at_once(ctx.layout)))
        else:
            first = ctx.rule.first_moment(ctx.state)
            low = ctx.low if first is None else first  # AdaGrad and Adafactor have no M'
            wide = ctx.state["res_avg"].dtype
            pieces = (back.abs_() for _, back in _dense(low, ctx.basis, ctx.layout, wide))  # |P_t M'_t|
        index = largest_positions(pieces, kept)
        ctx.state["res_index"] = index.to(torch.int32)
        ctx.state["res_avg_sq"] = torch.zeros_like(ctx.state["res_avg"])
        if self.residual_rule == "exact" and ctx.rule.sums:
            # A sum that started from zero would be far behind the compact one: start from what that stands for.
            ctx.state["res_avg_sq"] += self._guarded(ctx, *kept_positions(ctx.state, ctx.layout))

    def _delta(self, update: Tensor, ctx: StepContext, rows: Tensor, cols: Tensor) -> Tensor:
        """Return delta_t at the kept positions, (kept,), a new tensor; Algorithm 2."""
        exp_avg, exp_avg_sq = ctx.state["res_avg"], ctx.state["res_avg_sq"]
        rule, hp, t = ctx.rule, ctx.hp, ctx.t
        grad = kept_gradient(ctx, rows, cols)
        if self.residual_rule == "exact":
            # The first line of Eq. 12 with nothing approximated: the rule's own update minus P N. The moments are
            # those of the gradient at the kept positions and start after the warm-up: bias correction from there.
            age = t - (max(1, self.warmup_steps) if ctx.late else self.warmup_steps)
            rule.accumulate_(exp_avg, exp_avg_sq, grad, grad * grad, t=age, hp=hp)  # Eq. 6
            full = rule.direction(exp_avg, exp_avg_sq, t=age, hp=hp)  # Eq. 10
            return full.sub_(_sampled(ctx, update, rows, cols))  # Eq. 12, first line
        projected = _sampled(ctx, ctx.low, rows, cols)  # line 2: G_hat = P P^T G
        gap = grad - projected  # line 3
        square = 2 * projected * gap if self.residual_rule == "paper" else gap * gap
        rule.accumulate_(exp_avg, exp_avg_sq, gap, square, t=t, hp=hp)  # lines 4-5
        return rule.direction(exp_avg, self._radicand(ctx, rows, cols), t=t, hp=hp)  # lines 6-8

    def _radicand(self, ctx: StepContext, rows: Tensor, cols: Tensor) -> Tensor:
        """Return the uncorrected radicand of line 8.

        guarded: (P * P) V' + dV with dV the moving average of dG * dG. Never negative. <G_hat, dG> = 0, since
        P P^T is an orthogonal projection: the cross term that Eq. 9 keeps averages to zero, the dG * dG that it
        drops does not. paper: P V' + dV as printed, floored (see PAPER_FLOOR). A rule without V' divides by nothing.
        """
        second = ctx.rule.second_moment(ctx.state)
        if second is None:
            return ctx.state["res_avg_sq"]
        basis, guarded = ctx.basis.to(second.dtype), self._guarded(ctx, rows, cols)
        if self.residual_rule == "guarded":
            return guarded.add_(ctx.state["res_avg_sq"])
        printed = sampled_product(*ctx.layout.factors(second, basis), rows, cols).add_(ctx.state["res_avg_sq"])
        return torch.maximum(printed, guarded.mean() * PAPER_FLOOR)

    def _guarded(self, ctx: StepContext, rows: Tensor, cols: Tensor) -> Tensor:
        """Return (P * P) V' at the kept positions, 0 for a rule without V'."""
        second = ctx.rule.second_moment(ctx.state)
        if second is None:
            return torch.zeros_like(ctx.state["res_avg"])
        basis = ctx.basis.to(second.dtype)
        return sampled_product(*ctx.layout.factors(second, basis * basis), rows, cols)


def kept_gradient(ctx: StepContext, rows: Tensor, cols: Tensor) -> Tensor:
    """Return G_t at the kept positions, fp32 or fp64."""
    if ctx.kept is not None:
        return ctx.kept
    if ctx.entries is not None:
        return ctx.entries(rows, cols)
    assert ctx.grad is not None
    return ctx.grad[rows, cols].to(ctx.state["res_avg"].dtype)


def kept_positions(state: dict[str, Tensor], layout: MatrixLayout) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the kept positions, int64."""
    flat = state["res_index"].long()
    rows = torch.div(flat, layout.cols, rounding_mode="floor")
    return rows, flat - rows * layout.cols


def largest_positions(pieces: Iterable[Tensor], count: int) -> Tensor:
    """Return the flat positions of the `count` largest entries of a matrix that comes in groups of rows; ascending.

    `topk` of a whole matrix would need several times its memory.
    """
    best: tuple[Tensor, Tensor] | None = None
    offset = 0
    for piece in pieces:
        flat = piece.reshape(-1)
        values, index = flat.topk(min(count, flat.numel()), sorted=False)
        index = index + offset
        if best is not None:
            values, index = torch.cat([best[0], values]), torch.cat([best[1], index])
            values, chosen = values.topk(min(count, values.numel()), sorted=False)
            index = index[chosen]
        best = values, index
        offset += flat.numel()
    assert best is not None
    return best[1].sort().values


def _rounded(values: Tensor, dtype: torch.dtype, ctx: StepContext) -> Tensor:
    """Return entries in the weight's dtype, rounded at random where a bf16 weight itself is changed: a deferred one."""
    if not ctx.hp.stochastic_rounding or dtype != torch.bfloat16:
        return values.to(dtype)
    draws = draw_generator(ctx.hp.seed, f"{ctx.name}|residual", ctx.t, values.device)
    return stochastic_round(values, dtype, generator=draws)


def _sampled(ctx: StepContext, low: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return (P low) at the kept positions, fp32 or fp64."""
    dtype = ctx.state["res_avg"].dtype
    return sampled_product(*ctx.layout.factors(low.to(dtype), ctx.basis.to(dtype)), rows, cols)


def _rows_at_once(layout: MatrixLayout) -> int:
    return max(1, PIECE // layout.cols)


def _dense(low: Tensor, basis: Tensor, layout: MatrixLayout, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield P low, a few rows at a time; only during the warm-up."""
    a, b = layout.factors(low.to(dtype), basis.to(dtype))
    for start in range(0, layout.rows, _rows_at_once(layout)):
        rows = slice(start, start + _rows_at_once(layout))
        yield rows, a[rows] @ b.mT
