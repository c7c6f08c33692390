"""What an update rule does."""

from typing import Protocol

from torch import Tensor

from crosslore.config import Hyper


class Rule(Protocol):
    """Turns a gradient into an update; works on any tensor, compact or full."""

    @property
    def eps_placement(self) -> str:
        """Where eps enters the denominator; see `LowRankConfig.eps_placement`."""

    def init(self, low: Tensor) -> dict[str, Tensor]:
        """Return the fresh state for a gradient of this shape."""

    def update(self, low: Tensor, state: dict[str, Tensor], t: int, hp: Hyper) -> Tensor:
        """Return N_t, fp32, shape of `low`; the caller multiplies by -lr * scale. Changes `state` in place."""

    def first_moment(self, state: dict[str, Tensor]) -> Tensor | None:
        """Return M'_t in fp32, or None if the rule has none."""

    def second_moment(self, state: dict[str, Tensor]) -> Tensor | None:
        """Return V'_t in fp32, or None if the rule has none."""
