"""The moments start again from zero."""

from dataclasses import dataclass

from torch import Tensor

from crosslore.moments.base import Refresh


@dataclass(frozen=True)
class Reset:
    """Sets the moments to zero, as FRUGAL does.

    Differs from FRUGAL: the step is not reset, so the bias correction does not start again and the first updates
    after a refresh are smaller instead of as large as the first ones of a run.
    """

    def on_refresh(self, state: dict[str, Tensor], refresh: Refresh) -> None:
        """Zero both moments."""
        first, second = refresh.rule.load(state)
        zeros = (None if m is None else m.new_zeros(m.shape) for m in (first, second))
        refresh.rule.store_(state, *zeros)
