"""AdaGrad: the update is the gradient over the root of the sum of its squares."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crosslore.config import Hyper
from crosslore.rules.base import Rule, State, state_dtype


@dataclass(frozen=True)
class Adagrad(Rule):
    """As torch.optim.Adagrad without its learning-rate decay; `betas` are not used.

    State: `exp_avg_sq`, which is a plain sum here.
    """

    sums: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def init(self, low: Tensor) -> State:
        """Return a zero sum of the shape of `low`, fp32."""
        return {"exp_avg_sq": torch.zeros_like(low, dtype=state_dtype(low), memory_format=torch.contiguous_format)}

    def update(self, low: Tensor, state: State, t: int, hp: Hyper) -> Tensor:
        """Return g / (sqrt(sum of g * g) + eps), fp32; the sum changes in place."""
        total = state["exp_avg_sq"]
        low = low.to(total.dtype)
        total.addcmul_(low, low)
        return self.direction(low, total, t=t, hp=hp)

    def accumulate_(self, first: Tensor, second: Tensor, value: Tensor, square: Tensor, *, t: int, hp: Hyper) -> None:
        """Add the square to the sum; the first moment is the gradient itself."""
        first.copy_(value)
        second.add_(square)

    def direction(self, first: Tensor, second: Tensor, *, t: int, hp: Hyper) -> Tensor:
        """Return first / (sqrt(second) + eps), a new tensor."""
        return first / second.sqrt().add_(hp.eps)
