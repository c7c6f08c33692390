"""The ordinary step of one matrix as one compiled graph: between refreshes, AdamW, without a residual.

What changes from step to step (learning rate, bias corrections) comes in as tensors, and shapes are symbols: a few
compilations serve a whole model and all its steps. Refreshes, residuals and other rules take the loop path.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from crosslore.config import Hyper
from crosslore.projectors.base import Projector
from crosslore.rules.adamw import AdamW
from crosslore.step import Method


def ordinary_step_(
    weight: Tensor, grad: Tensor, basis: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, numbers: Tensor, *, left: bool
) -> None:
    """Do lines 3-11 of Algorithm 1 for AdamW, in place; `lowrank_step` without branches.

    Args:
        weight: (rows, cols).
        grad: (rows, cols), dtype of the weight.
        basis: (rows, r) if `left`, else (cols, r).
        exp_avg: M', fp32.
        exp_avg_sq: V', fp32.
        numbers: what `step_numbers` returns.
        left: the side of the basis.
    """
    update_factor, weight_factor, lerp1, lerp2, root, eps, correction = numbers.unbind()
    basis = basis.to(grad.dtype)
    low = (basis.mT @ grad if left else grad @ basis).to(exp_avg.dtype)  # R_t = P_t^T G_t
    exp_avg.add_((low - exp_avg) * lerp1)  # Eq. 7
    exp_avg_sq.add_((low * low - exp_avg_sq) * lerp2)  # Eq. 7
    update = update_factor * exp_avg / ((exp_avg_sq.sqrt() / root + eps) * correction)
    update, basis = update.to(weight.dtype), basis.to(weight.dtype)
    product = basis @ update if left else update @ basis.mT
    weight.copy_(weight_factor * weight.float() + product.float())  # rounded once


def step_numbers(hp: Hyper, t: int, eps_placement: str, device: torch.device) -> Tensor:
    """Return the seven numbers of a step as one fp32 tensor."""
    root, eps, correction = AdamW(eps_placement).factors(t, hp)
    values = (hp.update_factor, hp.weight_factor, 1 - hp.betas[0], 1 - hp.betas[1], root, eps, correction)
    return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)


def suits(method: Method, hp: Hyper, grad: Tensor, t: int) -> bool:
    """Return whether step t of this weight is an ordinary one."""
    return (
        type(method.rule) is AdamW
        and method.residual is None
        and method.projector.stored
        and type(method.projector).project is Projector.project
        and type(method.projector).add_back_ is Projector.add_back_
        and method.ordinary(t)
        and not method.moments.restarts
        and not hp.stochastic_rounding
        and grad.dim() == 2
        and grad.dtype in (torch.float32, torch.bfloat16)
    )


@lru_cache(maxsize=1)
def compiled_step() -> Any:  # Any: torch.compile's own callable
    """Return the compiled function; torch's compiler is loaded here and not before."""
    return torch.compile(ordinary_step_, dynamic=True)  # beyond the compiler's limit of graphs it runs as it is
