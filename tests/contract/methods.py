"""Every preset with every rule it goes with, on a tiny model: what the contract tests run over."""

import pytest
import torch
from tests.unit.models import TinyDecoder, tiny_decoder

from crosslore import PRESETS, LowRankOptimizer, create_optimizer
from crosslore.registry import REGISTRY

RULES = sorted(REGISTRY["rule"])
# Short intervals, so that twelve steps see refreshes, a window and the end of the warm-up.
SHORT = {"refresh_every": 4}
METHODS = [(preset, rule) for preset in sorted(PRESETS) for rule in RULES if preset != "flora" or rule == "adafactor"]
PLAIN = [(preset, PRESETS[preset].config.rule) for preset in sorted(PRESETS)]


def options_of(preset: str, rule: str, **more: object) -> dict[str, object]:
    """Options under which a preset and a rule train the tiny model in a few steps."""
    if rule.endswith("8bit"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra bnb)")
    config = PRESETS[preset].config
    options: dict[str, object] = {"lr": 1e-3, "rank": min(4, config.rank), "rule": rule, **SHORT}
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
    return model, create_optimizer(model, preset, **options_of(preset, rule, **more))
