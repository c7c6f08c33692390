"""From a model and a preset to an optimizer: names -> layouts -> groups."""

import logging
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crosslore.checks import check_bool, check_choice
from crosslore.compact.attach import (
    WEIGHTS,
    Weights,
    attach_compact,
    refuse_clip_of_layerwise,
    refuse_whole_gradients,
)
from crosslore.compact.linear import refuse_other_compact
from crosslore.config import LowRankConfig
from crosslore.hooks import refuse_other_layerwise
from crosslore.layerwise import Clip, attach_layerwise
from crosslore.layout import Block
from crosslore.optimizer import LowRankOptimizer
from crosslore.planning import plan_blocks
from crosslore.presets import get_preset, rule_options
from crosslore.registry import unknown_name
from crosslore.targets import embedding_weights, plain_name

logger = logging.getLogger(__name__)

# Names of the paper and of the YAML files, where ours differ.
PAPER_NAMES = {"alpha": "scale", "warmup_k": "warmup_steps"}
# Names of peft, galore-torch and transformers.
PEER_NAMES = {
    "r": "rank",
    "update_proj_gap": "refresh_every",
    "proj_type": "projector",
    "optim": "rule",
    "learning_rate": "lr",
}
Gradients = Literal["full", "layerwise", "compact", "compact-layerwise"]
MODES: tuple[Gradients, ...] = ("full", "layerwise", "compact", "compact-layerwise")
# Options of `create_optimizer` itself.
OWN_NAMES = {
    "lr",
    "gradients",
    "layerwise",
    "accumulation_steps",
    "max_grad_norm",
    "clip",
    "weights",
    "foreach",
    "compile",
}


