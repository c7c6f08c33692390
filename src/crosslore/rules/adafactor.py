"""Adafactor (Shazeer and Stern 2018): the second moment is the outer product of two vectors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crosslore.config import Hyper
from crosslore.rules.base import Rule, State, state_dtype

# Added to squared gradients, exponent of the decay rate 1 - t^-0.8, largest root mean square of an update: the
# defaults of the paper and of transformers.Adafactor.
EPS = 1e-30
DECAY_EXPONENT = -0.8
CLIP_THRESHOLD = 1.0


@dataclass(frozen=True)
class Adafactor(Rule):
    """As transformers.Adafactor with scale_parameter and relative_step off and no beta1; `betas` are not used.

    State: `exp_avg_sq_row` (..., m) and `exp_avg_sq_col` (..., n) of a matrix, `exp_avg_sq` of a vector; fp32.
    """

    def init(self, low: Tensor) -> State:
        """Return zero statistics for the shape of `low`."""
        if low.dim() < 2:
            return {"exp_avg_sq": torch.zeros_like(low, dtype=state_dtype(low))}
        dtype = state_dtype(low)
        return {
            "exp_avg_sq_row": low.new_zeros(low.shape[:-1], dtype=dtype),
            "exp_avg_sq_col": low.new_zeros((*low.shape[:-2], low.shape[-1]), dtype=dtype),
        }

    def update(self, low: Tensor, state: State, t: int, hp: Hyper) -> Tensor:
        """Return g / sqrt(v), scaled down to a root mean square of at most 1; fp32."""
        update = precondition(low, state, t)
        return clip_(update)

    def load(self, state: State) -> tuple[Tensor | None, Tensor | None]:
        """Return no first moment, and V' as the outer product that the statistics stand for; a new tensor."""
        if "exp_avg_sq" in state:
            return None, state["exp_avg_sq"]
        row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        share = row / row.mean(-1, keepdim=True).clamp_(min=torch.finfo(row.dtype).tiny)
        return None, share.unsqueeze(-1) * col.unsqueeze(-2)

    def store_(self, state: State, first: Tensor | None, second: Tensor | None) -> None:
        """Replace the statistics by the row and column means of V'."""
        if second is None:
            return
        if "exp_avg_sq" in state:
            state["exp_avg_sq"].copy_(second)
            return
        state["exp_avg_sq_row"].copy_(second.mean(-1))
        state["exp_avg_sq_col"].copy_(second.mean(-2))

    def accumulate_(self, first: Tensor, second: Tensor, value: Tensor, square: Tensor, *, t: int, hp: Hyper) -> None:
        """Advance the moving average of squares; the first moment is the gradient itself."""
        first.copy_(value)
        second.lerp_(square, float(t) ** DECAY_EXPONENT)

    def direction(self, first: Tensor, second: Tensor, *, t: int, hp: Hyper) -> Tensor:
        """Return first / sqrt(second), a new tensor, without the clip, which concerns whole matrices."""
        return first * second.clamp(min=EPS).rsqrt_()


def precondition(grad: Tensor, state: State, t: int) -> Tensor:
    """Return g / sqrt(v) in fp32, a new tensor, after advancing the statistics by `grad`."""
    share = float(t) ** DECAY_EXPONENT  # 1 - beta2_t
    grad = grad.to(_statistics(state).dtype)
    squares = grad.square().add_(EPS)
    if "exp_avg_sq" in state:
        return grad * state["exp_avg_sq"].lerp_(squares, share).rsqrt()
    row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    row.lerp_(squares.mean(-1), share)
    col.lerp_(squares.mean(-2), share)
    scale = (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
    return torch.mul(grad, scale, out=squares).mul_(col.rsqrt().unsqueeze(-2))


def clip_(update: Tensor) -> Tensor:
    """Scale an update down to a root mean square of at most 1, stacked matrices all together; in place."""
    rms = torch.linalg.vector_norm(update) * update.numel() ** -0.5
    return update.div_((rms / CLIP_THRESHOLD).clamp_(min=1.0))


def _statistics(state: State) -> Tensor:
    return state["exp_avg_sq"] if "exp_avg_sq" in state else state["exp_avg_sq_row"]
