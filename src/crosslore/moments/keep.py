"""The moments stay as they are, as in GaLore."""

from dataclasses import dataclass

from torch import Tensor

from crosslore.moments.base import MomentPolicy, Refresh


@dataclass(frozen=True)
class Keep(MomentPolicy):
    """Leaves the moments alone: they then refer to the old basis, which the papers accept."""

    def on_refresh(self, state: dict[str, Tensor], refresh: Refresh) -> None:
        """Do nothing."""