def create_optimizer(
    model: nn.Module,
    preset: str = "crosslore",
    *,
    lr: float,
    gradients: Gradients | None = None,
    layerwise: bool = False,
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    clip: Clip = "weight",
    weights: Weights = "direct",
    foreach: bool | None = None,
    compile: bool = False,
    **overrides: Any,  # Any: fields of LowRankConfig and rule options, each checked by its own type
) -> LowRankOptimizer:
    """Return an optimizer for every trainable weight of `model`.

    Linear layers that `targets` selects keep their moments in low rank. Everything else (embeddings, norms,
    biases, heads) gets the same rule at full rank; norms and biases without weight decay.

    Args:
        model: any module. Attention heads are read from `model.config` when it has one.
        preset: a name of `PRESETS`.
        lr: learning rate per step; the paper uses 1e-6 with scale 16 to 128.
        gradients: "full" (None): as any optimizer. "layerwise": step each weight inside backward and free its gradient.
            "compact": layers hand over P^T G, G is not formed. "compact-layerwise": both. See `attach_layerwise` and
            `attach_compact`.
        layerwise: gradients="layerwise".
        accumulation_steps: backward passes per step. Not for full gradients.
        max_grad_norm: largest gradient norm, None: no clipping. For full gradients clip before `step()` instead.
        clip: what that norm is of: "weight" or "stale-global". For layerwise, compact or not.
        weights: "direct" or "deferred", for compact gradients only; see `attach_compact`.
        foreach: see `LowRankOptimizer`.
        compile: see `LowRankOptimizer`.
        **overrides: fields of `LowRankConfig`, or `betas`, `eps`, `weight_decay`.

    Raises:
        TypeError: an unknown option (near names are listed), a wrong type, or `model` is no module.
        ValueError: a value out of range, a rank or name that fits no layer, a quantised or sharded model. The model is
            unchanged then.
    """
    _check_switches(layerwise=layerwise, compile=compile, foreach=False if foreach is None else foreach)
    mode = _gradients(gradients, layerwise, weights)
    _check_mode(mode, accumulation_steps, max_grad_norm, clip, compile, foreach)
    chosen, model = get_preset(preset), _supported(model)
    options = rule_options(chosen)
    config = _override(chosen.config, options, overrides)
    refuse_whole_gradients(config.residual if mode.startswith("compact") else None)
    low_rank = plan_blocks(model, config, explicit=frozenset(overrides))
    frozen = _to_freeze(model, config)
    trained = [(plain_name(n), p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in frozen]
    groups = _groups(trained, low_rank, weight_decay=options["weight_decay"])
    optimizer = LowRankOptimizer(groups, lr=lr, **options, config=config, foreach=foreach, compile=compile)
    limits = {"accumulation_steps": accumulation_steps, "max_grad_norm": max_grad_norm, "clip": clip}
    _attach(optimizer, model, mode, weights=weights, limits=limits)
    _freeze(frozen)
    _log_summary(preset, config, low_rank, total=len(trained))
    return optimizer


def _attach(optimizer: LowRankOptimizer, model: nn.Module, mode: str, *, weights: Weights, limits: Any) -> None:
    # Any: arguments that both take
    if mode.startswith("compact"):
        attach_compact(optimizer, model, weights=weights, layerwise=mode.endswith("layerwise"), **limits)
    elif mode == "layerwise":
        attach_layerwise(optimizer, **limits)


def _to_freeze(model: nn.Module, config: LowRankConfig) -> dict[int, Tensor]:
    return {id(w): w for w in embedding_weights(model).values()} if config.embeddings == "frozen" else {}


def _freeze(weights: dict[int, Tensor]) -> None:
    for weight in weights.values():
        weight.requires_grad_(False)


def _supported(model: nn.Module) -> nn.Module:
    """Return the model itself; raise for what is none, cannot be trained, or steps inside backward already."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"create_optimizer takes the model itself, got {type(model).__name__}. Pass `model`.")
    refuse_other_layerwise(list(model.named_parameters()))
    refuse_other_compact(list(model.named_parameters()))
    model = unwrapped(model)
    _refuse_unsupported(model)
    return model


def _check_switches(**switches: object) -> None:
    for name, value in switches.items():
        check_bool(name, value, hint="It is a switch.")


def _gradients(gradients: str | None, layerwise: bool, weights: str) -> str:
    """Return the mode that these options name together."""
    if gradients is not None:
        check_choice("gradients", gradients, MODES)
    if layerwise and gradients not in (None, "layerwise"):
        both = " 'compact-layerwise' is both." if gradients == "compact" else ""
        raise ValueError(
            f"layerwise=True is gradients='layerwise', got gradients={gradients!r} too. Leave one out.{both}"
        )
    mode = gradients or ("layerwise" if layerwise else "full")
    check_choice("weights", weights, WEIGHTS)
    if weights == "deferred" and not mode.startswith("compact"):
        raise ValueError(f"weights='deferred' is for gradients='compact', got gradients={mode!r}. Leave one out.")
    return mode


def _check_mode(
    mode: str,
    accumulation_steps: int,
    max_grad_norm: float | None,
    clip: str,
    compile: bool,
    foreach: bool | None,
) -> None:
    """Raise a ValueError for options that do not go with the way in which gradients come."""
    check_choice("clip", clip, ("weight", "stale-global"))
    if mode == "full" and (accumulation_steps != 1 or max_grad_norm is not None):
        raise ValueError(
            "accumulation_steps and max_grad_norm are for layerwise=True and gradients='compact', got neither. Call "
            "backward several times and torch.nn.utils.clip_grad_norm_ before step(), or set one of them."
        )
    if mode == "compact":
        refuse_clip_of_layerwise(clip, layerwise=False)
    if mode.startswith("compact") and compile:
        raise ValueError(
            f"compile must be False for gradients={mode!r}: the compiled step takes whole gradients. Leave one out."
        )
    for name, value in (("compile", compile), ("foreach", foreach)):
        if mode.endswith("layerwise") and value:
            raise ValueError(f"{name} must not be True for layerwise=True: weights step one by one. Leave one out.")
    if clip != "weight" and max_grad_norm is None:
        raise ValueError(f"clip={clip!r} needs a max_grad_norm, got None. Give one, e.g. 1.0, with layerwise=True.")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers, which hide its config, its output layer and the quantisation."""
    while isinstance(model, DistributedDataParallel | nn.DataParallel) or hasattr(model, "_orig_mod"):
        inner = model._orig_mod if hasattr(model, "_orig_mod") else model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def _override(config: LowRankConfig, options: dict[str, Any], overrides: dict[str, Any]) -> LowRankConfig:
    """Return `config` with the overrides that are its fields; the others go into `options` (changed in place)."""
    known = {f.name for f in fields(LowRankConfig)}
    for name in overrides:
        if name not in known and name not in options:
            hint = f" The paper's {name} is `{PAPER_NAMES[name]}` here." if name in PAPER_NAMES else ""
            hint += f" It is `{PEER_NAMES[name]}` here." if name in PEER_NAMES else ""
            raise TypeError(unknown_name("option", name, known | set(options) | OWN_NAMES) + hint)
    if overrides.get("residual_ratio") and config.residual is None:
        config = replace(config, residual="sparse")  # the ratio asks for it; `residual=None` still switches it off
    if overrides.get("residual") == "sparse" and not overrides.get("residual_ratio", config.residual_ratio):
        raise ValueError(
            "residual='sparse' keeps a share of the positions, got residual_ratio=0. Give one, e.g. the paper's 0.012."
        )
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
