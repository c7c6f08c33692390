"""Which layers hand over compact gradients, and what cannot."""

import logging
from collections import Counter
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor, nn

from crosslore.checks import check_bool, check_choice, check_limits, refuse_several_processes
from crosslore.compact.gradients import CompactGradients
from crosslore.compact.layerwise import CompactLayerwise
from crosslore.compact.linear import reason_not_compact, refuse_other_compact
from crosslore.compact.rows import RowStepper, rows_weights
from crosslore.layerwise import NORM_KEY, Clip, Layerwise
from crosslore.targets import plain_name

if TYPE_CHECKING:
    from crosslore.optimizer import LowRankOptimizer

logger = logging.getLogger(__name__)

Weights = Literal["direct", "deferred"]
WEIGHTS: tuple[Weights, ...] = ("direct", "deferred")


def attach_compact(
    optimizer: "LowRankOptimizer",
    model: nn.Module,
    *,
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    weights: Weights = "direct",
    layerwise: bool = False,
    clip: Clip = "weight",
) -> CompactGradients:
    """Let the linear layers of `model` hand their compact gradients to `optimizer` from backward.

    The `.grad` of their weights stays None. Everything else (embeddings, norms, stacked experts, other modules) keeps
    its whole gradient; a line in the log says what is compact and what is not.

    Args:
        optimizer: of the model.
        model: whose `nn.Linear` layers are changed in place; `detach()` changes them back.
        accumulation_steps: backward passes per step. A step with fewer is as good; with more, a basis that is due is
            fitted to the first ones only.
        max_grad_norm: largest norm of all gradients together, compact ones as they are applied; None: no clipping.
            `torch.nn.utils.clip_grad_norm_` would see the whole gradients only.
        weights: "direct": a step changes the weights. "deferred": it changes a compact tensor beside each, which
            forward adds and which is merged at refreshes and before the weight is read (`optimizer.merge()`).
        layerwise: step each weight inside backward, those with a whole gradient too, so that one gradient is held at a
            time (with accumulation: the compact ones). `max_grad_norm` and `clip` then mean what they mean to
            `attach_layerwise`, of compact gradients.
        clip: "weight" or "stale-global", for layerwise only.

    Returns:
        The handle, which is also `optimizer.compact`; `detach()` ends it. Layerwise, `optimizer.layerwise` is the
        handle of the weights with whole gradients, and either's `detach()` ends both.

    Raises:
        TypeError, ValueError: an argument is out of range, the method needs the gradient itself on every step, several
            processes train together, or no layer can be compact.
    """
    if not hasattr(optimizer, "compact"):
        raise TypeError(
            f"attach_compact takes a LowRankOptimizer, got {type(optimizer).__name__}. Use create_optimizer."
        )
    check_choice("weights", weights, WEIGHTS)
    check_bool("layerwise", layerwise, hint="It is a switch.")
    check_limits(accumulation_steps, max_grad_norm, clip)
    refuse_clip_of_layerwise(clip, layerwise=layerwise)
    if optimizer.layerwise is not None or optimizer.compact is not None:
        mode = "layerwise" if optimizer.layerwise is not None else "compact"
        raise ValueError(f"the optimizer is {mode} already. Call `optimizer.{mode}.detach()` first.")
    for group in optimizer.param_groups:
        if any(group["blocks"]):
            refuse_whole_gradients(group["residual"])
    refuse_several_processes("gradients='compact'")
    layers, others = compact_layers(model, {id(weight): weight for weight in low_rank_weights(optimizer)})
    _refuse_none(layers, others)
    limits = Limits(accumulation_steps=accumulation_steps, max_grad_norm=max_grad_norm, clip=clip)
    optimizer.compact = _attached(optimizer, model, layers, limits, deferred=weights == "deferred", layerwise=layerwise)
    optimizer.items.drop_empty_states()
    optimizer.compact.summary = summary(layers, others, optimizer)
    logger.info(optimizer.compact.summary)
    return optimizer.compact


class Limits(NamedTuple):
    """What a step is made of, and what its norm is limited to."""

    accumulation_steps: int
    max_grad_norm: float | None
    clip: Clip


