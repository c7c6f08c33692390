"""Adam's moments on compact gradients (Eq. 7) and the update made from them (Algorithm 1, line 7)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crosslore.config import Hyper
from crosslore.layout import as_dtype
from crosslore.rules.base import Rule, State, state_dtype

# Devices with torch's fused kernel.
FUSED = ("cpu", "cuda")


@dataclass(frozen=True)
class AdamW(Rule):
    """AdamW without its weight decay, which the step applies together with the update."""

    elementwise: ClassVar[bool] = True

    def init(self, low: Tensor) -> State:
        """Return zero moments M' and V' of the shape of `low`, fp32."""
        return {
            "exp_avg": torch.zeros_like(low, dtype=state_dtype(low), memory_format=torch.contiguous_format),
            "exp_avg_sq": torch.zeros_like(low, dtype=state_dtype(low), memory_format=torch.contiguous_format),
        }

    def update(self, low: Tensor, state: State, t: int, hp: Hyper) -> Tensor:
        """Return N_t = m_hat / (sqrt(v_hat) + eps), fp32, shape of `low`; the moments change in place."""
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        if not _suits(exp_avg, exp_avg_sq):
            return self._update_unfused(low, state, t, hp)
        update = torch.zeros_like(exp_avg)
        self._fused_([update], [as_dtype(low, exp_avg.dtype).contiguous()], [exp_avg], [exp_avg_sq], t, hp, lr=-1.0)
        return update

    def update_many(
        self, lows: Sequence[Tensor], states: Sequence[State], steps: Sequence[int], hp: Hyper
    ) -> list[Tensor]:
        """Return the updates of several tensors; those alike, of one step, by one call of torch's fused kernel.

        With a weight of 0 and a learning rate of -1 that kernel writes N_t itself.
        """
        updates: dict[int, Tensor] = {}
        alike: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}  # the kernel asks the first tensor only
        for i, (low, state, t) in enumerate(zip(lows, states, steps, strict=True)):
            if _suits(state["exp_avg"], state["exp_avg_sq"]):
                alike.setdefault((t, state["exp_avg"].dtype, state["exp_avg"].device), []).append(i)
            else:
                updates[i] = self._update_unfused(low, state, t, hp)
        for (t, _, _), those in alike.items():
            moments = [states[i]["exp_avg"] for i in those]
            updates |= zip(those, (made := list(map(torch.zeros_like, moments))), strict=True)
            grads = [as_dtype(lows[i], m.dtype).contiguous() for i, m in zip(those, moments, strict=True)]
            self._fused_(made, grads, moments, [states[i]["exp_avg_sq"] for i in those], t, hp, lr=-1.0)
        return [updates[i] for i in range(len(lows))]

    def _update_unfused(self, low: Tensor, state: State, t: int, hp: Hyper) -> Tensor:
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        low = low.to(exp_avg.dtype)
        exp_avg.lerp_(low, 1 - hp.betas[0])  # Eq. 7
        exp_avg_sq.mul_(hp.betas[1]).addcmul_(low, low, value=1 - hp.betas[1])  # Eq. 7
        return self.direction(exp_avg, exp_avg_sq, t=t, hp=hp)

    def _fused_(
        self,
        targets: list[Tensor],
        grads: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        t: int,
        hp: Hyper,
        *,
        lr: float,
        weight_decay: float = 0.0,
    ) -> None:
        """Advance moments (Eq. 7) and add -lr N_t to the targets: torch's kernel, one pass over everything.

        Raises:
            ValueError: if a target, its gradient and its moments differ in shape, dtype or device.
        """
        for alike in zip(targets, grads, first, second, strict=True):
            _refuse_others(*alike)
        step = torch.full((), float(t), dtype=torch.float32, device=targets[0].device)
        torch._fused_adamw_(
            targets,
            grads,
            first,
            second,
            [],
            [step] * len(targets),
            lr=lr,
            beta1=hp.betas[0],
            beta2=hp.betas[1],
            weight_decay=weight_decay,
            eps=self.factors(t, hp)[1],
            amsgrad=False,
            maximize=False,
        )

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
        if not (one_dtype and weight.is_contiguous() and _suits(state["exp_avg"], state["exp_avg_sq"])):
            return super().step_weight_(weight, grad, state, t, hp, draws=draws)
        decay = hp.weight_decay / hp.scale if hp.decay_order == "before" else 0.0
        moments = [state["exp_avg"]], [state["exp_avg_sq"]]
        self._fused_([weight], [grad.contiguous()], *moments, t, hp, lr=hp.lr * hp.scale, weight_decay=decay)
        if hp.decay_order == "after":
            weight.mul_(hp.weight_factor)

    def factors(self, t: int, hp: Hyper) -> tuple[float, float, float]:
        """Return sqrt(1 - beta2^t), eps as it enters after that division, and 1 - beta1^t."""
        root = math.sqrt(1 - hp.betas[1] ** t)
        return root, hp.eps if self.eps_placement == "corrected" else hp.eps / root, 1 - hp.betas[0] ** t


def _suits(exp_avg: Tensor, exp_avg_sq: Tensor) -> bool:
    """Return whether torch's fused kernel takes these moments."""
    return exp_avg.device.type in FUSED and exp_avg.is_contiguous() and exp_avg_sq.is_contiguous()


def _refuse_others(target: Tensor, grad: Tensor, first: Tensor, second: Tensor) -> None:
    """Raise a ValueError for what torch's fused kernel, which sees addresses only, would write past its end."""
    for name, tensor in (("a gradient", grad), ("a first moment", first), ("a second moment", second)):
        if (tensor.shape, tensor.dtype, tensor.device) != (target.shape, target.dtype, target.device):
            raise ValueError(
                f"a weight or compact gradient of shape {tuple(target.shape)}, {target.dtype}, {target.device} has "
                f"{name} of shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}. Build a new optimizer after "
                "a weight was resized or moved."
            )
