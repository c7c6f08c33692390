"""Eq. 3-4: the basis of one head's gradient, shared by all heads of the layer."""

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor

from crosslore.layout import MatrixLayout
from crosslore.projectors.base import Projector
from crosslore.projectors.randomized import Randomized

if TYPE_CHECKING:
    from crosslore.config import LowRankConfig


@dataclass(frozen=True)
class CrossHead(Projector):
    """Fits another projector to the rows of a few randomly drawn heads.

    One head of width d_k spans at most d_k directions, so ceil(r / d_k) heads are drawn without replacement
    (the paper draws one, and does not say what it does at r = 256 > d_k = 128). New heads at each refresh.
    Under grouped-query attention the key has `num_key_value_heads` heads.
    """

    # What fits the basis to the chosen rows.
    inner: Projector = field(default_factory=Randomized)
    # Heads at random (paper), or those with the largest gradient.
    head_choice: Literal["random", "energy"] = "random"

    @classmethod
    def from_config(cls, config: "LowRankConfig") -> Self:
        """Return cross-head sharing around the projector that `config` names."""
        from crosslore.registry import build_projector

        return cls(inner=build_projector(config), head_choice=config.head_choice)

    def fit(self, grad: Tensor, layout: MatrixLayout, *, previous: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return P_i of Eq. 3, (cols, r): heads are blocks of rows, and what they share is the input side.

        Raises:
            ValueError: if the layout's side is not "right".
        """
        if layout.side != "right":
            raise ValueError(f"cross-head sharing needs side 'right', got {layout.side!r}. Let `layout` decide it.")
        rows = self.chosen_rows(grad, layout, generator)
        if not bool(rows.any()):  # heads without a gradient say nothing about a basis; the others do
            rows = grad
        part = replace(layout, rows=rows.shape[0], heads=1)
        return self.inner.fit(rows, part, previous=previous, generator=generator)

    def sketch_(
        self, sketch: Tensor, grad: Tensor, low: Tensor, layout: MatrixLayout, *, generator: torch.Generator
    ) -> None:
        """Add the share of this step's heads; others are drawn at each step of the window."""
        heads = self.chosen(grad, layout, generator)
        parts = taken(grad, heads, layout), taken(low, heads, layout)
        super().sketch_(sketch, *parts, layout, generator=generator)

    def chosen(self, grad: Tensor, layout: MatrixLayout, generator: torch.Generator) -> list[int] | Tensor:
        """Return the ceil(r / d_k) heads that are looked at; as a tensor if the gradient's device decides."""
        if self.head_choice == "random":
            return drawn(layout, generator)
        energy = torch.linalg.vector_norm(grad.unflatten(0, (layout.heads, -1)), dim=(1, 2), dtype=torch.float32)
        heads: Tensor = energy.topk(math.ceil(layout.rank / layout.head_width)).indices
        return heads

    def chosen_rows(self, grad: Tensor, layout: MatrixLayout, generator: torch.Generator) -> Tensor:
        """Return the rows of the chosen heads."""
        return taken(grad, self.chosen(grad, layout, generator), layout)


def taken(matrix: Tensor, heads: list[int] | Tensor, layout: MatrixLayout) -> Tensor:
    """Return the rows of these heads, (number of heads * d_k, cols of `matrix`)."""
    blocks: Tensor = matrix.unflatten(0, (layout.heads, layout.head_width))
    if isinstance(heads, Tensor):
        return blocks.index_select(0, heads).flatten(0, 1)
    return torch.cat([blocks[head] for head in heads])


def drawn(layout: MatrixLayout, generator: torch.Generator) -> list[int]:
    """Return the ceil(r / d_k) heads whose gradient is looked at, in the order drawn."""
    count = math.ceil(layout.rank / layout.head_width)
    heads: list[int] = torch.randperm(layout.heads, generator=generator, device="cpu")[:count].tolist()
    return heads
