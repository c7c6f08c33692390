"""From LLaMA-Factory's arguments to the optimizer."""

import importlib.util
import logging
from typing import Any

from torch import nn

from crosslore.compact.attach import attach_compact
from crosslore.factory import create_optimizer
from crosslore.integrations.accelerate import report_true_norm
from crosslore.integrations.llamafactory.arguments import in_yaml_names
from crosslore.optimizer import LowRankOptimizer
from crosslore.presets import get_preset
from crosslore.registry import unknown_name
from crosslore.telemetry import Telemetry

logger = logging.getLogger(__name__)

# LLaMA-Factory's (transformers') `optim` -> update rule.
RULES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_8bit": "adamw8bit",
    "adamw_bnb_8bit": "adamw8bit",
    "paged_adamw_8bit": "paged_adamw8bit",
    "adafactor": "adafactor",
    "adagrad": "adagrad",
    "sgd": "sgd",
}
# transformers' default `optim`: with it a preset that has a rule of its own, such as flora, keeps it.
DEFAULT_OPTIMS = ("adamw_torch", "adamw_torch_fused")


# Defaults of `adam_beta1`, `adam_beta2`, `adam_epsilon`: the preset's own values apply then.
TRANSFORMERS_BETAS, TRANSFORMERS_EPSILON = (0.9, 0.999), 1e-8


def choose_rule(optim: object) -> str:
    """Return the update rule for an `optim` value; 8-bit falls back to fp32 moments without bitsandbytes.

    Raises:
        ValueError: if the value has no rule here.
    """
    name = str(getattr(optim, "value", optim))
    if name not in RULES:
        raise ValueError(
            f"{unknown_name('optim for finetuning_type crosslore:', name, RULES)} Set `optim` to one of them."
        )
    rule = RULES[name]
    if rule.endswith("8bit") and importlib.util.find_spec("bitsandbytes") is None:
        logger.warning(
            "optim %s needs bitsandbytes, which is not installed: Adam's moments stay in fp32. "
            'Run `pip install "crosslore[bnb]"` for 8-bit moments.',
            name,
        )
        return "adamw"
    return rule


def create_crosslore_optimizer(model: nn.Module, training_args: Any, finetuning_args: Any) -> LowRankOptimizer:
    """Return the optimizer that the configuration describes; the arguments are LLaMA-Factory's own."""
    options = finetuning_args.crosslore_overrides(training_seed=training_args.seed)
    if training_args.adam_epsilon != TRANSFORMERS_EPSILON:
        options["eps"] = training_args.adam_epsilon
    if (training_args.adam_beta1, training_args.adam_beta2) != TRANSFORMERS_BETAS:
        options["betas"] = (training_args.adam_beta1, training_args.adam_beta2)
    rule, own = choose_rule(training_args.optim), get_preset(finetuning_args.crosslore_preset).config.rule
    if str(getattr(training_args.optim, "value", training_args.optim)) in DEFAULT_OPTIMS:
        rule = own
    gradients = finetuning_args.crosslore_gradients
    if gradients == "layerwise":
        report_true_norm()
        options |= {
            "layerwise": True,
            "accumulation_steps": training_args.gradient_accumulation_steps,
            "max_grad_norm": training_args.max_grad_norm or None,
            "clip": finetuning_args.crosslore_clip if training_args.max_grad_norm else "weight",
        }
    try:
        optimizer = create_optimizer(
            model,
            finetuning_args.crosslore_preset,
            lr=training_args.learning_rate,
            weight_decay=training_args.weight_decay,
            rule=rule,
            **options,
        )
    except ValueError as error:
        raise ValueError(in_yaml_names(str(error).replace("`targets`", "`crosslore_target`"), options)) from None
    if gradients in ("auto", "compact", "compact-layerwise"):
        _let_be_compact(optimizer, model, training_args, finetuning_args)
    if finetuning_args.crosslore_telemetry:  # the callback that `run_exp` was given logs it
        Telemetry(optimizer, every=finetuning_args.crosslore_telemetry_every)
    return optimizer


def _let_be_compact(optimizer: LowRankOptimizer, model: nn.Module, training_args: Any, finetuning_args: Any) -> None:
    """Switch to compact gradients; where that is impossible raise if they were asked for, else say why not."""
    gradients = finetuning_args.crosslore_gradients
    asked = gradients.startswith("compact") or finetuning_args.crosslore_weights == "deferred"
    layerwise = gradients == "compact-layerwise"
    logger_of_factory = importlib.import_module("llamafactory.extras.logging").get_logger("llamafactory.crosslore")
    try:
        if training_args.fp16 and not asked:
            raise ValueError("fp16 training with loss scaling keeps them unless crosslore_gradients is 'compact'")
        compact = attach_compact(
            optimizer,
            model,
            accumulation_steps=training_args.gradient_accumulation_steps,
            max_grad_norm=training_args.max_grad_norm or None,
            weights=finetuning_args.crosslore_weights,
            layerwise=layerwise,
            clip=finetuning_args.crosslore_clip if layerwise and training_args.max_grad_norm else "weight",
        )
    except ValueError as error:
        if asked:
            raise ValueError(str(error).replace("gradients must", "crosslore_gradients must")) from None
        logger_of_factory.info_rank0(f"Whole gradients: {error}")
    else:
        report_true_norm()
        logger_of_factory.info_rank0(compact.summary)
