"""What is fixed once about a weight: its shape, the side of its basis, its rank, its heads."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

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
    def basis_shape(self) -> tuple[int, int]:
        """(rows, r) on the left, (cols, r) on the right."""
        return (self.rows if self.side == "left" else self.cols), self.rank

    def factors(self, low: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (rows, r) and B (cols, r) such that the projected-back matrix is A B^T; views, no copies."""
        return (basis, low.mT) if self.side == "left" else (low, basis)


def shorter_side(rows: int, cols: int) -> Side:
    """Return GaLore's choice, the side that makes the basis small: right when rows >= cols."""
    return "right" if rows >= cols else "left"


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
        return self._parts(weight).flatten(0, 1)

    def put_(self, weight: Tensor, block: Tensor) -> None:
        """Write back what `take` returned, if that was a copy."""
        if weight.shape[0] != self.stride:
            self._parts(weight).copy_(block.view(-1, self.length, block.shape[1]))

    def _parts(self, weight: Tensor) -> Tensor:
        """Return the rows as a view, (repeats, length, cols)."""
        return weight.view(-1, self.stride, weight.shape[1])[:, self.start : self.start + self.length]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One low-rank matrix: a whole weight, or the rows of one role of a fused one."""

    layout: MatrixLayout
    # Prefix of the state keys; "" for a whole weight.
    key: str = ""
    # Where the rows are; None for a whole weight.
    span: RowSpan | None = None
    # One head's basis is shared by all heads (Eq. 4).
    cross_head: bool = False
    # The sparsely coded residual is on (Algorithm 2).
    residual: bool = False

    def to_plain(self) -> dict[str, Any]:  # Any: nested plain values, as a parameter group stores them
        """Return plain values only, for a parameter group."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Block":  # Any: see to_plain
        """Return the block that `to_plain` described."""
        layout = dict(plain["layout"])
        layout["batch"] = tuple(layout.get("batch", ()))
        span = RowSpan(**plain["span"]) if plain.get("span") else None
        return cls(**{**plain, "layout": MatrixLayout(**layout), "span": span})
