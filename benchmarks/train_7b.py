"""Training steps of LLaMA2-7B and 13B with random weights in bf16, every method beside LoRA, on one GPU.

    python benchmarks/train_7b.py                             # needs a CUDA device with 24 GB or more; no download
    python benchmarks/train_7b.py --rank 16 --tokens 256,gsm8k
    python benchmarks/train_7b.py --model 13b --tokens 2048
    python benchmarks/train_7b.py --tiny --device cpu         # the same code on a tiny model, for tests

Batch 1, gradient checkpointing off, each method in a process of its own. `gsm8k` is the lengths of that data set's
rows, one after another. Ours have 8-bit moments and refresh all bases together; `crosslore:compact` is
`gradients="compact"`, `:deferred` that with deferred weights, and without a colon they are layerwise. GaLore steps
inside backward as its package does it, one optimizer for each weight; so it does in LLaMA-Factory. Written to
results/benchmarks/train_7b.json, a method as soon as it is finished; rows that are there are not measured again unless
--fresh. Out of memory is a row.

A row: seconds of an ordinary step (median; over GSM8K's lengths the mean), seconds that fitting every basis once adds
to a step, the mean over an interval of 200 steps that follows from both, the share of fitting in it, peak GiB allocated
and reserved, of ordinary steps and of the first one. Fitting is measured after a model of one layer has warmed the
device up. An exact SVD of every weight takes minutes: for the two methods that do it, it is measured on a model of two
layers of the same shape and multiplied (`fitting_layers`), and the whole model gets bases that cost nothing.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import ROOT, Options, environment, synchronize
from torch import Tensor, nn
from train_step import adamw, adamw8bit, badam, lora

PRESETS = ("crosslore", "crosslore_plus", "galore", "apollo")
MODES = ("layerwise", "compact", "compact-layerwise", "deferred")
METHODS = (
    "lora", "dora", "adamw", "adamw8bit", "badam", "galore-torch", "galore", "apollo", "crosslore", "crosslore_plus",
    *(f"{preset}:{mode}" for preset in ("crosslore", "crosslore_plus") for mode in MODES[1:]),
)  # fmt: skip
INTERVAL, LR = 200, 1e-6
# LLaMA2's own sizes; the tiny one for tests.
SIZES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
}
# Tokens of GSM8K's 7473 training rows (prompt and solution, SmolLM2's tokenizer): the middles of 20 equal parts.
GSM8K_LENGTHS = (176, 275, 234, 210, 103, 250, 184, 125, 131, 169, 144, 156, 138, 317, 151, 220, 163, 116, 201, 192)
# Those without a basis, and those that fit it by an exact SVD: to how many layers.
NOTHING_TO_FIT = ("lora", "dora", "adamw", "adamw8bit", "badam")
EXACT_SVD, SVD_LAYERS = ("galore-torch", "galore"), 2
GIB = 2**30

Row = dict[str, Any]  # Any: JSON


def main() -> int:
    """Measure the methods one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=tuple(SIZES), default="7b")
    parser.add_argument("--tiny", action="store_const", dest="model", const="tiny", help="a tiny model, for tests")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas (default: all)")
    parser.add_argument("--tokens", default="256", help="numbers, or gsm8k, with commas (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="ordinary steps that are measured (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "train_7b.json")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    args = parser.parse_args()
    if unknown := set(args.methods.split(",")) - set(METHODS):
        parser.error(f"unknown methods {', '.join(sorted(unknown))}. Known: {', '.join(METHODS)}.")
    if not all(tokens == "gsm8k" or tokens.isdigit() for tokens in args.tokens.split(",")):
        parser.error(f"--tokens must be numbers or gsm8k, got {args.tokens!r}.")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # the device belongs to the processes that measure
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here. Run it on a machine with one, or use --tiny --device cpu.")
    rows = {} if args.fresh or not args.out.exists() else json.loads(args.out.read_text(encoding="utf-8"))
    for method in args.methods.split(","):
        keys = {
            tokens: f"{args.model}, {method}, rank {args.rank}, {tokens} tokens" for tokens in args.tokens.split(",")
        }
        if missing := [tokens for tokens, key in keys.items() if key not in rows]:
            rows |= {keys[tokens]: row for tokens, row in in_process(method, missing, args).items()}
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        for key in keys.values():
            print(f"{key}: {rows[key].get('amortised_seconds', rows[key]['status'])}", flush=True)
    return 0


def in_process(method: str, tokens: list[str], args: argparse.Namespace) -> dict[str, Row]:
    """Return the rows of one method, measured in a process of its own; this one has loaded what all of them need."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(writer, method, tokens, args))
    process.start()
    writer.close()
    try:
        found: dict[str, Row] = reader.recv()
    except EOFError:
        process.join()
        found = {one: {"status": "failed", "error": f"the process ended with {process.exitcode}"} for one in tokens}
    process.join()
    return found


def answer(writer: Connection, method: str, tokens: list[str], args: argparse.Namespace) -> None:
    """Measure and send the rows; what was measured before an error is sent with it."""
    rows: dict[str, Row] = {}
    try:
        for one, row in measured(method, tokens, args):
            rows[one] = row
    except Exception as error:
        status = "oom" if isinstance(error, torch.OutOfMemoryError) else "failed"
        rows |= {one: {"status": status, "error": traceback.format_exc()[-2000:]} for one in tokens if one not in rows}
    writer.send(rows)


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

    def first(self, tokens: int) -> tuple[float, float]:
        """Return the seconds of the first step and of an ordinary one."""
        return self.once(tokens), min(self.once(tokens) for _ in range(3))


def measured(method: str, settings: list[str], args: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """Yield the row of each number of tokens."""
    lengths = {one: GSM8K_LENGTHS if one == "gsm8k" else (int(one),) * args.steps for one in settings}
    longest = max(lengths[settings[0]])
    Training(method, args, layers=1).first(longest)  # kernels are compiled, libraries loaded
    fitted_layers, fitting = SIZES[args.model]["num_hidden_layers"], None
    if method in EXACT_SVD:
        first, plain = Training(method, args, layers=SVD_LAYERS).first(longest)
        fitted_layers, fitting = SVD_LAYERS, (first - plain) * fitted_layers / SVD_LAYERS
    release(args.device)
    training = Training(method, args)
    with free_bases() if method in EXACT_SVD else nullcontext():
        first, plain = training.first(longest)
    first_peak = peak_gib(args.device)
    if fitting is None:
        fitting = 0.0 if method in NOTHING_TO_FIT else max(0.0, first - plain)
    for one in settings:
        release(args.device)
        for warm in (True, False):
            times = [
                training.once(length) for length in (lengths[one][:3] if warm and one != "gsm8k" else lengths[one])
            ]
        ordinary = statistics.fmean(times) if one == "gsm8k" else statistics.median(times)
        total = ordinary + fitting / INTERVAL
        yield one, {
            "status": "ok", "method": method, "model": args.model, "rank": args.rank, "tokens": one,
            "ordinary_seconds": ordinary, "fitting_seconds": fitting, "fitting_layers": fitted_layers,
            "amortised_seconds": total, "fitting_share": fitting / INTERVAL / total,
            **{f"peak_{kind}": gib for kind, gib in peak_gib(args.device).items()},
            **{f"first_peak_{kind}": gib for kind, gib in first_peak.items() if one == settings[0]},
            "environment": environment(Options(out=Path(), device=args.device, dtype="bfloat16")),
        }  # fmt: skip


def release(device: str) -> None:
    """Give unused memory back and begin a new peak."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> dict[str, float]:
    """Return the peaks since `release`; nothing on a CPU."""
    if device != "cuda":
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"allocated_gib": allocated / GIB, "reserved_gib": reserved / GIB}


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
    options: Row = {"lr": LR, "rank": rank, "rule": "adamw8bit", "refresh_every": INTERVAL, "refresh_stagger": False}
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

    def hook(p: torch.Tensor) -> None:
        optimizers[p].step()
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    return model, lambda: None


SETUPS = {
    "lora": peer(lora), "dora": peer(lora, use_dora=True), "adamw": peer(adamw, fused=True),
    "adamw8bit": peer(adamw8bit), "badam": peer(badam), "galore-torch": galore_torch,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
