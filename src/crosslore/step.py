"""Algorithm 1 as one function, and the parts that it puts together."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from crosslore.config import Hyper, LowRankConfig
from crosslore.fitting import refresh_
from crosslore.kernels.rounding import stochastic_round
from crosslore.layout import Block, MatrixLayout
from crosslore.moments.base import MomentPolicy
from crosslore.projectors.base import Projector
from crosslore.projectors.cross_head import CrossHead
from crosslore.projectors.gaussian import RandomOrthonormal
from crosslore.refresh import RefreshEvery, draw_generator
from crosslore.registry import build_moments, build_projector, build_residual, build_rule
from crosslore.residuals.base import Residual, StepContext
from crosslore.rules.base import Rule, state_dtype


@dataclass(frozen=True, kw_only=True)
class Method:
    """The five choices in which the methods of this family differ, and the details of fitting."""

    projector: Projector
    refresh: RefreshEvery
    moments: MomentPolicy
    rule: Rule
    residual: Residual | None
    # See LowRankConfig.
    fit_window: int = 1
    fit_momentum: float = 0.0
    random_after: int | None = None
    fp32_basis: bool = False

    def projector_at(self, t: int) -> Projector:
        """Return what fits the basis at step t."""
        late = self.random_after is not None and t > self.random_after
        return RandomOrthonormal() if late else self.projector

    def basis(
        self, grad: Tensor, state: dict[str, Tensor], layout: MatrixLayout, hp: Hyper, t: int, *, name: str
    ) -> Tensor:
        """Return P_t: the one of the state, or the one that its seed stands for."""
        if self.projector.stored:
            return state["basis"]
        draws = draw_generator(hp.seed, name, self.refresh.number(t), grad.device)
        basis = self.projector.fit(grad, layout, previous=None, generator=draws)
        return basis.expand(layout.basis_shape)

    def ordinary(self, t: int) -> bool:
        """Return whether step t changes nothing but moments, residual and weight: it fits and collects nothing."""
        collects = self.fit_window > 1 and self.refresh.soon(t, self.fit_window)
        prepares = self.residual is not None and self.residual.prepares
        return not (collects or prepares or self.refresh.due(t))

    def basis_dtype(self, grad: Tensor) -> torch.dtype:
        """Return the dtype in which a basis is stored."""
        return torch.float32 if self.fp32_basis and grad.dtype != torch.float64 else grad.dtype


@lru_cache(maxsize=4096)
def build_method(config: LowRankConfig, *, cross_head: bool, residual: bool, offset: int = 0) -> Method:
    """Return the parts that `config` names, for a weight with or without cross-head sharing and residual.

    Args:
        config: the choices.
        cross_head: the heads share a basis.
        residual: the sparse residual is on; other residuals concern every weight.
        offset: steps by which this weight's refreshes are shifted.
    """
    found = build_residual(config) if residual or config.residual != "sparse" else None
    rule = build_rule(config.rule, eps_placement=config.eps_placement)
    return Method(
        projector=CrossHead.from_config(config) if cross_head else build_projector(config),
        refresh=RefreshEvery(config.refresh_every, config.refresh_phase + offset),
        moments=build_moments(config),
        rule=(found.compact_rule if found else None) or rule,
        residual=found,
        fit_window=config.fit_window,
        fit_momentum=config.fit_momentum,
        random_after=config.random_after,
        fp32_basis=config.basis_dtype == "float32",
    )


def method_of(config: LowRankConfig, block: Block) -> Method:
    """Return the parts for one block."""
    return build_method(config, cross_head=block.cross_head, residual=block.residual, offset=block.refresh_offset)


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
    ctx = compact_gradient(grad, state, method, layout, hp, t, name=name, may_fit=may_fit)  # lines 2-5
    update = method.rule.update(ctx.low, state, ctx.age, hp)  # Eq. 7; lines 6-7
    apply_update_(weight, update, method, ctx)  # Eq. 5, 9, 12; lines 8-11


def compact_gradient(
    grad: Tensor,
    state: dict[str, Tensor],
    method: Method,
    layout: MatrixLayout,
    hp: Hyper,
    t: int,
    *,
    name: str,
    may_fit: bool = True,
) -> StepContext:
    """Return R_t with the basis of step t, which is refitted if it is due; lines 2-5 of Algorithm 1."""
    if not state:
        state.update(init_state(grad, method, layout))
    carry: dict[str, Tensor] = {}
    if method.residual is not None:
        grad = method.residual.prepare(grad, state, hp, t, carry)
    if method.refresh.due(t) and (may_fit or t == 1):
        refresh_(grad, state, method, layout, hp, t, name=name, carry=carry)
    basis = method.basis(grad, state, layout, hp, t, name=name)
    low = method.projector.project(grad, basis, layout)  # R_t = P_t^T G_t
    ctx = context_of(grad, low, basis, state, method, layout, hp, t, name=name, carry=carry)
    collect_sketch_(ctx, grad, low, method, name=name)
    return ctx


def context_of(
    grad: Tensor | None,
    low: Tensor,
    basis: Tensor,
    state: dict[str, Tensor],
    method: Method,
    layout: MatrixLayout,
    hp: Hyper,
    t: int,
    *,
    name: str,
    carry: dict[str, Tensor] | None = None,
) -> StepContext:
    """Return what the rest of a step works with, once R_t is known."""
    age = method.refresh.age(t) if method.moments.restarts else t
    return StepContext(grad, low, basis, state, layout, method.rule, hp, t, age, name, carry=carry or {})


def collect_sketch_(ctx: StepContext, grad: Tensor, low: Tensor, method: Method, *, name: str) -> None:
    """Add this step to the sketch if the next refresh is within the window."""
    if method.fit_window > 1 and method.refresh.soon(ctx.t, method.fit_window):
        draws = draw_generator(ctx.hp.seed, f"{name}|window", ctx.t)
        method.projector.sketch_(ctx.state["sketch"], grad, low, ctx.layout, generator=draws)


def apply_update_(weight: Tensor, update: Tensor, method: Method, ctx: StepContext) -> None:
    """Apply N_t and the residual to the weight, in place; lines 8-11 of Algorithm 1."""
    hp, residual = ctx.hp, method.residual
    draws = rounding_draws(weight, hp, ctx.name, ctx.t)
    target = weight if draws is None else weight.float()  # then one rounding at the end
    if residual is None or not residual.replaces_update:
        add_back = method.projector.add_back_
        add_back(target, update, ctx.basis, ctx.layout, alpha=hp.update_factor, beta=hp.weight_factor)  # line 11
    if residual is not None:  # Eq. 5, 9, 12: Algorithm 2; lines 8-9
        residual.apply_(target, update, ctx)
    if draws is not None:
        weight.copy_(stochastic_round(target, weight.dtype, generator=draws))


def rounding_draws(weight: Tensor, hp: Hyper, name: str, t: int) -> torch.Generator | None:
    """Return the generator of a step's random rounding, on the weight's device; None if it is off."""
    if not hp.stochastic_rounding or weight.dtype != torch.bfloat16:
        return None
    return draw_generator(hp.seed, f"{name}|rounding", t, weight.device)


def init_state(grad: Tensor, method: Method, layout: MatrixLayout) -> dict[str, Tensor]:
    """Return the state before the first step: every key that it will ever have, all zero.

    Distributed checkpoints are loaded into a state that one step with zero gradients has allocated.
    """
    state: dict[str, Tensor] = {}
    if method.projector.stored:
        state["basis"] = grad.new_zeros(layout.basis_shape, dtype=method.basis_dtype(grad))
    if method.fit_window > 1:
        state["sketch"] = grad.new_zeros(layout.basis_shape, dtype=state_dtype(grad))
    state |= method.rule.init(grad.new_empty(layout.low_shape))
    return state | (method.residual.init(grad, layout) if method.residual else {})


def fullrank_step(
    weight: Tensor, grad: Tensor, state: dict[str, Tensor], rule: Rule, hp: Hyper, t: int, *, name: str = ""
) -> None:
    """Do one step of the same rule for a weight without a basis (embedding, norm, bias), in place."""
    if state.keys() <= {"step"}:
        state.update(rule.init(grad))
    rule.step_weight_(weight, grad, state, t, hp, draws=rounding_draws(weight, hp, name, t))  # Eq. 6, 10
