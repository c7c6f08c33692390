"""The choices that make up a method, as one frozen value that checks itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from crosslore.checks import check_bool, check_choice, check_float, check_int, check_names
from crosslore.registry import REGISTRY, Kind, unknown_name

# Fields with a few allowed values.
CHOICES: dict[str, tuple[str, ...]] = {
    "residual_rule": ("guarded", "paper", "exact"),
    "residual_select": ("moment", "residual"),
    "norm_granularity": ("channel", "tensor"),
    "head_choice": ("random", "energy"),
    "first_fit": ("randomized", "svd"),
    "square_side": ("right", "left"),
    "basis_dtype": ("weight", "float32"),
    "eps_placement": ("corrected", "uncorrected"),
    "decay_order": ("before", "after"),
    "embeddings": ("full", "lowrank", "frozen"),
}

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
    # Steps by which every refresh but the first is shifted; -1: at the end of an interval, as Flora.
    refresh_phase: int = 0
    # Spread the refreshes of different weights over the interval, so that no step has to fit them all.
    refresh_stagger: bool = False
    # How a basis is fitted: a name of the registry.
    projector: str = "randomized"
    # How `power` fits its first basis, when there is none to start from.
    first_fit: Literal["randomized", "svd"] = "randomized"
    # Extra columns of `randomized` and `power` (p in Halko et al. 2011); >= 0. Their recommendation: 5 to 10.
    oversampling: int = 8
    # Passes of `randomized` after its first one (q in Halko et al. 2011), all passes of `power`; >= 0.
    power_iterations: int = 1
    # Which heads a shared basis is fitted to: drawn at random (paper), or those whose gradient is largest.
    head_choice: Literal["random", "energy"] = "random"
    # Steps whose gradients a new basis is fitted to: 1: the refresh's own (papers); w > 1: the w before it.
    fit_window: int = 1
    # Share of the projected-back first moment in what a basis is fitted to (LDAdam's rho); 0 to 1.
    fit_momentum: float = 0.0
    # Last step with a fitted basis; random orthonormal ones from then on (GoLore). None: never.
    random_after: int | None = None
    # Side of the basis of a square matrix: "right" as GaLore, "left" as LDAdam.
    square_side: Literal["right", "left"] = "right"
    # Dtype in which bases are stored: the weight's, or fp32.
    basis_dtype: Literal["weight", "float32"] = "weight"
    # What happens to the old moments at a refresh: a name of the registry.
    moments: str = "keep"
    # What is done about the part of the gradient that was projected away: a name of the registry, or None.
    residual: str | None = None
    # Share of a weight's entries that the residual keeps; 0 to 1. Paper, tables 3-4: 0.012.
    residual_ratio: float = 0.0
    # Denominator of the residual update (docs: "Where we differ"). `paper` is Eq. 9 and 12 as printed.
    residual_rule: Literal["guarded", "paper", "exact"] = "guarded"
    # Which positions are kept: largest |P M'| (paper) or largest accumulated residual energy.
    residual_select: Literal["moment", "residual"] = "moment"
    # Steps before the residual starts (the paper's k, which it does not give); >= 0.
    warmup_steps: int = 100
    # Size of what `norm_scaled` and `scaled_gradient` scale by one factor: a row or column, or the whole matrix.
    norm_granularity: Literal["channel", "tensor"] = "channel"
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
    embeddings: Literal["full", "lowrank", "frozen"] = "full"
    # Round bf16 weights up or down at random, in proportion, instead of to the nearest; needs an fp32 scratch.
    stochastic_rounding: bool = False
    # Seed of heads, sketches and rounding, which are drawn from (seed, weight name, refresh number) only.
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field; as early as possible, before any weight is touched."""
        check_int("rank", self.rank, low=1, hint="The paper uses 16 to 256, 128 for most 7B models.")
        check_float("scale", self.scale, low=0.0, low_open=True, hint="It is the paper's alpha, e.g. 32.")
        check_int("refresh_every", self.refresh_every, low=1, hint="200 is GaLore's default.")
        check_int("oversampling", self.oversampling, low=0, hint="8 is the default.")
        check_int("power_iterations", self.power_iterations, low=0, hint="1 is the default.")
        check_float("residual_ratio", self.residual_ratio, low=0.0, high=1.0, hint="The paper uses 0.012; 0: off.")
        check_int("warmup_steps", self.warmup_steps, low=0, hint="100 is the default.")
        check_int("fit_window", self.fit_window, low=1, hint="1 is the papers' choice, 4 sums four steps.")
        check_int("refresh_phase", self.refresh_phase, low=-1, hint="0 is the default.")
        check_float("fit_momentum", self.fit_momentum, low=0.0, high=1.0, hint="LDAdam uses 0.908; 0: off.")
        if self.random_after is not None:
            check_int("random_after", self.random_after, low=0, hint="GoLore: 0.8 of all steps; None: never.")
        check_int("seed", self.seed, low=0, hint="Any non-negative integer.")
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        check_bool("refresh_stagger", self.refresh_stagger, hint="True spreads the refreshes.")
        check_bool("stochastic_rounding", self.stochastic_rounding, hint="It concerns bf16 weights only.")
        named: tuple[Kind, ...] = ("projector", "moments", "residual", "rule")
        for kind in named:
            value = getattr(self, kind)
            if value not in REGISTRY[kind] and not (kind == "residual" and value is None):
                known = set(REGISTRY[kind]) - {"cross_head"}  # which wraps the others, see below
                hint = " None switches it off." if kind == "residual" else ""
                raise ValueError(unknown_name(kind, value, known) + hint)
        if self.projector == "cross_head":
            raise ValueError(
                "projector must name how a basis is fitted, got 'cross_head', which wraps another projector. "
                "Set `cross_head_targets`, e.g. ('q_proj', 'k_proj'), and `projector` to 'randomized' or 'svd'."
            )
        self._check_combinations()
        object.__setattr__(self, "targets", check_names("targets", self.targets, whole=ALL_LINEAR))
        for name in ("cross_head_targets", "residual_targets"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_names(name, getattr(self, name)))

    @property
    def first_projector(self) -> str:
        """Return the projector of the first basis."""
        return "random" if self.random_after == 0 else self.projector

    def _check_combinations(self) -> None:
        """Refuse parts that do not work together; each message names both and what to change."""
        if self.fit_window > 1 and self.projector not in ("randomized", "power"):
            raise ValueError(
                f"fit_window must be 1 for projector {self.projector!r}, got {self.fit_window}: only a sketch can be "
                "summed over steps. Use projector='power' or 'randomized'."
            )
        if self.fit_window > self.refresh_every:
            raise ValueError(
                f"fit_window must be at most refresh_every ({self.refresh_every}), got {self.fit_window}. Lower it."
            )
        if self.projector == "power" and self.power_iterations == 0:
            raise ValueError(
                "power_iterations must be at least 1 for projector 'power', got 0: the basis would never change. "
                "Use 1, as LDAdam does."
            )
        if self.projector in ("gaussian", "random") and self.cross_head_targets:
            raise ValueError(
                f"cross_head_targets must be None for projector {self.projector!r}, got {self.cross_head_targets!r}: "
                "such a basis looks at no head. Set it to None."
            )
        if self.projector == "gaussian" and self.moments == "rotate":
            raise ValueError(
                "moments='rotate' needs an orthonormal basis, got projector='gaussian'. "
                "Use moments='rotate_first', 'keep' or 'reset', or projector='random'."
            )
        if self.projector == "gaussian" and self.residual in ("sparse", "norm_scaled", "error_feedback"):
            raise ValueError(
                f"residual={self.residual!r} needs an orthonormal basis, got projector='gaussian', whose columns are "
                "not. Use projector='random', or residual='scaled_gradient'."
            )
        if self.residual == "flora" and (self.projector != "gaussian" or self.rule != "adafactor"):
            raise ValueError(
                f"residual='flora' goes with projector='gaussian' and rule='adafactor', got {self.projector!r} and "
                f"{self.rule!r}. Take the preset 'flora' as it is, or another one for another rule."
            )
        if self.residual_ratio > 0 and self.residual not in (None, "sparse"):
            raise ValueError(
                f"residual_ratio must be 0 for residual={self.residual!r}, got {self.residual_ratio}: it is the share "
                "of positions that residual='sparse' keeps. Leave it out."
            )

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
    # Round bf16 weights at random instead of to the nearest.
    stochastic_rounding: bool = False
    # Part of the seed of every draw, with the weight's name and the refresh number.
    seed: int = field(default=0)

    @property
    def weight_factor(self) -> float:
        """Return the factor on the old weight, 1 - lr * weight_decay."""
        return 1.0 - self.lr * self.weight_decay

    @property
    def step_factor(self) -> float:
        """Return the factor on an update that `scale` does not concern, -lr; decayed when the decay comes after it."""
        return -self.lr * self.weight_factor if self.decay_order == "after" else -self.lr

    @property
    def update_factor(self) -> float:
        """Return the factor on the low-rank update, -lr * scale; decayed too when the decay comes after it."""
        return self.step_factor * self.scale


def check_hyper(*, lr: object, betas: object, eps: object, weight_decay: object) -> None:
    """Check the hyper-parameters that torch.optim users know; raises TypeError or ValueError."""
    check_float("lr", lr, low=0.0, hint="The paper uses 1e-6.")
    check_float("eps", eps, low=0.0, hint="1e-8 is torch's default.")
    check_float("weight_decay", weight_decay, low=0.0, hint="0 switches it off.")
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers, got {betas!r}. Use (0.9, 0.999).")
    for i, beta in enumerate(betas):
        check_float(f"betas[{i}]", beta, low=0.0, high=1.0, high_open=True, hint="Use (0.9, 0.999).")
