"""The choices that make up a method, as one frozen value that checks itself."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from crosslore.registry import REGISTRY, Kind, unknown_name

ResidualRule = Literal["guarded", "paper", "exact"]
ResidualSelect = Literal["moment", "residual"]
Embeddings = Literal["full", "lowrank", "frozen"]

# Names that select every linear layer of the model except its heads.
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """One method of the family: which basis, when refitted, what of the rest, which update rule.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range or names something unknown.
    """

    # Number of basis vectors r; >= 1 and at most the smaller side of each target. Paper, tables 3-4: 16 to 256.
    rank: int = 128
    # Factor on the projected update and on the residual (the paper's alpha); > 0. Effective step: lr * scale.
    scale: float = 1.0
    # Steps between two fits of the basis; >= 1. GaLore's default; the CrossLore paper does not say.
    refresh_every: int = 200
    # How a basis is fitted: a name of the registry.
    projector: str = "randomized"
    # Extra sketch columns of `randomized` (p in Halko et al. 2011); >= 0. Their recommendation: 5 to 10.
    oversampling: int = 8
    # Power iterations of `randomized` (q in Halko et al. 2011); >= 0. Two reach 99.8 % of the best energy.
    power_iterations: int = 2
    # What happens to the old moments at a refresh: a name of the registry.
    moments: str = "keep"
    # What is done about the part of the gradient that was projected away: a name of the registry, or None.
    residual: str | None = None
    # Share of a weight's entries that the residual keeps; 0 to 1. Paper, tables 3-4: 0.012.
    residual_ratio: float = 0.0
    # Denominator of the residual update (docs: "Where we differ"). `paper` is Eq. 9 and 12 as printed.
    residual_rule: ResidualRule = "guarded"
    # Which positions are kept: largest |P M'| (paper) or largest accumulated residual energy.
    residual_select: ResidualSelect = "moment"
    # Steps before the residual starts (the paper's k, which it does not give); >= 0.
    warmup_steps: int = 100
    # Update rule on compact and on full tensors: a name of the registry.
    rule: str = "adamw"
    # Where eps enters: "corrected" m_hat/(sqrt(v_hat)+eps) as torch and Algorithm 2; "uncorrected" as galore-torch.
    eps_placement: Literal["corrected", "uncorrected"] = "corrected"
    # Weight decay before the update as torch.optim.AdamW, or after it as galore-torch.
    decay_order: Literal["before", "after"] = "before"
    # "all-linear", or names of modules (suffix match on whole name parts).
    targets: str | tuple[str, ...] = ALL_LINEAR
    # Modules whose heads share one basis (Eq. 4); None: no sharing. Paper: query and key.
    cross_head_targets: tuple[str, ...] | None = None
    # Modules with a residual; None: every target. Paper: query and key.
    residual_targets: tuple[str, ...] | None = None
    # Input and output embeddings: trained at full rank (paper), in low rank, or frozen.
    embeddings: Embeddings = "full"
    # Seed of heads and sketches, which are drawn from (seed, weight name, refresh number) only.
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field; as early as possible, before any weight is touched."""
        _check_int("rank", self.rank, low=1, hint="Use 16, 32, 128 or 256 as the paper does.")
        _check_float("scale", self.scale, low=0.0, low_open=True, hint="It is the paper's alpha, e.g. 32.")
        _check_int("refresh_every", self.refresh_every, low=1, hint="200 is GaLore's default.")
        _check_int("oversampling", self.oversampling, low=0, hint="8 is the default.")
        _check_int("power_iterations", self.power_iterations, low=0, hint="2 is the default.")
        _check_float("residual_ratio", self.residual_ratio, low=0.0, high=1.0, hint="The paper uses 0.012; 0: off.")
        _check_int("warmup_steps", self.warmup_steps, low=0, hint="100 is the default.")
        _check_int("seed", self.seed, low=0, hint="Any non-negative integer.")
        _check_choice("residual_rule", self.residual_rule, ("guarded", "paper", "exact"))
        _check_choice("residual_select", self.residual_select, ("moment", "residual"))
        _check_choice("eps_placement", self.eps_placement, ("corrected", "uncorrected"))
        _check_choice("decay_order", self.decay_order, ("before", "after"))
        _check_choice("embeddings", self.embeddings, ("full", "lowrank", "frozen"))
        named: tuple[Kind, ...] = ("projector", "moments", "residual", "rule")
        for kind in named:
            value = getattr(self, kind)
            if value not in REGISTRY[kind] and not (kind == "residual" and value is None):
                raise ValueError(unknown_name(kind, value, REGISTRY[kind]))
        if self.projector == "cross_head":
            raise ValueError(
                "projector must name how a basis is fitted, got 'cross_head', which wraps another projector. "
                "Set `cross_head_targets`, e.g. ('q_proj', 'k_proj'), and `projector` to 'randomized' or 'svd'."
            )
        object.__setattr__(self, "targets", _names("targets", self.targets, whole=ALL_LINEAR))
        for name in ("cross_head_targets", "residual_targets"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _names(name, getattr(self, name)))

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> "LowRankConfig":  # Any: a param group is torch's own dict
        """Return the configuration that a parameter group carries as plain values; absent ones get the default."""
        return cls(**{f.name: group[f.name] for f in fields(cls) if f.name in group})


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """The numbers of one step of one group; schedulers may change them between steps."""

    # Learning rate, per step.
    lr: float
    # Factor on the low-rank update; 1 for weights at full rank.
    scale: float
    # Decoupled weight decay; the weight shrinks by lr * weight_decay.
    weight_decay: float
    # Decay rates of the first and second moment.
    betas: tuple[float, float]
    # Added to the denominator of the update.
    eps: float
    # Whether the decay comes before or after the update.
    decay_order: Literal["before", "after"] = "before"
    # Part of the seed of every draw, with the weight's name and the refresh number.
    seed: int = field(default=0)

    @property
    def weight_factor(self) -> float:
        """Return the factor on the old weight, 1 - lr * weight_decay."""
        return 1.0 - self.lr * self.weight_decay

    @property
    def update_factor(self) -> float:
        """Return the factor on the update, -lr * scale; decayed too when the decay comes after it."""
        factor = -self.lr * self.scale
        return factor * self.weight_factor if self.decay_order == "after" else factor


