"""What a moment policy does."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from crosslore.config import Hyper
from crosslore.layout import MatrixLayout
from crosslore.rules.base import Rule


@dataclass(frozen=True)
class Refresh:
    """One change of basis: P_{t-1} -> P_t."""

    # The old and the new basis, (d, r), dtype in which bases are stored.
    old: Tensor
    new: Tensor
    layout: MatrixLayout
    rule: Rule
    hp: Hyper
    # The step that does it, counted from 1; the moments are those of step t - 1.
    t: int


class MomentPolicy(Protocol):
    """Adapts the moments to a new basis."""

    # Whether the moments start from zero at a refresh, so that their bias correction counts from there.
    restarts: ClassVar[bool] = False

    def on_refresh(self, state: dict[str, Tensor], refresh: Refresh) -> None:
        """Change the moments in `state` in place."""
