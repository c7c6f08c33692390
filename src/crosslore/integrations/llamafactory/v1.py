"""LLaMA-Factory v1 (`USE_V1=1`): the optimizer plugin `crosslore`.

    optim_config: {name: crosslore, lr: 1.0e-6, preset: crosslore, rank: 128, alpha: 32, accumulation_steps: 1}

v1 passes neither learning rate nor accumulation to a plugin, so both stand there; other keys are those of
`create_optimizer`, or `alpha` and `warmup_k` as in a configuration of the other version.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from crosslore.factory import PAPER_NAMES, create_optimizer
from crosslore.optimizer import LowRankOptimizer

NAME = "crosslore"


def build(model: nn.Module, config: Mapping[str, Any]) -> LowRankOptimizer:  # Any: what YAML holds
    """Return the optimizer of `optim_config`.

    Raises:
        ValueError: without a learning rate, or with two names of one option.
        TypeError, ValueError: an option is unknown or out of range; see `create_optimizer`.
    """
    for theirs, ours in PAPER_NAMES.items():
        if theirs in config and ours in config:
            raise ValueError(
                f"optim_config of crosslore has two names of one option, `{theirs}` ({config[theirs]}) and `{ours}` "
                f"({config[ours]}). Remove one of them."
            )
    options = {PAPER_NAMES.get(key, key): _number(value) for key, value in config.items() if key != "name"}
    if "lr" not in options:
        raise ValueError(
            "optim_config of crosslore has no `lr`: LLaMA-Factory v1 does not pass its learning_rate to an optimizer. "
            "Write optim_config: {name: crosslore, lr: 1.0e-6, ...}."
        )
    if "model" in options:
        raise TypeError("optim_config of crosslore has no option `model`: it trains the one of the run. Remove it.")
    return create_optimizer(model, options.pop("preset", "crosslore"), **options)


def _number(value: Any) -> Any:  # Any: what YAML holds
    """Return a text that is a number as one: YAML reads 1e-6 as a text."""
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def register(module: Any) -> None:
    """Register the plugin with LLaMA-Factory's registry, once."""
    plugin = module.OptimizerPlugin(NAME)
    plugin.register()(build)
