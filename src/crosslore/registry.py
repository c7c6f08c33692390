"""Names of the exchangeable parts, and where each one lives.

A part is loaded on first use, so a part that needs an extra package costs nothing until it is named.
To add one: write its file, add its line here.
"""

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from crosslore.config import LowRankConfig
    from crosslore.moments.base import MomentPolicy
    from crosslore.projectors.base import Projector
    from crosslore.residuals.base import Residual
    from crosslore.rules.base import Rule

Kind = Literal["projector", "moments", "residual", "rule"]

REGISTRY: dict[Kind, dict[str, str]] = {
    "projector": {
        "svd": "crosslore.projectors.svd:SVD",
        "randomized": "crosslore.projectors.randomized:Randomized",
        "power": "crosslore.projectors.power:Power",
        "cross_head": "crosslore.projectors.cross_head:CrossHead",
        "random": "crosslore.projectors.gaussian:RandomOrthonormal",
        "gaussian": "crosslore.projectors.gaussian:Gaussian",
    },
    "moments": {
        "keep": "crosslore.moments.keep:Keep",
        "reset": "crosslore.moments.reset:Reset",
        "rotate": "crosslore.moments.rotate:Rotate",
        "rotate_first": "crosslore.moments.rotate:RotateFirst",
    },
    "residual": {
        "sparse": "crosslore.residuals.sparse:SparseResidual",
        "norm_scaled": "crosslore.residuals.norm_scaled:NormScaled",
        "scaled_gradient": "crosslore.residuals.norm_scaled:ScaledGradient",
        "error_feedback": "crosslore.residuals.error_feedback:ErrorFeedback",
        "flora": "crosslore.residuals.flora:Flora",
    },
    "rule": {
        "adamw": "crosslore.rules.adamw:AdamW",
        "adamw8bit": "crosslore.rules.adamw8bit:AdamW8bit",
        "paged_adamw8bit": "crosslore.rules.adamw8bit:PagedAdamW8bit",
        "adafactor": "crosslore.rules.adafactor:Adafactor",
        "adagrad": "crosslore.rules.adagrad:Adagrad",
        "sgd": "crosslore.rules.sgd:SGD",
    },
}


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """Return the message for a name that does not exist: what it is, the near names, all known names."""
    names = sorted(known)
    near = get_close_matches(str(name).lower(), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(names)}."


def load(kind: Kind, name: str) -> type:
    """Return the class registered under `name`.

    Raises:
        ValueError: if no such name is registered; lists the near and the known ones.
    """
    known = REGISTRY[kind]
    if name not in known:
        raise ValueError(unknown_name(kind, name, known))
    module, _, attribute = known[name].partition(":")
    found: type = getattr(importlib.import_module(module), attribute)
    return found


def build_projector(config: "LowRankConfig") -> "Projector":
    """Return the projector that `config.projector` names, with its options taken from `config`."""
    projector: Projector = load("projector", config.projector).from_config(config)  # type: ignore[attr-defined]
    return projector


def build_moments(config: "LowRankConfig") -> "MomentPolicy":
    """Return what happens to the moments at a refresh."""
    policy: MomentPolicy = load("moments", config.moments)()
    return policy


def build_residual(config: "LowRankConfig") -> "Residual | None":
    """Return the residual, or None when it is off (`residual=None`, or "sparse" with `residual_ratio=0`)."""
    if config.residual is None or (config.residual == "sparse" and config.residual_ratio == 0):
        return None
    residual: Residual = load("residual", config.residual).from_config(config)  # type: ignore[attr-defined]
    return residual


def build_rule(name: str, *, eps_placement: str) -> "Rule":
    """Return the update rule of that name."""
    rule: Rule = load("rule", name)(eps_placement=eps_placement)
    return rule
