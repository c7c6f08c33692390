"""Loading a state: is it of this optimizer, and do its tensors keep their dtypes."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch.optim import Optimizer

from crosslore.config import LowRankConfig
from crosslore.layout import Block

logger = logging.getLogger(__name__)

Groups = list[dict[str, Any]]  # Any: torch's own dicts of plain values


def check_same_structure(current: Groups, saved: Groups, *, names: Callable[[int], Sequence[str]]) -> None:
    """Compare the ranks, sides and spans of a checkpoint with those of the optimizer that loads it.

    Options that may differ (scale, seed, ...) are taken from the checkpoint, as torch.optim does; a warning names
    them.

    Raises:
        ValueError: if the checkpoint is not of this optimizer or a weight's low-rank layout differs.
    """
    if any("blocks" not in group for group in saved):
        raise ValueError(
            "the checkpoint is not of LowRankOptimizer: its groups have no `blocks`. "
            "Resume from a checkpoint of the same fine-tuning type, or start afresh."
        )
    for g, (mine, theirs) in enumerate(zip(current, saved, strict=False)):
        for name, there in zip(names(g), theirs.get("param_names", ()), strict=False):
            if name != there and "param_names" in mine:
                raise ValueError(
                    f"the checkpoint has the weight {there} where this run has {name}. "
                    "Resume with the same model and the same options, or start afresh."
                )
        for name, here, there in zip(names(g), mine["blocks"], theirs["blocks"], strict=False):
            if _structure(here) != _structure(there):
                raise ValueError(
                    f"{name} was saved as {_describe(there)}, this run asks for {_describe(here)}. "
                    "Resume with the options of the checkpoint, or start afresh."
                )
    changed = {
        f.name: (theirs[f.name], mine[f.name])
        for mine, theirs in zip(current, saved, strict=False)
        for f in fields(LowRankConfig)
        if f.name in theirs and theirs[f.name] != mine[f.name]
    }
    if changed:
        text = ", ".join(f"{name} {old!r} (asked for: {new!r})" for name, (old, new) in sorted(changed.items()))
        logger.warning("Resuming with the checkpoint's options where they differ: %s.", text)


def restore_dtypes(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:  # Any: torch's own dict
    """Put back the tensors as they were saved, on the weight's device; `step` stays on the CPU.

    `Optimizer.load_state_dict` casts floating-point and integer state to the weight's dtype: an int32 index 257
    would come back as bf16 256. Copies, so that two optimizers never share a tensor.
    """
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for saved_id, weight in zip(saved_ids, weights, strict=True):
        for key, value in state_dict["state"].get(saved_id, {}).items():
            if isinstance(value, torch.Tensor):
                device = torch.device("cpu") if key == "step" else weight.device
                optimizer.state[weight][key] = value.detach().to(device, copy=True)


def _structure(blocks: list[dict[str, Any]]) -> list[Block]:
    """Return what the shapes of the state depend on; when a weight refreshes is not part of it."""
    return [replace(Block.from_plain(block), refresh_offset=0) for block in blocks]


def _describe(blocks: list[dict[str, Any]]) -> str:
    if not blocks:
        return "full rank"
    parts = []
    for block in blocks:
        layout = block["layout"]
        sharing = f", {layout['heads']} heads share a basis" if block.get("cross_head") else ""
        residual = ", residual" if block.get("residual") else ""
        parts.append(f"{layout['rows']} x {layout['cols']} rank {layout['rank']} {layout['side']}{sharing}{residual}")
    return " + ".join(parts)
