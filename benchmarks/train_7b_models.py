"""What `train_7b.py` trains: LLaMA2's shapes with random weights, and the methods on them."""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch
from weakref import ref

import torch
from common import synchronize
from torch import Tensor, nn
from train_step import adamw, adamw8bit, badam, lora

INTERVAL, LR = 200, 1e-6
# LLaMA2's own sizes; the tiny one for tests.
SIZES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
}


class Training:
    """A model with random weights and a method on it."""

    def __init__(self, method: str, args: argparse.Namespace, *, layers: int | None = None) -> None:
        """Build both; `layers` of them instead of all."""
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = SIZES[args.model] | ({} if layers is None else {"num_hidden_layers": layers})
        config = LlamaConfig(**sizes, vocab_size=256 if args.model == "tiny" else 32000, use_cache=False)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(args.device):
            model: nn.Module = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        self.device, self.vocabulary = args.device, config.vocab_size
        self.model, self.step = SETUPS[method](model, args.rank) if method in SETUPS else ours(model, method, args.rank)

    def once(self, tokens: int) -> float:
        """Return the seconds of a whole step of this many tokens."""
        row = torch.randint(self.vocabulary, (1, tokens), device=self.device)
        synchronize(self.device)
        start = time.perf_counter()
        self.model(input_ids=row, labels=row).loss.backward()
        self.step()
        synchronize(self.device)
        return time.perf_counter() - start

    def checkpointing(self, on: bool) -> None:
        """Recompute activations in backward, or keep them."""
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        else:
            self.model.gradient_checkpointing_disable()  # type: ignore[operator]

    def on_device(self, tokens: int) -> float:
        """Return the seconds that the kernels of a step take."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            self.once(tokens)
        cuda = torch.autograd.DeviceType.CUDA
        events = [one for one in seen.key_averages() if one.device_type == cuda and not one.is_user_annotation]
        return sum(one.self_device_time_total for one in events) / 1e6

    def first(self, tokens: int) -> tuple[float, float]:
        """Return the seconds of the first step and of an ordinary one."""
        return self.once(tokens), min(self.once(tokens) for _ in range(3))


@contextmanager
def free_bases() -> Iterator[None]:
    """Let an SVD cost nothing: ordinary steps take the same time with any basis."""

    def svd(matrix: Tensor, full_matrices: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        rows, cols = matrix.shape[-2:]
        rank = min(rows, cols)
        u, vh = matrix.new_zeros(rows, rank), matrix.new_zeros(rank, cols)
        return u.fill_diagonal_(1), matrix.new_ones(rank), vh.fill_diagonal_(1)

    with patch("torch.linalg.svd", svd):
        yield


Setup = tuple[nn.Module, Callable[[], None]]


def ours(model: nn.Module, name: str, rank: int) -> Setup:
    """One of our presets in a mode, moments in 8 bits."""
    from crosslore import create_optimizer

    preset, _, mode = name.partition(":")
    options: dict[str, Any] = {
        "lr": LR,
        "rank": rank,
        "rule": "adamw8bit",
        "refresh_every": INTERVAL,
        "refresh_stagger": False,
    }
    if preset == "crosslore":
        options["warmup_steps"] = 1  # the residual is part of an ordinary step
    options["gradients"] = "compact" if mode == "deferred" else mode or "layerwise"
    if mode == "deferred":
        options["weights"] = "deferred"
    optimizer = create_optimizer(model, preset, **options)
    return model, finishing(optimizer)


def finishing(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return what ends a step."""

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer(make: Callable[..., tuple[nn.Module, torch.optim.Optimizer]], **options: Any) -> Callable[..., Setup]:
    """Return a contender of part e as one of this benchmark."""

    def setup(model: nn.Module, rank: int) -> Setup:
        wrapped, optimizer = make(model, rank, **options)
        return wrapped, finishing(optimizer)

    return setup


def galore_torch(model: nn.Module, rank: int) -> Setup:
    """The package, layerwise as its script and LLaMA-Factory do it: one optimizer and one hook for each weight.

    Its 8-bit class does not train small matrices with current bitsandbytes, so its moments are in the weights' bf16.
    """
    from galore_torch import GaLoreAdamW

    linear = {id(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}
    low = {"rank": rank, "update_proj_gap": INTERVAL, "scale": 0.25, "proj_type": "std"}
    optimizers = {
        p: GaLoreAdamW([{"params": [p], **(low if id(p) in linear else {})}], lr=LR, no_deprecation_warning=True)
        for p in model.parameters()
    }

    owner = ref(model)  # a hook that held the optimizers would keep the model alive
    model.galore_optimizers = optimizers  # type: ignore[assignment]

    def hook(p: torch.Tensor) -> None:
        owner().galore_optimizers[p].step()  # type: ignore[union-attr,operator,index]
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    return model, lambda: None


SETUPS = {
    "lora": peer(lora), "dora": peer(lora, use_dora=True), "adamw": peer(adamw, fused=True),
    "adamw8bit": peer(adamw8bit), "badam": peer(badam), "galore-torch": galore_torch,
}  # fmt: skip
