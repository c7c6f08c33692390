"""The moments start again from zero."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from crosslore.moments.base import MomentPolicy, Refresh


@dataclass(frozen=True)
class Reset(MomentPolicy):
    """Sets the moments to zero, and the step of their bias correction too, as FRUGAL does."""

    restarts: ClassVar[bool] = True

    def on_refresh(self, state: dict[str, Tensor], refresh: Refresh) -> None:
        """Zero both moments."""
        first, second = refresh.rule.load(state)
        zeros = (None if m is None else m.new_zeros(m.shape) for m in (first, second))
        refresh.rule.store_(state, *zeros)
