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
    # Where the method comes from, and what we do otherwise.
    paper: str
    differs: str = ""


# What galore-torch, and those who built on it, have in common: eps inside the uncorrected denominator, late decay.
_GALORE: dict[str, Any] = {"scale": 0.25, "refresh_every": 200, "eps_placement": "uncorrected", "decay_order": "after"}
# Tables 3-4 of the CrossLore paper: alpha 32 in most rows, residual ratio 1.2 %, query and key.
_CROSSLORE: dict[str, Any] = {
    "scale": 32.0,
    "cross_head_targets": ("q_proj", "k_proj"),
    "residual": "sparse",
    "residual_ratio": 0.012,
    "residual_targets": ("q_proj", "k_proj"),
    "warmup_steps": 100,
    "refresh_stagger": True,
}

PRESETS: dict[str, Preset] = {
    # As the package galore-torch 1.0 does it; its README's scale for fine-tuning differs by task.
    "galore": Preset(
        config=LowRankConfig(projector="svd", **_GALORE),
        eps=1e-6,
        paper="GaLore, arXiv 2403.03507",
    ),
    "crosslore": Preset(
        config=LowRankConfig(projector="randomized", residual_rule="guarded", residual_select="moment", **_CROSSLORE),
        paper="CrossLore, arXiv 2412.19820",
        differs="Eq. 12's radicand is guarded; refreshes are staggered; the paper gives neither warm-up nor interval.",
    ),
    # What the ablation supports (docs/choosing.md): no change to the paper's choices gained more than its standard
    # error over both tasks, and leaving the residual out lost nothing.
    "crosslore_plus": Preset(
        config=LowRankConfig(projector="randomized", **{**_CROSSLORE, "residual": None, "residual_ratio": 0.0}),
        paper="ours",
        differs="CrossLore without its residual, which costs time and memory and gained nothing in our ablation.",
    ),
    # LDAdam's code: https://github.com/IST-DASLab/LDAdam.
    "ldadam": Preset(
        config=LowRankConfig(
            projector="power",
            first_fit="svd",
            oversampling=0,
            fit_momentum=0.908,
            refresh_every=1,
            square_side="left",
            moments="rotate",
            residual="error_feedback",
        ),
        betas=(0.908, 0.99),
        paper="LDAdam, arXiv 2410.16103",
        differs="The error is state, saved and not clipped; in the package it lives in p.grad.",
    ),
    "fira": Preset(
        config=LowRankConfig(projector="svd", residual="norm_scaled", **_GALORE),
        eps=1e-6,
        paper="Fira, arXiv 2410.01623",
        differs="As the package: alpha multiplies the subtracted projection too.",
    ),
    "flora": Preset(
        config=LowRankConfig(
            projector="gaussian",
            moments="rotate_first",
            residual="flora",
            rule="adafactor",
            refresh_every=1000,
            refresh_phase=-1,
        ),
        paper="Flora, arXiv 2402.03293",
        differs="The momentum of every target is compressed; the package leaves narrow ones without momentum.",
    ),
    "apollo": Preset(
        config=LowRankConfig(projector="gaussian", residual="scaled_gradient", **{**_GALORE, "scale": 1.0}),
        eps=1e-6,
        paper="APOLLO, arXiv 2412.05270",
        differs="Draws depend on the weight's name, not on its place in the optimizer.",
    ),
    "apollo_mini": Preset(
        config=LowRankConfig(
            projector="gaussian",
            residual="scaled_gradient",
            norm_granularity="tensor",
            **{**_GALORE, "scale": 128.0, "rank": 1},
        ),
        eps=1e-6,
        paper="APOLLO, arXiv 2412.05270",
        differs="Draws depend on the weight's name, not on its place in the optimizer.",
    ),
    "golore": Preset(
        config=LowRankConfig(projector="svd", moments="rotate_first", random_after=0, **_GALORE),
        eps=1e-6,
        paper="GoLore, arXiv 2410.11289",
        differs="Random bases from the start (set random_after for a mixed run); the rotated moment is kept.",
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
