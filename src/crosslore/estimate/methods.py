"""The methods that stand side by side, and the numbers of a training run that decide over memory."""

from dataclasses import dataclass
from typing import Literal, get_args

from crosslore.checks import check_bool, check_choice, check_float, check_int
from crosslore.compact.attach import WEIGHTS, Weights
from crosslore.config import CHOICES
from crosslore.estimate.activations import Trained
from crosslore.estimate.at_once import Device
from crosslore.estimate.sources import DTYPES
from crosslore.factory import MODES, Gradients
from crosslore.presets import get_preset
from crosslore.registry import REGISTRY

# `--optim`'s names are the rules'.
RULES = tuple(REGISTRY["rule"])
# As the packages of GaLore's authors have it.
WHOLE: tuple[Gradients, ...] = ("full", "layerwise")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One training run on one GPU.

    Raises:
        TypeError, ValueError: a value has the wrong type or is out of range.
    """

    # Sequences of a micro-batch, tokens of each.
    batch: int = 1
    seq: int = 512
    # Each layer's forward pass is repeated in backward: LLaMA-Factory's default.
    checkpointing: bool = True
    # Of weights, gradients and activations.
    dtype: Literal["bf16", "fp32"] = "bf16"
    # Of the bases, and of adapters.
    rank: int = 128
    # Update rule; the paper's is AdamW in 8 bits.
    rule: str = "adamw8bit"
    # Micro-batches of a step.
    accumulation: int = 1
    # See LowRankConfig.
    embeddings: Literal["full", "lowrank", "frozen"] = "full"
    # LoRA and DoRA of a bf16 model train under bf16 autocast, as trainers have it; else peft computes them in fp32.
    autocast: bool = True
    # Where it runs: a GPU works on larger groups of compact gradients, and sums of gradients wait in the host's memory.
    device: Device = "cuda"
    # CUDA context, libraries' work spaces, what the allocator cannot use; GB of 10^9 bytes. Assumed, not measured.
    cuda_gb: float = 0.8

    def __post_init__(self) -> None:
        """Check every value."""
        check_int("batch", self.batch, low=1, hint="1 is the paper's.")
        check_int("seq", self.seq, low=2, hint="512 is the default.")
        check_int("rank", self.rank, low=1, hint="The paper uses 16 to 256.")
        check_int("accumulation", self.accumulation, low=1, hint="1: a step for each backward pass.")
        check_float("cuda_gb", self.cuda_gb, low=0.0, hint="0.8 is assumed.")
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_choice("optim", self.rule, RULES)
        check_choice("embeddings", self.embeddings, CHOICES["embeddings"])
        check_choice("device", self.device, get_args(Device))
        for name in ("checkpointing", "autocast"):
            check_bool(name, getattr(self, name), hint="It is a switch.")

    @property
    def itemsize(self) -> int:
        """Bytes of an entry of the weights."""
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class Method:
    """What trains, and how its gradients come."""

    name: str
    # "all": every weight; else adapters.
    trained: Trained = "all"
    # A name of PRESETS; None: every trained weight at full rank.
    preset: str | None = None
    gradients: Gradients = "full"
    weights: Weights = "direct"
    # Takes the place of the setting's rule.
    rule: str | None = None
    # The step holds the roots of all second moments together: torch's AdamW on a GPU without `fused=True`.
    roots: bool = False

    @property
    def has_rank(self) -> bool:
        """Whether its memory depends on the rank."""
        return self.preset is not None or self.trained != "all"

    @property
    def is_compact(self) -> bool:
        """Whether linear layers hand over R instead of their gradients."""
        return self.gradients.startswith("compact")

    @property
    def is_layerwise(self) -> bool:
        """Whether weights step inside backward, so that without accumulation one gradient at a time lives."""
        return self.gradients.endswith("layerwise")


def chosen_method(preset: str, gradients: Gradients, weights: Weights) -> Method:
    """Return the method of these options.

    Raises:
        ValueError: an unknown name, or options that do not go together.
    """
    get_preset(preset)
    check_choice("gradients", gradients, MODES)
    check_choice("weights", weights, WEIGHTS)
    name = f"{preset} {gradients}{' deferred' if weights == 'deferred' else ''}"
    rule = "adafactor" if preset == "flora" else None  # which goes with no other
    return Method(name=name, preset=preset, gradients=gradients, weights=weights, rule=rule)


def side_by_side(chosen: Method) -> list[Method]:
    """Return the methods of the table; the chosen one is added at the end if it is not among them."""
    found = [
        Method(name="AdamW", rule="adamw"),
        Method(name="AdamW8bit", rule="adamw8bit"),
        Method(name="LoRA", trained="lora"),
        Method(name="DoRA", trained="dora"),
        *(chosen_method("galore", mode, "direct") for mode in WHOLE),
        *(chosen_method("crosslore", mode, "direct") for mode in MODES),
        chosen_method("crosslore", "compact", "deferred"),
        chosen_method("crosslore_plus", "compact", "direct"),
        chosen_method("crosslore_plus", "compact-layerwise", "direct"),
    ]
    return found if chosen in found else [*found, chosen]
