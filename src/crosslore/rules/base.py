"""What an update rule does."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crosslore.config import Hyper
from crosslore.kernels.rounding import stochastic_round

State = dict[str, Tensor]

# Weights of more entries are stepped piece by piece, so that a step's fp32 temporaries stay small; 4 MiB each.
PIECE = 1 << 20


def state_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of the moments: fp32, or fp64 for fp64 gradients. In bf16 they would never decay."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Rule(ABC):
    """Turns a gradient into an update; works on any tensor, compact or full.

    A subclass writes `init` and `update`, and `accumulate_` and `direction` if the sparse residual is to work
    with it. Decay and the learning rate are the step's business.
    """

    # "corrected": m_hat / (sqrt(v_hat) + eps), torch and Algorithm 2. "uncorrected": galore-torch,
    # sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps). Of Adam's rules only.
    eps_placement: str = "corrected"

    # Whether its second moment is a sum over all steps instead of an average.
    sums: ClassVar[bool] = False
    # Whether an entry's update depends on nothing but its own gradient and state (or those of its block of 256).
    elementwise: ClassVar[bool] = False

    @abstractmethod
    def init(self, low: Tensor) -> State:
        """Return the fresh state for a gradient of this shape."""

    @abstractmethod
    def update(self, low: Tensor, state: State, t: int, hp: Hyper) -> Tensor:
        """Return N_t, fp32, shape of `low`; the caller multiplies by -lr * scale. Changes `state` in place."""

    def update_many(
        self, lows: Sequence[Tensor], states: Sequence[State], steps: Sequence[int], hp: Hyper
    ) -> list[Tensor]:
        """Return the updates of several tensors of one group; the foreach path. Equal to `update` on each."""
        return [self.update(low, state, t, hp) for low, state, t in zip(lows, states, steps, strict=True)]

    def load(self, state: State) -> tuple[Tensor | None, Tensor | None]:
        """Return M'_t and V'_t in fp32, None for one that the rule does not keep in full; may be the state itself."""
        return state.get("exp_avg"), state.get("exp_avg_sq")

    def store_(self, state: State, first: Tensor | None, second: Tensor | None) -> None:
        """Replace the moments by others of the same shape; None leaves one as it is."""
        for key, value in (("exp_avg", first), ("exp_avg_sq", second)):
            if value is not None and value is not state[key]:
                state[key].copy_(value)

    def first_moment(self, state: State) -> Tensor | None:
        """Return M'_t in fp32, or None if the rule has none."""
        return self.load(state)[0]

    def second_moment(self, state: State) -> Tensor | None:
        """Return V'_t in fp32, or None if the rule has none."""
        return self.load(state)[1]

    def accumulate_(self, first: Tensor, second: Tensor, value: Tensor, square: Tensor, *, t: int, hp: Hyper) -> None:
        """Advance a pair of moments by a gradient and by its square, as this rule does, in place.

        Raises:
            ValueError: if the rule keeps no moments of gradients.
        """
        raise ValueError(
            f"residual='sparse' needs a rule that keeps moments, got {type(self).__name__}. Use rule='adamw'."
        )

    def direction(self, first: Tensor, second: Tensor, *, t: int, hp: Hyper) -> Tensor:
        """Return the update that a pair of moments stands for, a new tensor."""
        raise NotImplementedError

    def bias_factor(self, t: int, hp: Hyper) -> float:
        """Return the factor that an "uncorrected" update carries, which peers apply after their norms."""
        return 1.0

    def step_weight_(
        self, weight: Tensor, grad: Tensor, state: State, t: int, hp: Hyper, *, draws: torch.Generator | None = None
    ) -> None:
        """Do one step of a weight at full rank, in place; `draws` rounds at random. Eq. 6, 10."""
        for part, part_grad, part_state in self.pieces(weight, grad, state):
            update = self.update(part_grad, part_state, t, hp).mul_(hp.update_factor)
            update.add_(part, alpha=hp.weight_factor)  # one rounding to the weight's dtype
            part.copy_(update if draws is None else stochastic_round(update, part.dtype, generator=draws))

    def state_of_rows(self, state: State, weight: Tensor, rows: slice) -> State:
        """Return views of the state of some rows of a matrix; for elementwise rules.

        Args:
            state: of the whole matrix.
            weight: (rows, cols).
            rows: first and last row; the first is a multiple of 256.
        """
        return {key: value[rows] for key, value in state.items() if key != "step"}

    def pieces(self, weight: Tensor, grad: Tensor, state: State) -> list[tuple[Tensor, Tensor, State]]:
        """Return views of weight, gradient and state that can be stepped one after another."""
        elementwise = all(value.shape == weight.shape for key, value in state.items() if key != "step")
        if not elementwise or weight.numel() <= PIECE or not (weight.is_contiguous() and grad.is_contiguous()):
            return [(weight, grad, state)]
        keys = [key for key in state if key != "step"]
        tensors = (weight, grad, *(state[key] for key in keys))
        views = zip(*(tensor.view(-1).split(PIECE) for tensor in tensors), strict=True)
        return [(part, part_grad, dict(zip(keys, rest, strict=True))) for part, part_grad, *rest in views]