def _attached(
    optimizer: "LowRankOptimizer",
    model: nn.Module,
    layers: list[nn.Linear],
    limits: Limits,
    *,
    deferred: bool,
    layerwise: bool,
) -> CompactGradients:
    """Return the sinks of these layers and, layerwise, the hooks of all other weights beside them."""
    in_rows = rows_weights(optimizer, model) if layerwise and limits.accumulation_steps == 1 else {}
    refuse_other_compact([(optimizer.items.name_of(weight), weight) for weight in in_rows])
    compact = CompactGradients(
        optimizer,
        layers,
        accumulation_steps=limits.accumulation_steps,
        max_grad_norm=None if layerwise else limits.max_grad_norm,
        deferred=deferred,
    )
    if layerwise:
        optimizer.layerwise = Layerwise(
            optimizer, others=frozenset(map(id, [*(layer.weight for layer in layers), *in_rows])), **limits._asdict()
        )
        optimizer.param_groups[0].setdefault(NORM_KEY, 0.0)
        compact.layerwise = CompactLayerwise(compact, optimizer.layerwise)
        if in_rows:
            compact.layerwise.rows = RowStepper(optimizer, optimizer.layerwise, in_rows)
    return compact


def low_rank_weights(optimizer: "LowRankOptimizer") -> list[Tensor]:
    """Return the weights that the optimizer trains in low rank."""
    groups = optimizer.param_groups
    return [p for group in groups for p, blocks in zip(group["params"], group["blocks"], strict=True) if blocks]


def compact_layers(model: nn.Module, low_rank: dict[int, Tensor]) -> tuple[list[nn.Linear], dict[str, str]]:
    """Return the layers of the low-rank weights that can be compact, and why others cannot, by name.

    A weight that two modules share is compact only if all of them can be.
    """
    by_weight: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in low_rank and parameter.requires_grad:
                by_weight.setdefault(id(parameter), []).append((plain_name(name), module))
    layers: list[nn.Linear] = []
    others: dict[str, str] = {}
    for owners in by_weight.values():
        reasons = {name: reason for name, module in owners if (reason := reason_not_compact(module))}
        if reasons:
            others |= reasons
        else:
            layers += [module for _, module in owners if isinstance(module, nn.Linear)]
    return layers, others


def _refuse_none(layers: list[nn.Linear], others: dict[str, str]) -> None:
    if not layers:
        raise ValueError(
            f"gradients='compact' finds no layer that can be compact: {_counted(others)}. Use 'full' or 'layerwise'."
        )


def refuse_whole_gradients(residual: str | None) -> None:
    """Raise a ValueError for a residual that needs the gradient itself on every step."""
    if residual not in (None, "sparse"):
        raise ValueError(
            f"gradients must be 'full' or 'layerwise' for residual={residual!r}, got 'compact': it needs the whole "
            "gradient on every step, which compact gradients do not form. Choose one of these, or a preset without it "
            "(crosslore, crosslore_plus, galore, golore)."
        )


def refuse_clip_of_layerwise(clip: str, *, layerwise: bool) -> None:
    """Raise a ValueError for a way of clipping that gradients='compact' has no use for."""
    if clip != "weight" and not layerwise:
        raise ValueError(
            f"clip is for layerwise, got clip={clip!r} with gradients='compact', which clips the global norm of the "
            "step itself. Leave it out, or use gradients='compact-layerwise'."
        )


def summary(layers: list[nn.Linear], others: dict[str, str], optimizer: "LowRankOptimizer") -> str:
    """Return one line that says what is compact and what is not."""
    compact = {id(layer.weight): layer.weight.numel() for layer in layers}
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    share = sum(compact.values()) / max(1, sum(p.numel() for p in trained))
    line = f"Compact gradients: {len(compact)} of {len(trained)} weights, {share:.0%} of all entries; the others whole"
    return f"{line}. Not compact: {_counted(others)}." if others else f"{line}."


def _counted(others: dict[str, str]) -> str:
    counts = Counter(others.values())
    return "; ".join(f"{count} x {reason}" for reason, count in counts.items()) or "the model has no nn.Linear"
