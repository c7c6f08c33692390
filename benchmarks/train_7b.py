"""Training steps of LLaMA2-7B and 13B with random weights in bf16, every method beside LoRA, on one GPU.

    python benchmarks/train_7b.py                             # needs a CUDA device with 24 GB or more; no download
    python benchmarks/train_7b.py --rank 16 --tokens gsm8k,gsm8k+checkpointing
    python benchmarks/train_7b.py --model 13b --tokens 2048+checkpointing
    python benchmarks/train_7b.py --tiny --device cpu         # the same code on a tiny model, for tests

Batch 1, each method in a process of its own. `gsm8k` is the lengths of that data set's rows, one after another. Ours
have 8-bit moments and refresh all bases together; `crosslore:compact` is `gradients="compact"`, `:deferred` that with
deferred weights, and without a colon they are layerwise. GaLore steps inside backward as its package does it, one
optimizer for each weight; so it does in LLaMA-Factory. Written to results/benchmarks/train_7b.json, a method as soon as
it is finished; rows that are there are not measured again unless --fresh. Out of memory is a row.

A row: seconds of an ordinary step (median; over GSM8K's lengths the mean), seconds that fitting every basis once adds
to a step, the mean over an interval of 200 steps that follows from both, the share of fitting in it, peak GiB allocated
and reserved, of ordinary steps and of the first one; in the first row of a method, the seconds that the kernels of one
step take on the device, whatever the processor beside it costs. Fitting is measured after a model of one layer has
warmed the device up. An exact SVD of every weight takes minutes: for the two methods that do it, it is measured on a
model of two layers of the same shape and multiplied (`fitting_layers`), and the whole model gets bases that cost
nothing.
"""

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Options, environment
from train_7b_models import INTERVAL, SIZES, Training, free_bases

PRESETS = ("crosslore", "crosslore_plus", "galore", "apollo")
MODES = ("layerwise", "compact", "compact-layerwise", "deferred")
METHODS = (
    "lora", "dora", "adamw", "adamw8bit", "badam", "galore-torch", "galore", "apollo", "crosslore", "crosslore_plus",
    *(f"{preset}:{mode}" for preset in ("crosslore", "crosslore_plus") for mode in MODES[1:]),
)  # fmt: skip
# Tokens of GSM8K's 7473 training rows (prompt and solution, SmolLM2's tokenizer): the middles of 20 equal parts.
GSM8K_LENGTHS = (176, 275, 234, 210, 103, 250, 184, 125, 131, 169, 144, 156, 138, 317, 151, 220, 163, 116, 201, 192)
# Those without a basis, and those that fit it by an exact SVD: to how many layers.
NOTHING_TO_FIT = ("lora", "dora", "adamw", "adamw8bit", "badam")
EXACT_SVD, SVD_LAYERS = ("galore-torch", "galore"), 2
GIB = 2**30
CHECKPOINTING = "+checkpointing"

Row = dict[str, Any]  # Any: JSON


def main() -> int:
    """Measure the methods one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=tuple(SIZES), default="7b")
    parser.add_argument("--tiny", action="store_const", dest="model", const="tiny", help="a tiny model, for tests")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas (default: all)")
    parser.add_argument(
        "--tokens",
        default="256",
        help="numbers, or gsm8k, with commas; each may end in +checkpointing (default: %(default)s)",
    )
    parser.add_argument("--rank", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="ordinary steps that are measured (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "train_7b.json")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    args = parser.parse_args()
    if unknown := set(args.methods.split(",")) - set(METHODS):
        parser.error(f"unknown methods {', '.join(sorted(unknown))}. Known: {', '.join(METHODS)}.")
    plain = [tokens.removesuffix(CHECKPOINTING) for tokens in args.tokens.split(",")]
    if not all(tokens == "gsm8k" or tokens.isdigit() for tokens in plain):
        parser.error(f"--tokens must be numbers or gsm8k, each alone or with {CHECKPOINTING}, got {args.tokens!r}.")
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


def measured(method: str, settings: list[str], args: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """Yield the row of each number of tokens."""
    plain = {one: one.removesuffix(CHECKPOINTING) for one in settings}
    lengths = {k: GSM8K_LENGTHS if one == "gsm8k" else (int(one),) * args.steps for k, one in plain.items()}
    longest = max(lengths[settings[0]])
    Training(method, args, layers=1).first(longest)  # kernels are compiled, libraries loaded
    fitted_layers, fitting = SIZES[args.model]["num_hidden_layers"], None
    if method in EXACT_SVD:
        first, later = Training(method, args, layers=SVD_LAYERS).first(longest)
        fitted_layers, fitting = SVD_LAYERS, (first - later) * fitted_layers / SVD_LAYERS
    release(args.device)
    if args.device == "cuda" and (left := torch.cuda.memory_allocated() / GIB) > 0.1:
        raise RuntimeError(f"{left:.2f} GiB of the warm-up are still there: the peaks would contain them")
    training = Training(method, args)
    training.checkpointing(settings[0] != plain[settings[0]])
    with free_bases() if method in EXACT_SVD else nullcontext():
        first, later = training.first(longest)
    first_peak = peak_gib(args.device)
    if fitting is None:
        fitting = 0.0 if method in NOTHING_TO_FIT else max(0.0, first - later)
    for one in settings:
        training.checkpointing(one != plain[one])
        release(args.device)
        for length in lengths[one][:5]:
            training.once(length)
        times = [training.once(length) for length in lengths[one]]
        ordinary = statistics.fmean(times) if plain[one] == "gsm8k" else statistics.median(times)
        peak = peak_gib(args.device)
        device = {"device_seconds": training.on_device(max(lengths[one]))} if args.device == "cuda" else {}
        total = ordinary + fitting / INTERVAL
        yield one, {
            "status": "ok", "method": method, "model": args.model, "rank": args.rank, "tokens": one,
            "ordinary_seconds": ordinary, "fitting_seconds": fitting, "fitting_layers": fitted_layers,
            "amortised_seconds": total, "fitting_share": fitting / INTERVAL / total,
            **(device if one == settings[0] else {}),
            **{f"peak_{kind}": gib for kind, gib in peak.items()},
            **{f"first_peak_{kind}": gib for kind, gib in first_peak.items() if one == settings[0]},
            "environment": environment(Options(out=Path(), device=args.device, dtype="bfloat16")),
        }  # fmt: skip


def release(device: str) -> None:
    """Give unused memory back and begin a new peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> dict[str, float]:
    """Return the peaks since `release`; nothing on a CPU."""
    if device != "cuda":
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"allocated_gib": allocated / GIB, "reserved_gib": reserved / GIB}


if __name__ == "__main__":
    sys.exit(main())