def check_hyper(*, lr: object, betas: object, eps: object, weight_decay: object) -> None:
    """Check the hyper-parameters that torch.optim users know; raises TypeError or ValueError."""
    _check_float("lr", lr, low=0.0, hint="The paper uses 1e-6.")
    _check_float("eps", eps, low=0.0, hint="1e-8 is torch's default.")
    _check_float("weight_decay", weight_decay, low=0.0, hint="0 switches it off.")
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers, got {betas!r}. Use (0.9, 0.999).")
    for i, beta in enumerate(betas):
        _check_float(f"betas[{i}]", beta, low=0.0, high=1.0, high_open=True, hint="Use (0.9, 0.999).")


def _check_int(name: str, value: object, *, low: int, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer >= {low}, got {value!r} ({type(value).__name__}). {hint}")
    if value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value}. {hint}")


def _check_float(
    name: str,
    value: object,
    *,
    low: float,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
    hint: str,
) -> None:
    allowed = f"{'>' if low_open else '>='} {low:g}"
    if high < math.inf:
        allowed += f" and {'<' if high_open else '<='} {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number {allowed}, got {value!r} ({type(value).__name__}). {hint}")
    too_low = value < low or (low_open and value == low)
    too_high = value > high or (high_open and value == high)
    if not math.isfinite(value) or too_low or too_high:
        raise ValueError(f"{name} must be a number {allowed}, got {value!r}. {hint}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(unknown_name(name, value, choices))


def _names(name: str, value: object, *, whole: str | None = None) -> str | tuple[str, ...]:
    if isinstance(value, str) and value == whole:
        return value
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple | list) or not names or not all(isinstance(n, str) and n for n in names):
        also = f"{whole!r} or " if whole else ""
        raise TypeError(
            f"{name} must be {also}a list of module names, got {value!r}. Example: {name}=('q_proj', 'k_proj')."
        )
    return tuple(names)
