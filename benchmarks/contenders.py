"""Who is measured, on which matrices: every preset of `crosslore.PRESETS`, and the peers.

A preset that is added is measured without a change here. Its options are its own, except: rank 128 unless the preset
has another rank than the default; the interval, which a measurement sets; a residual that starts after two steps
instead of after its warm-up, so that every measured step has it.
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from common import MODEL, Options
from torch import nn
from torch.optim import Optimizer

from crosslore import PRESETS, LowRankConfig, create_optimizer

# The interval that amortised figures are of, GaLore's default.
INTERVAL = 200
# An interval that no measurement reaches.
NEVER = 10**6
# Steps of an interval in which the refreshes of a staggered preset are measured; two for each matrix of a 7B layer.
STAGGERED_CYCLE = 14
# Steps that nobody measures, at the start: allocation, the first fit, the selection of the residual's positions.
WARM_UP = 3
LEARNING_RATE = 1e-6
# Options without which a preset does not run, or not as its paper means it.
PRESET_OPTIONS: dict[str, dict[str, Any]] = {}  # Any: fields of LowRankConfig


class Skip(Exception):
    """A contender cannot run here; the message says why."""


class Decoder(nn.Module):
    """The weights of a decoder without its computation, named as in transformers' LLaMA."""

    def __init__(self, *, width: int, wide: int, heads: int, kv_heads: int, layers: int, vocabulary: int) -> None:
        """Build the weights; `vocabulary` 0 leaves out embedding and norms."""
        super().__init__()
        self.config = SimpleNamespace(
            model_type="llama", num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=width
        )
        if vocabulary:
            self.embed_tokens = nn.Embedding(vocabulary, width)
        kv_width = width // heads * kv_heads
        rows = {"q_proj": (width, width), "k_proj": (width, kv_width), "v_proj": (width, kv_width)}
        mlp = {"gate_proj": (width, wide), "up_proj": (width, wide), "down_proj": (wide, width)}
        self.layers = nn.ModuleList()
        for _ in range(layers):
            layer = nn.Module()
            attention = {name: _linear(*shape) for name, shape in (rows | {"o_proj": (width, width)}).items()}
            layer.self_attn, layer.mlp = nn.Module(), nn.Module()
            for parent, members in (
                (layer.self_attn, attention),
                (layer.mlp, {n: _linear(*s) for n, s in mlp.items()}),
            ):
                for name, linear in members.items():
                    parent.add_module(name, linear)
            if vocabulary:
                layer.input_layernorm, layer.post_attention_layernorm = nn.RMSNorm(width), nn.RMSNorm(width)
            self.layers.append(layer)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    return linear


def workloads(options: Options) -> dict[str, dict[str, int]]:
    """Return the sizes of both models, by name; smaller ones for quick and tiny runs."""
    layer = {"width": 4096, "wide": 11008, "heads": 32, "kv_heads": 32, "layers": 1, "vocabulary": 0}
    small = {"width": 576, "wide": 1536, "heads": 9, "kv_heads": 3, "layers": 30, "vocabulary": 49152}
    if (MODEL / "config.json").is_file():
        found = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
        names = "hidden_size intermediate_size num_attention_heads num_key_value_heads num_hidden_layers vocab_size"
        small = dict(zip(small, (found[name] for name in names.split()), strict=True))
    if options.profile == "quick":
        return {"llama2-7b layer, a quarter as wide": layer | {"width": 1024, "wide": 2752, "heads": 8, "kv_heads": 8}}
    if options.profile == "tiny":
        return {"tiny": {"width": 32, "wide": 48, "heads": 4, "kv_heads": 2, "layers": 1, "vocabulary": 64}}
    return {"llama2-7b layer": layer, "smollm2-135m": small}


def rank_of(options: Options) -> int:
    """Return the rank of all methods that do not bring their own."""
    rank: int = options.pick(full=128, quick=128, tiny=8)
    return rank


def build_workload(sizes: dict[str, int], options: Options) -> Decoder:
    """Return the weights with gradients of low rank plus noise, G = A B / sqrt(k) + 0.1 E, k = 64."""
    generator = torch.Generator().manual_seed(0)
    model = Decoder(**sizes).to(options.device, options.torch_dtype)
    for p in model.parameters():
        p.grad = random_gradient(p, generator)
    return model


