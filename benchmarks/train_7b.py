"""Training steps of LLaMA2-7B and 13B with random weights in bf16, every method beside LoRA, on one GPU.

    python benchmarks/train_7b.py                             # needs a CUDA device with 24 GB or more; no download
    python benchmarks/train_7b.py --rank 16 --tokens gsm8k    # the lengths of GSM8K's rows, one after another
    python benchmarks/train_7b.py --model 13b --tokens 2048
    python benchmarks/train_7b.py --tiny --device cpu         # the same code on a tiny model, for tests

Batch 1, gradient checkpointing off, each method in a process of its own. Ours have 8-bit moments; `crosslore:compact`
is `gradients="compact"`, `:deferred` that with deferred weights, and without a colon they are layerwise.
GaLore steps inside backward as its package does it, one optimizer for each weight; so it does in LLaMA-Factory.
Written to results/benchmarks/train_7b.json, one row as soon as it is finished; rows that are there are not measured
again unless --fresh. Out of memory is a row.

A row: median seconds of an ordinary step, seconds of a step in which every basis is fitted, the mean over an interval
of 200 steps that follows from both, the share of fitting in it, peak GiB allocated and reserved.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Options, environment, synchronize
from torch import nn
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
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
}
# Tokens of GSM8K's 7473 training rows (prompt and solution, SmolLM2's tokenizer): the middles of 20 equal parts.
GSM8K_LENGTHS = (176, 275, 234, 210, 103, 250, 184, 125, 131, 169, 144, 156, 138, 317, 151, 220, 163, 116, 201, 192)
# Those without a basis.
NOTHING_TO_FIT = ("lora", "dora", "adamw", "adamw8bit", "badam")


def main() -> int:
    """Measure the methods one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=tuple(SIZES), default="7b")
    parser.add_argument("--tiny", action="store_const", dest="model", const="tiny", help="a tiny model, for tests")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas (default: all)")
    parser.add_argument("--tokens", default="256", help="a number, or gsm8k (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="ordinary steps that are measured (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "train_7b.json")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a child process measures
    args = parser.parse_args()
    if unknown := set(args.methods.split(",")) - set(METHODS):
        parser.error(f"unknown methods {', '.join(sorted(unknown))}. Known: {', '.join(METHODS)}.")
    if args.tokens != "gsm8k" and not args.tokens.isdigit():
        parser.error(f"--tokens must be a number or gsm8k, got {args.tokens!r}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here. Run it on a machine with one, or use --tiny --device cpu.")
    if args.one:
        print(json.dumps(measured(args.one, args)))
        return 0
    rows = {} if args.fresh or not args.out.exists() else json.loads(args.out.read_text(encoding="utf-8"))
    for method in args.methods.split(","):
        key = f"{args.model}, {method}, rank {args.rank}, {args.tokens} tokens"
        if key not in rows:
            rows[key] = in_process(method)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        print(f"{key}: {rows[key].get('amortised_seconds', rows[key]['status'])}", flush=True)
    return 0


def in_process(method: str) -> dict[str, Any]:  # Any: JSON
    """Return the row of one method, measured in a fresh process."""
    result = subprocess.run([sys.executable, *sys.argv, "--one", method], capture_output=True, text=True)
    if result.returncode == 0:
        row: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        return row
    status = "oom" if "OutOfMemoryError" in result.stderr else "failed"
    return {"status": status, "error": result.stderr[-2000:]}


def measured(method: str, args: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Return the row of one method; this process does nothing else."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = args.model == "tiny"
    config = LlamaConfig(**SIZES[args.model], vocab_size=256 if tiny else 32000, use_cache=False)
    torch.manual_seed(0)
    with torch.device(args.device):
        model: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16)
    model, step = SETUPS[method](model, args.rank) if method in SETUPS else ours(model, method, args.rank)
    lengths = GSM8K_LENGTHS if args.tokens == "gsm8k" else (int(args.tokens),) * args.steps
    rows = [torch.randint(config.vocab_size, (1, length), device=args.device) for length in lengths]

    def once(tokens: torch.Tensor) -> float:
        synchronize(args.device)
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        step()
        synchronize(args.device)
        return time.perf_counter() - start

    longest = max(rows, key=torch.numel)
    first = once(longest)
    plain = min(once(longest) for _ in range(2))
    times = [once(tokens) for tokens in rows]
    ordinary = statistics.fmean(times) if args.tokens == "gsm8k" else statistics.median(times)
    fitting = 0.0 if method in NOTHING_TO_FIT else max(0.0, first - plain)
    total = ordinary + fitting / INTERVAL
    row = {
        "status": "ok", "method": method, "model": args.model, "rank": args.rank, "tokens": args.tokens,
        "ordinary_seconds": ordinary, "first_seconds": first, "amortised_seconds": total,
        "fitting_share": fitting / INTERVAL / total,
        "environment": environment(Options(out=Path(), device=args.device, dtype="bfloat16")),
    }  # fmt: skip
    if args.device == "cuda":
        row["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return row


Setup = tuple[nn.Module, Callable[[], None]]


def ours(model: nn.Module, name: str, rank: int) -> Setup:
    """One of our presets in a mode, moments in 8 bits."""
    from crosslore import create_optimizer

    preset, _, mode = name.partition(":")
    options: dict[str, Any] = {"lr": LR, "rank": rank, "rule": "adamw8bit", "refresh_every": INTERVAL}
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
