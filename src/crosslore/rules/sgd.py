"""Gradient descent with momentum."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crosslore.config import Hyper
from crosslore.rules.base import Rule, State, state_dtype


@dataclass(frozen=True)
class SGD(Rule):
    """As torch.optim.SGD with momentum betas[0] and no dampening. State: `exp_avg`, the momentum buffer."""

    elementwise: ClassVar[bool] = True

    def init(self, low: Tensor) -> State:
        """Return a zero buffer of the shape of `low`, fp32."""
        return {"exp_avg": torch.zeros_like(low, dtype=state_dtype(low), memory_format=torch.contiguous_format)}

    def update(self, low: Tensor, state: State, t: int, hp: Hyper) -> Tensor:
        """Return the advanced buffer, a copy."""
        return state["exp_avg"].mul_(hp.betas[0]).add_(low).clone()

    def accumulate_(self, first: Tensor, second: Tensor, value: Tensor, square: Tensor, *, t: int, hp: Hyper) -> None:
        """Advance the buffer; there is no second moment."""
        first.mul_(hp.betas[0]).add_(value)

    def direction(self, first: Tensor, second: Tensor, *, t: int, hp: Hyper) -> Tensor:
        """Return the buffer, a copy."""
        return first.clone()


@dataclass(frozen=True)
class Average(SGD):
    """A moving average instead of a sum: what Flora keeps in compact space."""

    def update(self, low: Tensor, state: State, t: int, hp: Hyper) -> Tensor:
        """Return the advanced average itself."""
        return state["exp_avg"].lerp_(low.to(state["exp_avg"].dtype), 1 - hp.betas[0])
