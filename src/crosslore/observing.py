"""What looks on while an optimizer steps. Internal: `crosslore.telemetry` is the public way to use it.

`optimizer.observers` is empty by default. Then no step does anything for them: no product, no clock, no transfer.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from crosslore.compact.factors import GradientFactors
    from crosslore.stepping import Pending


class Observer(Protocol):
    """Is told of the steps of low-rank weights while they happen; must change nothing."""

    def refreshing(self, weight: Tensor) -> AbstractContextManager[None]:
        """Return what is entered while the basis of a weight is fitted and its first compact gradient computed."""
        ...

    def on_gradient(self, pending: "Pending", *, factors: "GradientFactors | None") -> None:
        """Look at a block whose compact gradient is known; its gradient is `ctx.grad`, or the product of `factors`.

        Where micro-batches accumulate compact parts it is the gradient of the first one.
        """
        ...

    def on_residual(self, name: str, update: Tensor) -> None:
        """Look at what a sparse residual adds to a weight, at its kept positions."""
        ...


def all_refreshing(observers: Sequence[Observer], weight: Tensor) -> AbstractContextManager[object]:
    """Return a context in which all observers time a refresh."""
    stack = ExitStack()
    for observer in observers:
        stack.enter_context(observer.refreshing(weight))
    return stack
