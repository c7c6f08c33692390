"""What a residual sees and does."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor

from crosslore.config import Hyper
from crosslore.layout import MatrixLayout
from crosslore.observing import Observer
from crosslore.rules.base import Rule

if TYPE_CHECKING:
    from crosslore.config import LowRankConfig


@dataclass
class StepContext:
    """What one step of one weight has at hand."""

    # G_t, (rows, cols), as `Residual.prepare` returned it; None when only compact parts of it were kept.
    grad: Tensor | None
    # R_t, compact.
    low: Tensor
    # P_t, in the dtype of the gradient.
    basis: Tensor
    # The weight's state: its moments are those of step t once the rule has run.
    state: dict[str, Tensor]
    layout: MatrixLayout
    rule: Rule
    hp: Hyper
    # Step, counted from 1.
    t: int
    # Steps that the moments have seen, this one included: t, unless a refresh resets them.
    age: int
    # The weight's name, part of the seeds of draws.
    name: str = ""
    # Rows and columns of the kept positions, where they were needed already.
    positions: tuple[Tensor, Tensor] | None = None
    # Entries of G_t at the kept positions; None: take them from `grad`.
    kept: Tensor | None = None
    # Returns G_t at rows and columns that are not known yet, where `grad` is None.
    entries: Callable[[Tensor, Tensor], Tensor] | None = None
    # Whether a residual without warm-up could not act in step 1, because the gradient was gone by then.
    late: bool = False
    # What a residual carries from the start of the step to its end.
    carry: dict[str, Tensor] = field(default_factory=dict)
    # Who looks on; see crosslore.observing.
    observers: Sequence[Observer] = ()


@dataclass(frozen=True)
class Residual(ABC):
    """Repairs what the projection leaves out. Dataclass fields are options, named as in `LowRankConfig`."""

    # Whether `apply_` applies the projected update too.
    replaces_update: ClassVar[bool] = False
    # Whether it needs the sum of all gradients of a step, so that compact parts of each are not enough.
    needs_whole_gradient: ClassVar[bool] = True
    # Whether `prepare` changes the gradient or the state.
    prepares: ClassVar[bool] = False
    # What takes the place of the configured rule on compact gradients, if anything.
    compact_rule: ClassVar[Rule | None] = None

    @classmethod
    def from_config(cls, config: "LowRankConfig") -> Self:
        """Return the residual that `config` describes."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})

    def init(self, grad: Tensor, layout: MatrixLayout) -> dict[str, Tensor]:
        """Return the fresh state for a gradient of this layout."""
        return {}

    def prepare(self, grad: Tensor, state: dict[str, Tensor], hp: Hyper, t: int, carry: dict[str, Tensor]) -> Tensor:
        """Return what takes the place of G_t in this step; may put something into `carry`."""
        return grad

    def on_refresh(
        self, state: dict[str, Tensor], rule: Rule, old: Tensor, hp: Hyper, carry: dict[str, Tensor]
    ) -> None:
        """Look at the old basis and its moments before they change; may put something into `carry`."""
        return

    @abstractmethod
    def apply_(self, weight: Tensor, update: Tensor, ctx: StepContext) -> None:
        """Add the residual update to `weight`; `update` is N_t, compact. May keep state in `ctx.state`."""
