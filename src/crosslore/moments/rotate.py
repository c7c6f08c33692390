"""The moments are expressed in the new basis (LDAdam, Robert et al. 2024, section 3.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crosslore.config import Hyper
from crosslore.moments.base import MomentPolicy, Refresh


@dataclass(frozen=True)
class RotateFirst(MomentPolicy):
    """M <- C M with C = P_t^T P_{t-1}; V stays. What GoLore intends (its package drops the result)."""

    def on_refresh(self, state: dict[str, Tensor], refresh: Refresh) -> None:
        """Rotate the first moment."""
        first, _ = refresh.rule.load(state)
        if first is not None:
            refresh.rule.store_(state, turned(first, change(refresh, first.dtype), refresh), None)


@dataclass(frozen=True)
class Rotate(MomentPolicy):
    """M <- C M, and V as the variance of the old coordinates seen in the new ones, as LDAdam's code does.

    With c_i = 1 - beta_i^(t-1) and C * C entry by entry:
    V <- |c2 [(C * C) (V / c2 - (M / c1)^2) + (C M / c1)^2]|. A rule without first moment: V <- (C * C) V.
    """

    def on_refresh(self, state: dict[str, Tensor], refresh: Refresh) -> None:
        """Rotate both moments; one that the rule does not have is left out."""
        first, second = refresh.rule.load(state)
        some = first if first is not None else second
        if some is None:
            return
        matrix = change(refresh, some.dtype)
        moved = None if first is None else turned(first, matrix, refresh)
        if second is not None:
            second = _second(first, second, moved, matrix, refresh)
        refresh.rule.store_(state, moved, second)


def _second(first: Tensor | None, second: Tensor, moved: Tensor | None, matrix: Tensor, refresh: Refresh) -> Tensor:
    """Return the second moment in the new basis."""
    squares = matrix.square()
    if first is None or moved is None:
        return turned(second, squares, refresh)
    c1, c2 = _corrections(refresh.hp, refresh.t - 1)
    variance = second / c2 - (first / c1).square()
    return turned(variance, squares, refresh).add_((moved / c1).square()).mul_(c2).abs_()


def _corrections(hp: Hyper, steps: int) -> tuple[float, float]:
    return 1 - hp.betas[0] ** steps, 1 - hp.betas[1] ** steps


def change(refresh: Refresh, dtype: torch.dtype) -> Tensor:
    """Return C = P_t^T P_{t-1}, (r, r)."""
    return refresh.new.to(dtype).mT @ refresh.old.to(dtype)


def turned(moment: Tensor, matrix: Tensor, refresh: Refresh) -> Tensor:
    """Return C M on the left, M C^T on the right."""
    return matrix @ moment if refresh.layout.side == "left" else moment @ matrix.mT
