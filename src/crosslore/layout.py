"""What is fixed once about a weight: its shape, the side of its basis, its rank, its heads."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Side = Literal["left", "right"]


@dataclass(frozen=True, kw_only=True)
class MatrixLayout:
    """Shape and orientation of one low-rank matrix; decided once, never guessed again from a gradient.

    `nn.Linear.weight` is (out, in), the transpose of the paper's W, and a head is a block of rows.

    Raises:
        ValueError: if the rank exceeds the smaller side or the heads do not divide the rows.
    """

    # Rows m (outputs) and columns n (inputs).
    rows: int
    cols: int
    # Number of basis vectors r.
    rank: int
    # "left": basis (rows, r), R = P^T G, (r, cols); "right": basis (cols, r), R = G P, (rows, r).
    side: Side
    # Attention heads among the rows; 1 when there are none.
    heads: int = 1
    # Leading dimensions of stacked matrices.
    batch: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check that the rank fits and the heads divide the rows."""
        if not 1 <= self.rank <= min(self.rows, self.cols):
            raise ValueError(
                f"rank must be in [1, {min(self.rows, self.cols)}] for a {self.rows} x {self.cols} matrix, "
                f"got {self.rank}. Lower `rank` or drop the layer from `targets`."
            )
        if self.side not in ("left", "right"):
            raise ValueError(f"side must be 'left' or 'right', got {self.side!r}.")
        if self.heads < 1 or self.rows % self.heads:
            raise ValueError(f"heads must divide the {self.rows} rows, got {self.heads}. Check the model's config.")

    @property
    def head_width(self) -> int:
        """Rows of one head, the paper's d_k."""
        return self.rows // self.heads

    @property
    def basis_shape(self) -> tuple[int, ...]:
        """(rows, r) on the left, (cols, r) on the right; stacked matrices have one each."""
        return *self.batch, (self.rows if self.side == "left" else self.cols), self.rank

    @property
    def low_shape(self) -> tuple[int, ...]:
        """Shape of a compact gradient: (r, cols) on the left, (rows, r) on the right."""
        return *self.batch, *((self.rank, self.cols) if self.side == "left" else (self.rows, self.rank))

    def factors(self, low: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (rows, r) and B (cols, r) such that the projected-back matrix is A B^T; views, no copies."""
        return (basis, low.mT) if self.side == "left" else (low, basis)

    def add_product_(self, weight: Tensor, a: Tensor, b: Tensor, *, alpha: float, beta: float) -> None:
        """Set weight <- beta * weight + alpha * A B^T in one pass; A and B as `factors` returns them."""
        a, b = as_dtype(a, weight.dtype), as_dtype(b, weight.dtype)
        if not self.batch:
            weight.addmm_(a, b.mT, alpha=alpha, beta=beta)
        elif len(self.batch) == 1:
            weight.baddbmm_(a, b.mT, alpha=alpha, beta=beta)
        else:
            weight.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.mT.flatten(0, -3), alpha=alpha, beta=beta)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor.to(dtype)`; asking first is ten times faster where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def shorter_side(rows: int, cols: int, *, square: Side = "right") -> Side:
    """Return the side that makes the basis small: right when rows > cols; `square` is the choice for equal ones."""
    if rows == cols:
        return square
    return "right" if rows > cols else "left"


@dataclass(frozen=True, kw_only=True)
class RowSpan:
    """The rows of one role (query, key, value) inside a fused weight: `length` rows out of every `stride`.

    A concatenated weight has one span of its whole stride; one that interleaves heads repeats it.
    """

    # First row within a stride, rows taken from each stride, rows of a stride.
    start: int
    length: int
    stride: int

    def take(self, weight: Tensor) -> Tensor:
        """Return the rows as a matrix: a view when they are adjacent, else a copy (see `put_`)."""
        if weight.shape[0] == self.stride:
            return weight[self.start : self.start + self.length]
        rows: Tensor = self._parts(weight).flatten(0, 1)
        return rows

    def put_(self, weight: Tensor, block: Tensor) -> None:
        """Write back what `take` returned, if that was a copy."""
        if weight.shape[0] != self.stride:
            self._parts(weight).copy_(block.view(-1, self.length, block.shape[1]))

    def _parts(self, weight: Tensor) -> Tensor:
        """Return the rows as a view, (repeats, length, cols)."""
        parts: Tensor = weight.unflatten(0, (-1, self.stride))[:, self.start : self.start + self.length]
        return parts


@dataclass(frozen=True, kw_only=True)
class Block:
    """One low-rank matrix: a whole weight, or the rows of one role of a fused one."""

    layout: MatrixLayout
    # Prefix of the state keys; "" for a whole weight.
    key: str = ""
    # Where the rows are; None for a whole weight.
    span: RowSpan | None = None
    # The weight is stored as (in, out), as transformers.Conv1D does: its transpose is the matrix.
    transposed: bool = False
    # One head's basis is shared by all heads (Eq. 4).
    cross_head: bool = False
    # The sparsely coded residual is on (Algorithm 2).
    residual: bool = False
    # Steps by which this weight's refreshes are shifted, so that not all of them fall on one step.
    refresh_offset: int = 0

    @property
    def interleaved(self) -> bool:
        """Whether its rows are spread over a fused weight, so that `take` copies them."""
        return self.span is not None and self.layout.rows != self.span.length

    def take(self, tensor: Tensor) -> Tensor:
        """Return the matrix of a weight or gradient: a view where it can be one, else a copy (see `put_`).

        A convolution's weight (out, in, kernel ...) is the matrix (out, in * kernel).
        """
        matrix = tensor.mT if self.transposed else tensor
        if matrix.dim() != 2 + len(self.layout.batch):
            matrix = matrix.reshape(matrix.shape[0], -1)
        return matrix if self.span is None else self.span.take(matrix)

    def put_(self, weight: Tensor, matrix: Tensor) -> None:
        """Write back what `take` returned, if that was a copy."""
        if matrix is weight or matrix.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
            return
        whole = weight.mT if self.transposed else weight
        if self.span is not None:
            self.span.put_(whole, matrix)
        else:
            whole.copy_(matrix.view(whole.shape))

    def to_plain(self) -> dict[str, Any]:  # Any: nested plain values, as a parameter group stores them
        """Return plain values only, for a parameter group."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Block":  # Any: see to_plain
        """Return the block that `to_plain` described; one of an older version lacks newer fields."""
        layout = dict(plain["layout"])
        layout["batch"] = tuple(layout.get("batch", ()))
        span = RowSpan(**plain["span"]) if plain.get("span") else None
        return cls(**{**plain, "layout": MatrixLayout(**layout), "span": span})


# Turns of a circle, modulo 1, whose multiples are spread over it evenly, however many they are: the golden ratio.
GOLDEN = 0.6180339887498949


def stagger_(blocks: list[list[dict[str, Any]]], every: int, *, group: int = 0) -> None:  # Any: see Block.to_plain
    """Spread the refreshes of a group's weights evenly over an interval of `every` steps; groups start apart."""
    low_rank = [plan for plan in blocks if plan]
    start = int(group * GOLDEN % 1 * every)
    for i, plan in enumerate(low_rank):
        for block in plan:
            block["refresh_offset"] = (start + i * every // len(low_rank)) % every
