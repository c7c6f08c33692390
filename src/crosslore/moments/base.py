"""What a moment policy does."""

from typing import Protocol

from torch import Tensor

from crosslore.layout import MatrixLayout


class MomentPolicy(Protocol):
    """Adapts the moments to a new basis."""

    def on_refresh(
        self, state: dict[str, Tensor], old: Tensor | None, new: Tensor, layout: MatrixLayout, t: int
    ) -> None:
        """Change `state` in place; `old` is None at the first fit."""
