"""Adam's moments on compact gradients (Eq. 7) and the update made from them (Algorithm 1, line 7)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslore.config import Hyper


def state_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of the moments: fp32, or fp64 for fp64 gradients. In bf16 they would never decay."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class AdamW:
    """AdamW without its weight decay, which the step applies together with the update."""

    # "corrected": m_hat / (sqrt(v_hat) + eps), torch and Algorithm 2. "uncorrected": galore-torch,
    # sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps).
    eps_placement: str = "corrected"

    def init(self, low: Tensor) -> dict[str, Tensor]:
        """Return zero moments M' and V' of the shape of `low`, fp32."""
        return {
            "exp_avg": torch.zeros_like(low, dtype=state_dtype(low), memory_format=torch.contiguous_format),
            "exp_avg_sq": torch.zeros_like(low, dtype=state_dtype(low), memory_format=torch.contiguous_format),
        }

    def update(self, low: Tensor, state: dict[str, Tensor], t: int, hp: Hyper) -> Tensor:
        """Return N_t = m_hat / (sqrt(v_hat) + eps), fp32, shape of `low`; the moments change in place."""
        return adamw_update_(
            low.to(state["exp_avg"].dtype),
            state["exp_avg"],
            state["exp_avg_sq"],
            t=t,
            hp=hp,
            eps_placement=self.eps_placement,
        )

    def first_moment(self, state: dict[str, Tensor]) -> Tensor | None:
        """Return M'_t."""
        return state["exp_avg"]

    def second_moment(self, state: dict[str, Tensor]) -> Tensor | None:
        """Return V'_t."""
        return state["exp_avg_sq"]


def adamw_update_(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, t: int, hp: Hyper, eps_placement: str
) -> Tensor:
    """Advance both moments in place (Eq. 7) and return the update N_t, a new tensor.

    Args:
        grad: gradient, dtype and shape of the moments.
        exp_avg: M'_{t-1}, becomes M'_t.
        exp_avg_sq: V'_{t-1}, becomes V'_t.
        t: step, counted from 1.
        hp: betas and eps.
        eps_placement: see `AdamW`.
    """
    beta1, beta2 = hp.betas
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)  # Eq. 7
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)  # Eq. 7
    correction1, correction2 = 1 - beta1**t, math.sqrt(1 - beta2**t)
    if eps_placement == "uncorrected":
        denominator = exp_avg_sq.sqrt().add_(hp.eps).mul_(correction1 / correction2)
    else:
        denominator = exp_avg_sq.sqrt().div_(correction2).add_(hp.eps).mul_(correction1)
    return torch.div(exp_avg, denominator, out=denominator)
