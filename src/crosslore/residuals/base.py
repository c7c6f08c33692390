"""What a residual sees and does."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from crosslore.config import Hyper
from crosslore.layout import MatrixLayout
from crosslore.rules.base import Rule


@dataclass(frozen=True)
class StepContext:
    """What one step of one weight has at hand once its low-rank part is done."""

    # G_t, (rows, cols).
    grad: Tensor
    # R_t and N_t, compact.
    low: Tensor
    update: Tensor
    # The weight's state: basis and moments are those of step t.
    state: dict[str, Tensor]
    layout: MatrixLayout
    rule: Rule
    hp: Hyper
    # Step, counted from 1.
    t: int


class Residual(Protocol):
    """Repairs what the projection leaves out."""

    def init(self, grad: Tensor, layout: MatrixLayout) -> dict[str, Tensor]:
        """Return the fresh state for a gradient of this layout."""

    def apply_(self, weight: Tensor, ctx: StepContext, *, alpha: float) -> None:
        """Add alpha times the residual update to `weight`; may keep state in `ctx.state`."""
