"""The YAML fields of `finetuning_type: crosslore`: what they are, and what they become."""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llamafactory.hparams import finetuning_args as upstream

from crosslore.checks import check_bool, check_choice, check_int
from crosslore.compact.attach import WEIGHTS, refuse_whole_gradients
from crosslore.config import ALL_LINEAR, LowRankConfig
from crosslore.presets import get_preset
from crosslore.telemetry import EVERY

# YAML name -> field of LowRankConfig.
CONFIG_FIELDS = {
    "rank": "rank",
    "alpha": "scale",
    "residual_ratio": "residual_ratio",
    "warmup_k": "warmup_steps",
    "crosslore_refresh_every": "refresh_every",
    "crosslore_projector": "projector",
    "crosslore_target": "targets",
    "crosslore_cross_head_target": "cross_head_targets",
    "crosslore_residual_target": "residual_targets",
    "crosslore_residual_rule": "residual_rule",
    "crosslore_residual_select": "residual_select",
    "crosslore_embeddings": "embeddings",
    "crosslore_moments": "moments",
    "crosslore_fit_window": "fit_window",
    "crosslore_head_choice": "head_choice",
    "crosslore_refresh_stagger": "refresh_stagger",
    "crosslore_random_after": "random_after",
    "crosslore_stochastic_rounding": "stochastic_rounding",
    "crosslore_seed": "seed",
}
# How gradients come: "auto" is compact where that is possible, else full.
GRADIENTS = ("auto", "compact", "compact-layerwise", "full", "layerwise")
# Options of other methods, which this type refuses.
OTHER_METHODS = (
    "LoraArguments",
    "OFTArguments",
    "FreezeArguments",
    "GaloreArguments",
    "ApolloArguments",
    "BAdamArgument",
)
OTHER_SWITCHES = ("use_llama_pro", "use_adam_mini", "use_muon", "use_mca", "use_hyper_parallel")


def _option(help_text: str) -> Any:  # Any: dataclasses.field has no better type
    return field(default=None, metadata={"help": f"CrossLore: {help_text} Default: the preset's."})


@dataclass
class CrossLoreArguments:
    """Fields that `finetuning_type: crosslore` adds to a configuration."""

    rank: int | None = _option("rank of the gradient subspace, from 1 to the smaller side of each target.")
    alpha: float | None = _option("factor on the low-rank update, > 0; the effective step is learning_rate * alpha.")
    residual_ratio: float | None = _option("share of a weight's entries that the sparse residual keeps, 0 to 1.")
    warmup_k: int | None = _option("steps before the residual starts, >= 0.")
    crosslore_preset: str = field(default="crosslore", metadata={"help": "CrossLore: method to start from."})
    crosslore_refresh_every: int | None = _option("steps between two fits of the basis, >= 1.")
    crosslore_projector: str | None = _option("how a basis is fitted: randomized, power (warm start), svd, random.")
    crosslore_target: str | None = _option("'all' linear layers, or module names with commas.")
    crosslore_cross_head_target: str | None = _option("modules whose heads share a basis, or 'none'.")
    crosslore_residual_target: str | None = _option("modules with a residual, or 'all'.")
    crosslore_residual_rule: str | None = _option("guarded, paper or exact.")
    crosslore_residual_select: str | None = _option("moment (paper) or residual.")
    crosslore_embeddings: str | None = _option("full, lowrank or frozen.")
    crosslore_moments: str | None = _option("what happens to the moments at a refresh: keep, rotate, reset.")
    crosslore_fit_window: int | None = _option("steps whose gradients a basis is fitted to, >= 1.")
    crosslore_head_choice: str | None = _option("heads that a shared basis is fitted to: random or energy.")
    crosslore_refresh_stagger: bool | None = _option("spread the refreshes of different weights over the interval.")
    crosslore_random_after: int | None = _option("last step with a fitted basis (golore); unset: see the preset.")
    crosslore_gradients: str = field(
        default="auto",
        metadata={
            "help": "CrossLore: compact (linear layers hand over P^T G only), layerwise (step inside backward, free "
            "each gradient), compact-layerwise (both: the least memory) or full. Default: auto, which is compact where "
            "that is possible, else full."
        },
    )
    crosslore_clip: str = field(
        default="weight", metadata={"help": "CrossLore: layerwise: max_grad_norm is for each weight, or stale-global."}
    )
    crosslore_weights: str = field(
        default="direct",
        metadata={"help": "CrossLore: direct, or deferred (updates stay compact beside the weight until a refresh)."},
    )
    crosslore_stochastic_rounding: bool | None = _option("round bf16 weights at random, so that small steps count.")
    crosslore_seed: int | None = field(
        default=None, metadata={"help": "CrossLore: seed of heads and sketches. Default: the training seed."}
    )
    crosslore_telemetry: bool = field(
        default=False, metadata={"help": "CrossLore: log subspace errors, refresh times and skipped weights."}
    )
    crosslore_telemetry_every: int = field(
        default=EVERY, metadata={"help": "CrossLore: steps between two looks at all weights, >= 1; refreshes always."}
    )
    use_crosslore: bool = field(default=False, metadata={"help": "Set by `finetuning_type: crosslore`."})


