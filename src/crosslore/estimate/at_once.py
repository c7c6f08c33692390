"""What exists at once where a step works in groups: compact gradients that wait, their updates, rows of a gradient.

The sizes of the groups are those of the code that steps: `compact.gradients.READY`, `stepping.AT_ONCE`, `compact.rows`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from crosslore.compact import rows
from crosslore.compact.gradients import READY
from crosslore.stepping import AT_ONCE

if TYPE_CHECKING:
    from crosslore.optimizer import LowRankOptimizer

Device = Literal["cuda", "cpu"]


def waiting_compact(entries: Sequence[int], device: Device, *, sizes: Sequence[int] | None = None) -> tuple[int, int]:
    """Return the most that waits of compact gradients which step inside backward, and what is left at its end.

    Args:
        entries: of each weight's R, in the order of backward.
        device: where they are.
        sizes: what is added up, such as bytes; None: entries.
    """
    most = waiting = found = 0
    for size, count in zip(entries if sizes is None else sizes, entries, strict=True):
        waiting, found = waiting + size, found + count
        most = max(most, waiting)
        if found >= READY[device]:
            waiting = found = 0
    return most, waiting


def updates_together(entries: Sequence[int], device: Device) -> int:
    """Return the entries of the largest group of updates: those of one group are gone before the next are made."""
    groups = [0]
    for count in entries:
        if groups[-1] and groups[-1] + count > AT_ONCE[device]:
            groups.append(0)
        groups[-1] += count
    return max(groups)


def row_entries(weight: Tensor, device: Device) -> int:
    """Return the most entries of a gradient that exist where it comes in rows, as `compact.rows.chunks` has them."""
    count, cols = weight.shape
    return cols * min(count, max(rows.ROWS, rows.AT_ONCE[device] // max(1, cols) // rows.ROWS * rows.ROWS))


def in_rows(optimizer: "LowRankOptimizer") -> dict[int, Tensor]:
    """Return the weights whose gradient comes in rows, by id."""
    layerwise = optimizer.compact.layerwise if optimizer.compact is not None else None
    stepper = layerwise.rows if layerwise is not None else None
    return {} if stepper is None else {id(weight): weight for weight in stepper.modules}
