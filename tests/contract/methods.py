"""Every preset with every rule it goes with, on a tiny model: what the contract tests run over."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.unit.models import TinyDecoder, tiny_decoder

from crosslore import PRESETS, LowRankConfig, LowRankOptimizer, create_optimizer
from crosslore.registry import REGISTRY

RULES = sorted(REGISTRY["rule"])
# Short intervals, so that twelve steps see refreshes, a window and the end of the warm-up.
SHORT = {"refresh_every": 4}
# Parts that no preset has, together: a preset and what is changed of it.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "all_parts": (
        "crosslore",
        {
            "projector": "power",
            "fit_window": 4,
            "head_choice": "energy",
            "moments": "rotate",
            "residual_rule": "exact",
            "residual_select": "residual",
        },
    ),
}
NAMES = [*sorted(PRESETS), *VARIANTS]


def config_of(name: str) -> LowRankConfig:
    """The choices of a preset or variant."""
    preset, changes = VARIANTS.get(name, (name, {}))
    return replace(PRESETS[preset].config, **changes)


METHODS = [(name, rule) for name in NAMES for rule in RULES if name != "flora" or rule == "adafactor"]
PLAIN = [(name, config_of(name).rule) for name in NAMES]


def options_of(preset: str, rule: str, **more: object) -> dict[str, object]:
    """Options under which a preset and a rule train the tiny model in a few steps."""
    if rule.endswith("8bit"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra bnb)")
    config = config_of(preset)
    changes = VARIANTS.get(preset, (preset, {}))[1]
    options: dict[str, object] = {"lr": 1e-3, "rank": min(4, config.rank), "rule": rule, **SHORT, **changes}
    if preset == "ldadam":
        options["refresh_every"] = 1
    if config.residual == "sparse":
        options |= {"warmup_steps": 3, "residual_ratio": 0.3, "scale": 2.0}
    return options | more


def build(
    preset: str, rule: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, width: int = 32, **more: object
) -> tuple[TinyDecoder, LowRankOptimizer]:
    """A tiny model and the optimizer of that method for it."""
    model = tiny_decoder(seed=seed, width=width).to(dtype)
    return model, optimizer_for(model, preset, rule, **more)


def optimizer_for(model: TinyDecoder, preset: str, rule: str, **more: object) -> LowRankOptimizer:
    """The optimizer of that method for a model."""
    return create_optimizer(model, VARIANTS.get(preset, (preset,))[0], **options_of(preset, rule, **more))
