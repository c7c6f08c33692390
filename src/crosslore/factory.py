"""From a model and a preset to an optimizer: names -> layouts -> groups."""

import logging
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from crosslore.config import LowRankConfig
from crosslore.heads import AttentionShape, attention_shape
from crosslore.layout import Block, MatrixLayout, shorter_side
from crosslore.optimizer import LowRankOptimizer
from crosslore.presets import get_preset, rule_options
from crosslore.registry import unknown_name
from crosslore.targets import embedding_weights, linear_modules, matches, plain_name, require_match, select_targets

logger = logging.getLogger(__name__)

# Names of the paper and of the YAML files, where ours differ.
PAPER_NAMES = {"alpha": "scale", "warmup_k": "warmup_steps"}


def create_optimizer(
    model: nn.Module,
    preset: str = "crosslore",
    *,
    lr: float,
    **overrides: Any,  # Any: fields of LowRankConfig and rule options, each checked by its own type
) -> LowRankOptimizer:
    """Return an optimizer for every trainable weight of `model`.

    Linear layers that `targets` selects keep their moments in low rank. Everything else (embeddings, norms,
    biases, heads) gets the same rule at full rank; norms and biases without weight decay.

    Args:
        model: any module. Attention heads are read from `model.config` when it has one.
        preset: a name of `PRESETS`.
        lr: learning rate per step; the paper uses 1e-6 with scale 16 to 128.
        **overrides: fields of `LowRankConfig`, or `betas`, `eps`, `weight_decay`.

    Raises:
        TypeError: an unknown option (the near names are listed), or a wrong type, or `model` is no module.
        ValueError: a value out of range, a rank that does not fit a layer, a name that matches no layer, a
            quantised or sharded model. The model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"create_optimizer takes the model itself, got {type(model).__name__}. Pass `model`.")
    chosen = get_preset(preset)
    while isinstance(model, DistributedDataParallel | nn.DataParallel):
        model = model.module  # the wrapper hides the config, the output layer and the quantisation
    options = rule_options(chosen)
    config = _override(chosen.config, options, overrides)
    _refuse_unsupported(model)
    low_rank = _plan_blocks(model, config, explicit=frozenset(overrides))
    ends = {id(weight) for weight in embedding_weights(model).values()}
    frozen = ends if config.embeddings == "frozen" else set()
    weights = [(plain_name(n), p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in frozen]
    groups = _groups(weights, low_rank, weight_decay=options["weight_decay"])
    optimizer = LowRankOptimizer(groups, lr=lr, **options, config=config)
    for weight in embedding_weights(model).values():
        weight.requires_grad_(weight.requires_grad and id(weight) not in frozen)
    _log_summary(preset, config, low_rank, total=len(weights))
    return optimizer


def _override(config: LowRankConfig, options: dict[str, Any], overrides: dict[str, Any]) -> LowRankConfig:
    """Return `config` with the overrides that are its fields; the others go into `options` (changed in place)."""
    known = {f.name for f in fields(LowRankConfig)}
    for name in overrides:
        if name not in known and name not in options:
            hint = f" The paper's {name} is `{PAPER_NAMES[name]}` here." if name in PAPER_NAMES else ""
            raise TypeError(unknown_name("option", name, known | set(options) | {"lr"}) + hint)
    if overrides.get("residual_ratio") and config.residual is None:
        config = replace(config, residual="sparse")  # the ratio asks for it; `residual=None` still switches it off
    options.update({name: value for name, value in overrides.items() if name in options})
    return replace(config, **{name: value for name, value in overrides.items() if name in known})


def _refuse_unsupported(model: nn.Module) -> None:
    """Raise a ValueError for weights that cannot be trained as matrices: quantised or sharded ones."""
    if getattr(model, "quantization_method", None) is not None:
        raise ValueError(
            f"the base model is quantised ({model.quantization_method}), and all its weights are to be trained. "
            "Load it in bf16 or fp32 (no quantization_bit), or use LoRA."
        )
    for name, weight in model.named_parameters():
        kinds = {cls.__name__ for cls in type(weight).__mro__}
        if kinds & {"DTensor", "FlatParameter"} or hasattr(weight, "ds_id"):
            raise ValueError(
                f"{name} is sharded ({type(weight).__name__}), which is not supported yet. "
                "Use DDP or one device, without FSDP and DeepSpeed ZeRO."
            )
        if weight.requires_grad and weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} has dtype {weight.dtype}; float64, float32, bfloat16 and float16 can be trained. "
                "Load the model unquantised or freeze this weight."
            )


def _plan_blocks(model: nn.Module, config: LowRankConfig, *, explicit: frozenset[str]) -> dict[int, list[Block]]:
    """Return the blocks of every low-rank weight, by id of the weight."""
    shape = attention_shape(model)
    plans = {
        id(module.weight): plan_linear(name, module, config, shape)
        for name, module in select_targets(model, config.targets).items()
    }
    if config.embeddings == "lowrank":
        for name, weight in embedding_weights(model).items():
            if weight.requires_grad:
                rows, cols = weight.shape
                plans[id(weight)] = [Block(layout=_layout(name, rows, cols, config))]
    _check_names(model, config, shape, plans, explicit)
    return plans


def plan_linear(name: str, module: nn.Linear, config: LowRankConfig, shape: AttentionShape | None) -> list[Block]:
    """Return one block for a linear layer, or one for each of query, key and value if it is a fused one.

    Args:
        name: dotted name of the module.
        module: the layer; its weight is (out, in).
        config: rank, and which names share a basis or have a residual.
        shape: the model's heads, if known.

    Raises:
        ValueError: if the rank does not fit; names the layer.
    """
    rows, cols = module.weight.shape
    spans = shape.fused_spans(name.rsplit(".", 1)[-1], rows) if shape else None
    if spans is None:
        heads = shape.heads_in(rows) if shape else None
        return [_block(name, rows, cols, heads, config)]
    parent = name.rpartition(".")[0]
    blocks = []
    for role, (span, heads) in spans.items():
        part = f"{parent}.{role}" if parent else role
        length = rows // span.stride * span.length
        blocks.append(replace(_block(part, length, cols, heads, config), key=f"{role}.", span=span))
    return blocks


def _block(name: str, rows: int, cols: int, heads: int | None, config: LowRankConfig) -> Block:
    shared = heads is not None and matches(name, config.cross_head_targets or ())
    residual = config.residual is not None and (
        config.residual_targets is None or matches(name, config.residual_targets)
    )
    layout = _layout(name, rows, cols, config, heads=heads if shared and heads else None)
    return Block(layout=layout, cross_head=shared, residual=residual)


def _layout(name: str, rows: int, cols: int, config: LowRankConfig, heads: int | None = None) -> MatrixLayout:
    """Return the layout; heads share the input side, else the basis is on the shorter side."""
    side = "right" if heads else shorter_side(rows, cols)
    try:
        return MatrixLayout(rows=rows, cols=cols, rank=config.rank, side=side, heads=heads or 1)
    except ValueError as error:
        raise ValueError(f"{name.removesuffix('.weight')}: {error}") from None


def _check_names(
    model: nn.Module,
    config: LowRankConfig,
    shape: AttentionShape | None,
    plans: dict[int, list[Block]],
    explicit: frozenset[str],
) -> None:
    """Check the names of cross-head and residual targets: an error if the user gave them, a note if a preset did."""
    linears = linear_modules(model)
    names = set(linears)
    for name, module in linears.items():
        if shape and shape.fused_spans(name.rsplit(".", 1)[-1], module.weight.shape[0]):
            names |= {".".join([*name.split(".")[:-1], role]) for role in ("q_proj", "k_proj", "v_proj")}
    for option in ("cross_head_targets", "residual_targets"):
        for pattern in getattr(config, option) or ():
            if option in explicit:
                require_match(pattern, names, option=option)
    wanted = [n for n in names if matches(n, config.cross_head_targets or ())]
    planned = {id(module.weight) for n, module in linears.items() if n in wanted} & set(plans)
    shared = any(block.cross_head for plan in plans.values() for block in plan)
    if config.cross_head_targets and not shared and (planned or not wanted):
        what = f"{config.cross_head_targets} of a {getattr(getattr(model, 'config', None), 'model_type', 'model')}"
        logger.warning(
            "The attention heads of %s could not be determined: training without cross-head sharing. "
            "Set `cross_head_targets` to the names of query and key layers if the model has them.",
            what,
        )
    if config.residual and config.residual_targets and not any(b.residual for plan in plans.values() for b in plan):
        logger.warning("No layer matches residual_targets %s: training without a residual.", config.residual_targets)


def _groups(
    weights: list[tuple[str, nn.Parameter]], low_rank: dict[int, list[Block]], *, weight_decay: float
) -> list[dict[str, Any]]:
    """Return up to three groups: low-rank, full rank with decay, and norms and biases without decay."""
    if not weights:
        raise ValueError("the model has no weight that requires a gradient. Unfreeze some before this call.")
    groups = []
    for is_low, decays in ((True, True), (False, True), (False, False)):
        members = [
            (name, p) for name, p in weights if (id(p) in low_rank) == is_low and (is_low or (p.dim() > 1) == decays)
        ]
        if members:
            blocks = [[block.to_plain() for block in low_rank.get(id(p), [])] for _, p in members]
            groups.append({"params": members, "blocks": blocks, "weight_decay": weight_decay if decays else 0.0})
    return groups


def _log_summary(preset: str, config: LowRankConfig, low_rank: dict[int, list[Block]], *, total: int) -> None:
    plans = low_rank.values()
    logger.info(
        "%s: %d of %d weights in low rank (rank %d, scale %g), %d share a basis across heads, %d have a residual.",
        preset,
        len(low_rank),
        total,
        config.rank,
        config.scale,
        sum(any(b.cross_head for b in plan) for plan in plans),
        sum(any(b.residual for b in plan) for plan in plans),
    )
