"""The moments stay as they are, as in GaLore."""

from dataclasses import dataclass

from torch import Tensor

from crosslore.layout import MatrixLayout


@dataclass(frozen=True)
class Keep:
    """Leaves the moments alone: they then refer to the old basis, which the papers accept."""

    def on_refresh(
        self, state: dict[str, Tensor], old: Tensor | None, new: Tensor, layout: MatrixLayout, t: int
    ) -> None:
        """Do nothing."""
