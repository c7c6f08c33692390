"""From gradients to the basis of a step: fit, sum a sketch over a window, fall back when a factorisation fails."""

import logging
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosslore.config import Hyper
from crosslore.layout import MatrixLayout
from crosslore.moments.base import Refresh
from crosslore.projectors.base import Projector
from crosslore.projectors.gaussian import RandomOrthonormal
from crosslore.projectors.randomized import Randomized
from crosslore.refresh import draw_generator
from crosslore.rules.base import state_dtype

if TYPE_CHECKING:
    from crosslore.step import Method

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

# What takes over when a factorisation does not converge: a sketch and QR, which cannot fail on finite numbers.
FALLBACK = Randomized(power_iterations=0, oversampling=0)
# The first basis of a matrix whose gradient is all zero then.
UNKNOWN = RandomOrthonormal()
# Fallbacks so far in this process, by weight; the first one is logged.
fallbacks: Counter[str] = Counter()


def refresh_(
    grad: Tensor, state: State, method: "Method", layout: MatrixLayout, hp: Hyper, t: int, *, name: str, carry: State
) -> None:
    """Fit the basis of step t (Eq. 2-4) and carry the moments over, in place."""
    old = method.basis(grad, state, layout, hp, t - 1, name=name) if t > 1 else None
    seen = fit_target(grad, old, state, method, layout, hp, t)
    projector = method.projector_at(t)
    if old is not None and "sketch" in state and projector is method.projector:
        new = _from_sketch(state["sketch"], old, name)
        state["sketch"].zero_()
    elif not method.projector.stored:
        new = method.basis(grad, state, layout, hp, t, name=name)
    else:
        new = fit_stacked(projector, seen, layout, old, seed=hp.seed, name=name, number=method.refresh.number(t))
    # Contiguous, so that a checkpoint restores the layout too: products of another one round otherwise.
    new = new.to(method.basis_dtype(grad)).contiguous()
    if old is not None:
        if method.residual is not None:
            method.residual.on_refresh(state, method.rule, old, hp, carry)
        method.moments.on_refresh(state, Refresh(old, new, layout, method.rule, hp, t))
    if method.projector.stored:
        state["basis"] = new


def fit_target(
    grad: Tensor, old: Tensor | None, state: State, method: "Method", layout: MatrixLayout, hp: Hyper, t: int
) -> Tensor:
    """Return what the basis is fitted to: G_t, or rho P M / (1 - beta1^(t-1)) + (1 - rho) G_t as LDAdam does."""
    first = method.rule.first_moment(state) if method.fit_momentum and old is not None else None
    if first is None or old is None:
        return grad
    mixed = grad * (1 - method.fit_momentum)
    factors = layout.factors(first, old.to(first.dtype))
    layout.add_product_(mixed, *factors, alpha=method.fit_momentum / (1 - hp.betas[0] ** (t - 1)), beta=1.0)
    return mixed


def fit_stacked(
    projector: Projector, grad: Tensor, layout: MatrixLayout, old: Tensor | None, *, seed: int, name: str, number: int
) -> Tensor:
    """Return the bases of all stacked matrices, each with its own draws; of a single matrix just its own."""
    if not layout.batch:
        draws = draw_generator(seed, name, number)
        if old is None and projector.fitted and not bool(grad.any()):  # the part of a fused weight that got none
            return UNKNOWN.fit(grad, layout, previous=None, generator=draws)
        return fit_safely(projector, grad, layout, old, draws, name)
    parts = grad.flatten(0, -3)
    olds = [None] * len(parts) if old is None else list(old.flatten(0, -3))
    bases = []
    for i, (part, previous) in enumerate(zip(parts, olds, strict=True)):
        draws = draw_generator(seed, f"{name}.{i}", number)
        if bool(part.any()):
            bases.append(fit_safely(projector, part, layout, previous, draws, f"{name}.{i}"))
        elif previous is not None:  # a matrix of zeros, an expert without tokens, says nothing about a basis
            bases.append(previous.to(state_dtype(part)))
        else:
            bases.append(UNKNOWN.fit(part, layout, previous=None, generator=draws))
    return torch.stack(bases).view(layout.basis_shape)


def fit_safely(
    projector: Projector, grad: Tensor, layout: MatrixLayout, old: Tensor | None, draws: torch.Generator, name: str
) -> Tensor:
    """Return the projector's basis; if its factorisation fails that of a sketch and QR, else the old basis."""
    for attempt in (projector, FALLBACK):
        try:
            basis = attempt.fit(grad, layout, previous=old, generator=draws)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # it is public, only not in its stub
            basis = None
        if basis is not None and bool(basis.isfinite().all()):
            return basis
        report_fallback(name)
    if old is not None:
        return old
    return UNKNOWN.fit(grad, layout, previous=None, generator=draws)


def _from_sketch(sketch: Tensor, old: Tensor, name: str) -> Tensor:
    """Return the basis of a window's sketch; of stacked ones, the old one where a sketch says nothing."""
    basis = torch.linalg.qr(sketch).Q
    usable = (sketch != 0).any((-2, -1), keepdim=True) & basis.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    if not bool(usable.all()):
        report_fallback(name)
    return torch.where(usable, basis, old.to(basis.dtype))


def report_fallback(name: str) -> None:
    """Count a basis that could not be fitted as asked; warn at the first one only."""
    log = logger.debug if fallbacks else logger.warning
    fallbacks[name] += 1
    log(
        "The factorisation of the gradient of %s failed: a simpler one is used, or the old basis is kept. Further "
        "failures are counted in `crosslore.fitting.fallbacks`, not logged.",
        name,
    )