def random_gradient(weight: torch.Tensor, generator: torch.Generator, *, inner: int = 64) -> torch.Tensor:
    """Return a gradient of the weight's shape, dtype and device; drawn on the CPU."""
    noise = torch.randn(weight.shape, generator=generator).mul_(0.1 if weight.dim() == 2 else 1.0)
    if weight.dim() == 2:
        a, b = (torch.randn(size, inner, generator=generator) for size in weight.shape)
        noise.addmm_(a, b.mT, alpha=inner**-0.5)
    return noise.mul_(1e-3).to(weight.device, weight.dtype)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One method: how its optimizer is made, and how its refreshes are provoked."""

    name: str
    # Takes a model, a rank and the steps between two refreshes.
    make: Callable[[nn.Module, int, int], Optimizer]
    # Steps in which every weight is refreshed exactly once; 0: there are no refreshes, or each step is one.
    cycle: int = 0
    # The refreshes are spread over the interval.
    staggered: bool = False
    ours: bool = False
    # Rank that it brings along; None: the one of the measurement. 0: it has none.
    own_rank: int | None = None

    def rank(self, rank: int) -> int:
        """Return the rank that this method uses when the others use `rank`."""
        return rank if self.own_rank is None else self.own_rank

    def ordinary(self, model: nn.Module, rank: int) -> Optimizer:
        """Return the optimizer whose steps after the first have no refresh.

        Raises:
            Skip: if the package is missing or cannot run here.
        """
        return self._made(model, rank, NEVER)

    def cycling(self, model: nn.Module, rank: int) -> Optimizer:
        """Return the optimizer that refreshes every weight once in `cycle` steps."""
        return self._made(model, rank, self.cycle)

    def _made(self, model: nn.Module, rank: int, every: int) -> Optimizer:
        try:
            return self.make(model, rank, every)
        except (ImportError, RuntimeError) as error:
            raise Skip(f"{type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:200]


def contenders(options: Options) -> dict[str, Contender]:
    """Return presets and peers by name, those that `--contenders` names.

    Raises:
        ValueError: if it names an unknown one; lists the known ones.
    """
    found = {name: preset_contender(name) for name in PRESETS} | {peer.name: peer for peer in peers()}
    wanted = options.contenders or tuple(found)
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise ValueError(f"unknown contender {', '.join(unknown)}. Known: {', '.join(found)}.")
    return {name: found[name] for name in wanted}


def preset_contender(name: str) -> Contender:
    """Return one of our presets as a contender."""
    config = PRESETS[name].config
    own_rank = None if config.rank == LowRankConfig().rank else config.rank

    def make(model: nn.Module, rank: int, every: int) -> Optimizer:
        options: dict[str, Any] = {"rank": rank if own_rank is None else own_rank}  # Any: fields of LowRankConfig
        if config.refresh_every > 1:
            options["refresh_every"] = every
        if config.residual == "sparse":
            options["warmup_steps"] = WARM_UP - 1
        return create_optimizer(model, name, lr=LEARNING_RATE, **options, **PRESET_OPTIONS.get(name, {}))

    staggered, window = config.refresh_stagger, config.fit_window
    cycle = max(STAGGERED_CYCLE, window) if staggered else window
    cycle = 0 if config.refresh_every == 1 else cycle
    return Contender(name=name, make=make, cycle=cycle, staggered=staggered, ours=True, own_rank=own_rank)


def peers() -> list[Contender]:
    """Return the optimizers of other packages, with their defaults."""
    return [
        Contender(name="torch AdamW foreach", make=lambda m, r, e: _adamw(m, foreach=True), own_rank=0),
        Contender(name="torch AdamW fused", make=lambda m, r, e: _adamw(m, fused=True), own_rank=0),
        Contender(name="galore-torch", make=_galore, cycle=1),
        Contender(name="apollo-torch", make=_apollo, cycle=1),
        Contender(name="bitsandbytes AdamW8bit", make=lambda m, r, e: _eight_bit(m, "bitsandbytes.optim"), own_rank=0),
        Contender(name="torchao AdamW8bit", make=lambda m, r, e: _eight_bit(m, "torchao.optim"), own_rank=0),
    ]


def _adamw(model: nn.Module, **kind: Any) -> Optimizer:  # Any: foreach or fused
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, **kind)


def _eight_bit(model: nn.Module, module: str) -> Optimizer:
    optimizer: Optimizer = importlib.import_module(module).AdamW8bit(model.parameters(), lr=LEARNING_RATE)
    return optimizer


def _galore(model: nn.Module, rank: int, every: int) -> Optimizer:
    special = {"rank": rank, "update_proj_gap": every, "scale": 0.25, "proj_type": "std"}
    groups = _groups(model, special)
    adamw = importlib.import_module("galore_torch.adamw").AdamW
    optimizer: Optimizer = adamw(groups, lr=LEARNING_RATE, no_deprecation_warning=True)
    return optimizer


def _apollo(model: nn.Module, rank: int, every: int) -> Optimizer:
    special = {"rank": rank, "update_proj_gap": every, "scale": 1.0, "proj_type": "std"}
    groups = _groups(model, special | {"proj": "random", "scale_type": "channel"})
    optimizer: Optimizer = importlib.import_module("apollo_torch.apollo").AdamW(groups, lr=LEARNING_RATE)
    return optimizer


def _groups(model: nn.Module, special: dict[str, Any]) -> list[dict[str, Any]]:  # Any: torch's own group type
    """Return the linear layers with their options, and the rest without."""
    ends = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    low = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) not in ends]
    others = [p for p in model.parameters() if all(p is not weight for weight in low)]
    return [{"params": others}] * bool(others) + [{"params": low, **special}]


def low_rank_weights(model: nn.Module) -> int:
    """Return how many matrices the low-rank methods refresh."""
    ends = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return len({id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - ends)


def warm_up(optimizer: Optimizer, model: nn.Module, name: str, *, steps: int = WARM_UP) -> None:
    """Do the first steps, which nobody measures.

    Raises:
        Skip: if a step fails, or changes the gradients, which all contenders share.
    """
    before = gradient_versions(model)
    try:
        for _ in range(steps):
            optimizer.step()
    except Exception as error:  # of any kind: compilers and native libraries raise what they like
        raise Skip(f"{type(error).__name__}: {_first_line(error)}") from error
    if before != gradient_versions(model):
        raise Skip(f"{name} changes the gradients in place, which the others would see")


def gradient_versions(model: nn.Module) -> list[int]:
    """Return torch's counters of changes in place, one for each gradient."""
    return [p.grad._version for p in model.parameters() if p.grad is not None]


def check_sane(model: nn.Module, optimizers: dict[str, Optimizer]) -> None:
    """Raise a RuntimeError if weights are not finite or steps were skipped: the times would mean nothing."""
    skipped = [name for name, optimizer in optimizers.items() if getattr(optimizer, "nonfinite_skips", None)]
    if skipped:
        raise RuntimeError(f"{', '.join(skipped)} skipped steps because of gradients that are not finite.")
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise RuntimeError("a weight is not finite after the measurement. Lower LEARNING_RATE in contenders.py.")
