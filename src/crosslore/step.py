"""Algorithm 1 as one function, and the parts that it puts together."""

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from crosslore.config import Hyper, LowRankConfig
from crosslore.layout import MatrixLayout
from crosslore.moments.base import MomentPolicy
from crosslore.projectors.base import Projector
from crosslore.projectors.cross_head import CrossHead
from crosslore.refresh import RefreshEvery, draw_generator
from crosslore.registry import build_moments, build_projector, build_residual, build_rule
from crosslore.residuals.base import Residual, StepContext
from crosslore.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class Method:
    """The five choices in which the methods of this family differ."""

    projector: Projector
    refresh: RefreshEvery
    moments: MomentPolicy
    rule: Rule
    residual: Residual | None


@lru_cache(maxsize=256)
def build_method(config: LowRankConfig, *, cross_head: bool, residual: bool) -> Method:
    """Return the parts that `config` names, for a weight with or without cross-head sharing and residual."""
    return Method(
        projector=CrossHead.from_config(config) if cross_head else build_projector(config),
        refresh=RefreshEvery(config.refresh_every),
        moments=build_moments(config),
        rule=build_rule(config.rule, eps_placement=config.eps_placement),
        residual=build_residual(config) if residual else None,
    )


def lowrank_step(
    weight: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    method: Method,
    layout: MatrixLayout,
    hp: Hyper,
    t: int,
    *,
    name: str,
    may_fit: bool = True,
) -> None:
    """Do one step of Algorithm 1 for one matrix, in place.

    Args:
        weight: (rows, cols), changed in place.
        grad: (rows, cols), G_t.
        state: this matrix's tensors; filled at the first step.
        method: the five choices.
        layout: shape, side, rank and heads.
        hp: learning rate, scale, decay, betas, eps.
        t: step, counted from 1.
        name: the weight's name, part of the seed of what a refresh draws.
        may_fit: False keeps the old basis at a refresh: a zero gradient says nothing about a basis.
    """
    if "basis" not in state:
        state.update(init_state(grad, method, layout))
    if method.refresh.due(t) and (may_fit or t == 1):
        old = state["basis"] if t > 1 else None
        draws = draw_generator(hp.seed, name, method.refresh.number(t))
        new = method.projector.fit(grad, layout, previous=old, generator=draws)  # Eq. 2-4
        new = new.to(grad.dtype)
        method.moments.on_refresh(state, old, new, layout, t)
        state["basis"] = new
    low = method.projector.project(grad, state["basis"], layout)  # R_t = P_t^T G_t; lines 3-5
    update = method.rule.update(low, state, t, hp)  # Eq. 7; lines 6-7
    alpha = hp.update_factor
    method.projector.add_back_(weight, update, state["basis"], layout, alpha=alpha, beta=hp.weight_factor)  # line 11
    if method.residual is not None:  # Eq. 5, 9, 12: Algorithm 2; lines 8-9
        method.residual.apply_(weight, StepContext(grad, low, update, state, layout, method.rule, hp, t), alpha=alpha)


def init_state(grad: Tensor, method: Method, layout: MatrixLayout) -> dict[str, Tensor]:
    """Return the state before the first step: every key that it will ever have, all zero.

    Distributed checkpoints are loaded into a state that one step with zero gradients has allocated.
    """
    rows, cols, rank = layout.rows, layout.cols, layout.rank
    low = grad.new_empty((rank, cols) if layout.side == "left" else (rows, rank))
    state = {"basis": grad.new_zeros(layout.basis_shape), **method.rule.init(low)}
    return state | (method.residual.init(grad, layout) if method.residual else {})


def fullrank_step(weight: Tensor, grad: Tensor, state: dict[str, Tensor], rule: Rule, hp: Hyper, t: int) -> None:
    """Do one step of the same rule for a weight without a basis (embedding, norm, bias), in place."""
    if "exp_avg" not in state:
        state.update(rule.init(grad))
    update = rule.update(grad, state, t, hp)  # Eq. 6, 10
    weight.copy_(update.mul_(hp.update_factor).add_(weight, alpha=hp.weight_factor))  # one rounding to its dtype