FIELDS = {f.name for f in dataclasses.fields(CrossLoreArguments)}


@dataclass
class CrossLoreFinetuningArguments(CrossLoreArguments, upstream.FinetuningArguments):  # type: ignore[misc]
    """LLaMA-Factory's arguments with the type `crosslore`.

    Code downstream reads `finetuning_type == "full"`, since all weights train; `use_crosslore` is the type's flag, a
    real field so that `dataclasses.replace` keeps it, and `to_dict` shows the honest type.
    """

    finetuning_type: Literal["lora", "oft", "freeze", "full", "crosslore"] = field(
        default="lora", metadata={"help": "Which fine-tuning method to use."}
    )

    def __post_init__(self) -> None:
        """Check our fields and hand the rest to LLaMA-Factory as `full`."""
        if self.finetuning_type == "crosslore" or self.use_crosslore:
            self.use_crosslore, self.finetuning_type = True, "full"
            check_bool("crosslore_telemetry", self.crosslore_telemetry, hint="It is a switch.")
            check_int("crosslore_telemetry_every", self.crosslore_telemetry_every, low=1, hint="It is in steps.")
            self.crosslore_overrides(training_seed=0)
            self._check_gradients()
        super().__post_init__()

    def _check_gradients(self) -> None:
        """Refuse ways in which gradients come that do not go with the other fields."""
        gradients = self.crosslore_gradients
        check_choice("crosslore_gradients", gradients, GRADIENTS)
        check_choice("crosslore_weights", self.crosslore_weights, WEIGHTS)
        if self.crosslore_weights == "deferred" and gradients in ("full", "layerwise"):
            raise ValueError(
                "crosslore_weights 'deferred' is for crosslore_gradients 'compact' (or 'auto'), got "
                f"{gradients!r}. Leave one of them out."
            )
        check_choice("crosslore_clip", self.crosslore_clip, ("weight", "stale-global"))
        if self.crosslore_clip != "weight" and not gradients.endswith("layerwise"):
            raise ValueError(
                f"crosslore_clip {self.crosslore_clip!r} is for crosslore_gradients 'layerwise' and "
                f"'compact-layerwise', got {gradients!r}, which clips the global norm of the step itself. Leave it out."
            )
        if gradients.startswith("compact") or self.crosslore_weights == "deferred":
            try:
                refuse_whole_gradients(get_preset(self.crosslore_preset).config.residual)
            except ValueError as error:
                raise ValueError(str(error).replace("gradients must", "crosslore_gradients must")) from None

    def to_dict(self) -> dict[str, Any]:  # Any: LLaMA-Factory's own type
        """Return the arguments as they are logged and saved, with the type that the user asked for."""
        shown: dict[str, Any] = super().to_dict()
        return {**shown, "finetuning_type": "crosslore"} if self.use_crosslore else shown

    def crosslore_overrides(self, *, training_seed: int) -> dict[str, Any]:  # Any: see create_optimizer
        """Return the keyword arguments for `create_optimizer`; checks each one under its YAML name.

        Raises:
            TypeError, ValueError: a field has a wrong type or value.
        """
        config = get_preset(self.crosslore_preset).config
        overrides: dict[str, Any] = {"seed": training_seed}
        for yaml_name, name in CONFIG_FIELDS.items():
            value = getattr(self, yaml_name)
            if value is None:
                continue
            overrides[name] = _module_names(yaml_name, value) if name.endswith("targets") else value
        try:
            replace(config, **overrides)  # all at once: of fields that belong together one alone may be refused
        except (TypeError, ValueError) as error:
            raise type(error)(in_yaml_names(str(error), overrides)) from None
        return overrides


