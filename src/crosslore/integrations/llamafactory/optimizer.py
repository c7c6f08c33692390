"""From LLaMA-Factory's arguments to the optimizer."""

import importlib.util
import logging
from typing import Any

from torch import nn

from crosslore.factory import create_optimizer
from crosslore.optimizer import LowRankOptimizer
from crosslore.registry import unknown_name

logger = logging.getLogger(__name__)

# LLaMA-Factory's (transformers') `optim` -> update rule.
RULES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_8bit": "adamw8bit",
    "adamw_bnb_8bit": "adamw8bit",
}


# Default of `adam_epsilon`.
TRANSFORMERS_EPSILON = 1e-8


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
    if rule == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
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
        options["eps"] = training_args.adam_epsilon  # else the preset's own
    try:
        return create_optimizer(
            model,
            finetuning_args.crosslore_preset,
            lr=training_args.learning_rate,
            betas=(training_args.adam_beta1, training_args.adam_beta2),
            weight_decay=training_args.weight_decay,
            rule=choose_rule(training_args.optim),
            **options,
        )
    except ValueError as error:  # its names are those of Python
        raise ValueError(str(error).replace("`targets`", "`crosslore_target`")) from None
