"""Adam's moments on compact gradients (Eq. 7) and the update made from them (Algorithm 1, line 7)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslore.config import Hyper
from crosslore.rules.base import Rule, State, state_dtype


@dataclass(frozen=True)
class AdamW(Rule):
    """AdamW without its weight decay, which the step applies together with the update."""

    def init(self, low: Tensor) -> State:
        """Return zero moments M' and V' of the shape of `low`, fp32."""
        return {
            "exp_avg": torch.zeros_like(low, dtype=state_dtype(low), memory_format=torch.contiguous_format),
            "exp_avg_sq": torch.zeros_like(low, dtype=state_dtype(low), memory_format=torch.contiguous_format),
        }

    def update(self, low: Tensor, state: State, t: int, hp: Hyper) -> Tensor:
        """Return N_t = m_hat / (sqrt(v_hat) + eps), fp32, shape of `low`; the moments change in place."""
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        low = low.to(exp_avg.dtype)
        exp_avg.lerp_(low, 1 - hp.betas[0])  # Eq. 7
        exp_avg_sq.mul_(hp.betas[1]).addcmul_(low, low, value=1 - hp.betas[1])  # Eq. 7
        return self.direction(exp_avg, exp_avg_sq, t=t, hp=hp)

    def update_many(
        self, lows: Sequence[Tensor], states: Sequence[State], steps: Sequence[int], hp: Hyper
    ) -> list[Tensor]:
        """Return the updates of several tensors, each operation on all of them at once."""
        if not lows:
            return []
        beta1, beta2 = hp.betas
        first, second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        wide = [low.to(m.dtype) for low, m in zip(lows, first, strict=True)]
        torch._foreach_lerp_(first, wide, 1 - beta1)  # Eq. 7
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, wide, wide, value=1 - beta2)  # Eq. 7
        roots: list[Tensor] = list(torch._foreach_sqrt(second))
        factors = [self.factors(t, hp) for t in steps]
        torch._foreach_div_(roots, [root for root, _, _ in factors])
        torch._foreach_add_(roots, [eps for _, eps, _ in factors])
        torch._foreach_mul_(roots, [correction for _, _, correction in factors])
        return list(torch._foreach_div(first, roots))

    def accumulate_(self, first: Tensor, second: Tensor, value: Tensor, square: Tensor, *, t: int, hp: Hyper) -> None:
        """Advance both moving averages (Eq. 7), in place."""
        first.lerp_(value, 1 - hp.betas[0])
        second.mul_(hp.betas[1]).add_(square, alpha=1 - hp.betas[1])

    def direction(self, first: Tensor, second: Tensor, *, t: int, hp: Hyper) -> Tensor:
        """Return N_t of these moments, a new tensor."""
        root, eps, correction = self.factors(t, hp)
        denominator = second.sqrt().div_(root).add_(eps).mul_(correction)
        return torch.div(first, denominator, out=denominator)

    def bias_factor(self, t: int, hp: Hyper) -> float:
        """Return sqrt(1 - beta2^t) / (1 - beta1^t) for galore-torch's placement of eps, else 1."""
        if self.eps_placement == "corrected":
            return 1.0
        return math.sqrt(1 - hp.betas[1] ** t) / (1 - hp.betas[0] ** t)

    def step_weight_(
        self, weight: Tensor, grad: Tensor, state: State, t: int, hp: Hyper, *, draws: torch.Generator | None = None
    ) -> None:
        """Do one step of a weight at full rank; by torch's fused kernel where weight and moments have one dtype."""
        one_dtype = weight.dtype == grad.dtype == state["exp_avg"].dtype
        if not (one_dtype and weight.is_contiguous() and weight.device.type in ("cpu", "cuda")):
            return super().step_weight_(weight, grad, state, t, hp, draws=draws)
        decay = hp.weight_decay if hp.decay_order == "before" else 0.0
        torch._fused_adamw_(
            [weight],
            [grad.contiguous()],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [torch.full((), float(t), dtype=torch.float32, device=weight.device)],
            lr=hp.lr * hp.scale,
            beta1=hp.betas[0],
            beta2=hp.betas[1],
            weight_decay=decay / hp.scale,
            eps=self.factors(t, hp)[1],
            amsgrad=False,
            maximize=False,
        )
        if hp.decay_order == "after":
            weight.mul_(hp.weight_factor)

    def factors(self, t: int, hp: Hyper) -> tuple[float, float, float]:
        """Return sqrt(1 - beta2^t), eps as it enters after that division, and 1 - beta1^t."""
        root = math.sqrt(1 - hp.betas[1] ** t)
        return root, hp.eps if self.eps_placement == "corrected" else hp.eps / root, 1 - hp.betas[0] ** t