def refuse_other_methods(given: dict[str, Any]) -> None:  # Any: values of a configuration
    """Raise a ValueError if a configuration sets options of another method, even to their defaults.

    Whoever turns a LoRA configuration into one of this type must see which values no longer apply. Options that
    are switched off (false, null, empty) are fine: the WebUI writes them for every type.
    """
    groups = [getattr(upstream, name) for name in OTHER_METHODS if hasattr(upstream, name)]
    foreign = {f.name for group in groups for f in dataclasses.fields(group)} | set(OTHER_SWITCHES)
    mixed = sorted(name for name in foreign if str(given.get(name) or "false").lower() not in ("false", "none"))
    if mixed:
        raise ValueError(
            f"`finetuning_type: crosslore` does not go with the options of other methods: "
            f"{', '.join(f'{name}={given[name]!r}' for name in mixed)}. Remove them; its own options are "
            "rank, alpha, residual_ratio, warmup_k and those that start with crosslore_."
        )


def in_yaml_names(message: str, given: Iterable[str]) -> str:
    """Return a message about fields of LowRankConfig with the names that the user wrote."""
    for yaml_name, name in CONFIG_FIELDS.items():
        if name != "rank" and (name in given or message.startswith(name)):
            message = re.sub(rf"(?<![\w.`']){name}\b(?!['.])", yaml_name, message)
    return message.replace("must be None", "must be `none`").replace("Set it to None", "Set it to `none`")


def _module_names(yaml_name: str, value: object) -> str | tuple[str, ...] | None:
    """Return the module names of a comma-separated text; "all" and "none" where the field knows them."""
    if not isinstance(value, str):
        raise TypeError(
            f"{yaml_name} must be a text of module names with commas, got {value!r}. Example: q_proj,k_proj"
        )
    names = tuple(part.strip() for part in value.split(",") if part.strip())
    if names == ("all",):
        if yaml_name == "crosslore_cross_head_target":
            raise ValueError(f"{yaml_name} must name modules or be 'none', got 'all'. Example: q_proj,k_proj")
        return ALL_LINEAR if yaml_name == "crosslore_target" else None
    if names == ("none",):
        if yaml_name == "crosslore_cross_head_target":
            return None
        raise ValueError(
            f"{yaml_name} must name modules or be 'all', got 'none'. Set residual_ratio: 0 for no residual."
        )
    if not names:
        raise ValueError(f"{yaml_name} must name modules, got {value!r}. Example: q_proj,k_proj")
    return names


def describe(config: LowRankConfig) -> str:
    """Return the method in a few words, for the log."""
    residual = f"residual {config.residual_ratio:.1%} ({config.residual_rule})" if config.residual else "no residual"
    return f"rank {config.rank}, alpha {config.scale:g}, {residual}"
