"""Training step of a LLaMA2-7B with random weights in bf16: LoRA, GaLore, CrossLore, APOLLO on one GPU.

    python benchmarks/train_7b.py                    # needs a CUDA device with 24 GB or more; nothing is downloaded
    python benchmarks/train_7b.py --tiny --device cpu  # the same code on a tiny model, for tests

Batch 1 x 256 tokens, rank 128, gradient checkpointing off, each method in a process of its own. GaLore, CrossLore and
APOLLO step inside backward (layerwise): GaLore as its package does it, one optimizer for each weight. Written to
results/benchmarks/train_7b.json, one row as soon as it is finished; rows that are there are not measured again unless
--fresh. Out of memory is a row.

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

METHODS = ("lora", "galore-torch", "galore", "crosslore", "crosslore_plus", "apollo")
INTERVAL, RANK, LR = 200, 128, 1e-6
# LLaMA2-7B's own sizes; the tiny one for tests.
FULL = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def main() -> int:
    """Measure the methods one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for tests")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas (default: all)")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10, help="ordinary steps that are measured (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "train_7b.json")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a child process measures
    args = parser.parse_args()
    if unknown := set(args.methods.split(",")) - set(METHODS):
        parser.error(f"unknown methods {', '.join(sorted(unknown))}. Known: {', '.join(METHODS)}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here. Run it on a machine with one, or use --tiny --device cpu.")
    if args.one:
        print(json.dumps(measured(args.one, args)))
        return 0
    rows = {} if args.fresh or not args.out.exists() else json.loads(args.out.read_text(encoding="utf-8"))
    for method in args.methods.split(","):
        key = f"{method}, {args.tokens} tokens"
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

    sizes = TINY if args.tiny else FULL
    config = LlamaConfig(**sizes, vocab_size=256 if args.tiny else 32000, use_cache=False)
    torch.manual_seed(0)
    with torch.device(args.device):
        model: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16)
    rank = 8 if args.tiny else RANK
    model, step = SETUPS[method](model, rank) if method in SETUPS else ours(model, method, rank)
    tokens = torch.randint(config.vocab_size, (1, args.tokens), device=args.device)

    def once() -> float:
        synchronize(args.device)
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        step()
        synchronize(args.device)
        return time.perf_counter() - start

    first = once()
    for _ in range(2):
        once()
    ordinary = statistics.median(once() for _ in range(args.steps))
    fitting = max(0.0, first - ordinary) if method != "lora" else 0.0
    total = ordinary + fitting / INTERVAL
    row = {
        "status": "ok", "method": method, "tokens": args.tokens, "ordinary_seconds": ordinary, "first_seconds": first,
        "amortised_seconds": total, "fitting_share": fitting / INTERVAL / total,
        "environment": environment(Options(out=Path(), device=args.device, dtype="bfloat16")),
    }  # fmt: skip
    if args.device == "cuda":
        row["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return row


Setup = tuple[nn.Module, Callable[[], None]]


def ours(model: nn.Module, preset: str, rank: int) -> Setup:
    """One of our presets, layerwise, moments in 8 bits."""
    from crosslore import create_optimizer

    options = {"lr": LR, "rank": rank, "rule": "adamw8bit", "refresh_every": INTERVAL}
    optimizer = create_optimizer(model, preset, layerwise=True, **options)
    return model, optimizer.step  # type: ignore[return-value]


def lora(model: nn.Module, rank: int) -> Setup:
    """Peft's LoRA on all linear layers, fp32 adapters, torch's AdamW."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return wrapped, step


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


SETUPS = {"lora": lora, "galore-torch": galore_torch}

if __name__ == "__main__":
    sys.exit(main())
