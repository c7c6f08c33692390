"""Parameter groups: their options, the matrices in them, the size of their gradients."""

from dataclasses import fields
from difflib import get_close_matches
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from crosslore.config import Hyper, LowRankConfig
from crosslore.layout import Block, MatrixLayout, shorter_side
from crosslore.registry import unknown_name

# Options on which the keys and shapes of the state depend.
STRUCTURAL = (
    "rank",
    "projector",
    "fit_window",
    "basis_dtype",
    "residual",
    "residual_ratio",
    "residual_select",
    "rule",
    # Its end is when the positions are chosen: it must not be moved past it.
    "warmup_steps",
)
# Keys that torch's schedulers put into groups, and which resemble options.
OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}


def plain(value: Any) -> Any:  # Any: torch.optim takes a learning rate as a tensor too
    """Return a learning rate as a number."""
    return value.item() if isinstance(value, Tensor) else value


def refuse_misspelt(group: dict[str, Any], known: dict[str, Any]) -> None:  # Any: torch's own dict
    """Raise a TypeError for a key that looks like a misspelt option; keys of other tools are left alone."""
    for key in group:
        if key not in known and key not in OF_SCHEDULERS and get_close_matches(key, known, n=1, cutoff=0.75):
            raise TypeError(unknown_name("group option", key, known))


def default_blocks(name: str, weight: Tensor, config: LowRankConfig) -> list[dict[str, Any]]:
    """Return the plain blocks of a matrix about which only its shape is known."""
    if weight.dim() != 2:
        raise ValueError(
            f"a group with `rank` takes matrices, got {name} with shape {tuple(weight.shape)}. "
            "Put it into a group without `rank`."
        )
    rows, cols = weight.shape
    side = shorter_side(rows, cols, square=config.square_side)
    try:
        layout = MatrixLayout(rows=rows, cols=cols, rank=config.rank, side=side)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return [Block(layout=layout, residual=config.residual == "sparse").to_plain()]


def hyper_of(group: dict[str, Any]) -> Hyper:  # Any: torch's own dict
    """Return the numbers of a group's next step."""
    return Hyper(**{f.name: group[f.name] for f in fields(Hyper) if f.name != "lr"}, lr=float(group["lr"]))


def largest_entries(grads: list[Tensor]) -> list[float]:
    """Return max|G| of each gradient (inf or NaN if it is not finite); one transfer from the device in all."""
    if not grads:
        return []
    ends = (torch.aminmax(grad) for grad in grads)  # one fast pass; NaN comes through, unlike from a sum
    peaks = [torch.maximum(-low, high) for low, high in ends]
    widest = torch.float64 if any(peak.dtype == torch.float64 for peak in peaks) else torch.float32
    peaks_list: list[float] = torch.stack([peak.to(peaks[0].device, widest) for peak in peaks]).tolist()
    return peaks_list


def largest_of_each(groups: list[list[Tensor]]) -> list[float]:
    """Return the largest entry of each group of tensors, inf if one is not finite, 0 for none; one transfer in all."""
    peaks = iter(largest_entries([tensor for group in groups for tensor in group]))
    found = [[next(peaks) for _ in group] for group in groups]
    return [max(mine, default=0.0) if all(map(isfinite, mine)) else inf for mine in found]


def refuse_structural_change(old: LowRankConfig, new: LowRankConfig) -> None:
    """Raise a ValueError if an option on which the tensors of the state depend was changed in a running group."""
    for name in STRUCTURAL:
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            raise ValueError(
                f"{name} cannot change while the optimizer runs, got {after!r} after {before!r}: what the "
                "state holds depends on it. Build a new optimizer."
            )
