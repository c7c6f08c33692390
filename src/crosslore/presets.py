"""Published methods, one row each. A method is a row of choices, not a class."""

from dataclasses import dataclass
from typing import Any

from crosslore.config import LowRankConfig
from crosslore.registry import unknown_name


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named configuration with the rule's own defaults."""

    config: LowRankConfig
    # Decay rates of the moments, added constant of the denominator, decoupled weight decay.
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    # Where the method comes from.
    paper: str


PRESETS: dict[str, Preset] = {
    # As the package galore-torch 1.0 does it; its README's scale for fine-tuning differs by task.
    "galore": Preset(
        config=LowRankConfig(
            projector="svd",
            scale=0.25,
            refresh_every=200,
            eps_placement="uncorrected",
            decay_order="after",
        ),
        eps=1e-6,
        paper="GaLore, arXiv 2403.03507",
    ),
    # Tables 3-4 of the paper: rank 128, alpha 32 in most rows, residual ratio 1.2 %, query and key.
    "crosslore": Preset(
        config=LowRankConfig(
            projector="randomized",
            cross_head_targets=("q_proj", "k_proj"),
            scale=32.0,
            residual="sparse",
            residual_ratio=0.012,
            residual_rule="guarded",
            residual_select="moment",
            residual_targets=("q_proj", "k_proj"),
            warmup_steps=100,
        ),
        paper="CrossLore, arXiv 2412.19820",
    ),
}


def get_preset(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        ValueError: if there is none; lists the near and the known names.
    """
    if name not in PRESETS:
        raise ValueError(unknown_name("preset", name, PRESETS))
    return PRESETS[name]


def rule_options(preset: Preset) -> dict[str, Any]:  # Any: floats and a pair of floats
    """Return the preset's defaults for the options that belong to the update rule."""
    return {"betas": preset.betas, "eps": preset.eps, "weight_decay": preset.weight_decay}
