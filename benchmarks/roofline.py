"""Roofline of a training step: how close it is to what the machine can move and multiply.

    python benchmarks/roofline.py                        # SmolLM2-135M, 1 x 128 tokens, CPU; a minute if it is idle
    python benchmarks/roofline.py --device cuda --dtype bfloat16 --out FILE

Measured in one run, medians: bandwidth of a copy (bytes read and written), rate of a matrix product of a layer's
shape, `optimizer.step()` and the whole step of `crosslore_plus` with compact gradients and frozen embeddings, direct
and deferred. Counted from shapes, for the same step:

- bytes that `optimizer.step()` must move: each low-rank weight read and written once (not with deferred weights), its
  compact tensors (R, two moments, update) read and written, its basis read;
- operations of the whole step: three products with every linear layer's weight less the one of its gradient, and the
  thin products of the compact gradient.

`share` is the time that these bytes or operations take at the measured rate over the measured time: 1 is the roof.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import real_model
import torch
from common import ROOT, Options, environment, synchronize
from torch import nn

RANKS = (16, 128)
REPEATS = 7
# Elements of the copied tensor: larger than any cache.
COPIED = 2**26


def seconds(run: Callable[[], object], device: str, *, repeats: int = REPEATS) -> float:
    """Return the median time of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_bandwidth(options: Options) -> float:
    """Return bytes per second of a copy, those that are read and those that are written."""
    source = torch.ones(COPIED, device=options.device, dtype=options.torch_dtype)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), options.device)


def product_rate(options: Options, tokens: int, rows: int, cols: int) -> float:
    """Return operations per second of a product as a linear layer does it."""
    x = torch.ones(tokens, cols, device=options.device, dtype=options.torch_dtype)
    weight = torch.ones(rows, cols, device=options.device, dtype=options.torch_dtype)
    return 2 * tokens * rows * cols / seconds(lambda: x @ weight.T, options.device)


def step_bytes(optimizer: Any, *, deferred: bool) -> int:
    """Return the bytes that `step()` must move for the low-rank weights."""
    total = 0
    for g, group in enumerate(optimizer.param_groups):
        for i, weight in enumerate(group["params"]):
            for block in optimizer.item(g, i).blocks:
                low = 4 * torch.Size(block.layout.low_shape).numel()
                basis = 4 * block.layout.rank * sum(weight.shape) - low
                pending = 2 * low if deferred else 2 * weight.nbytes + basis
                # R is read; both moments are read and written; N_t is written and read.
                total += pending + 7 * low
    return total


def step_operations(model: nn.Module, optimizer: Any, tokens: int) -> int:
    """Return the operations of forward and backward in linear layers, gradients of low-rank weights compact."""
    low = {id(p): (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])}
    total = 0
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        rows, cols = module.weight.shape
        total += 4 * tokens * rows * cols  # y and the gradient of x
        if id(module.weight) not in low:
            continue
        blocks = optimizer.item(*low[id(module.weight)]).blocks
        total += sum(2 * tokens * block.layout.rank * (rows + cols) for block in blocks) or 2 * tokens * rows * cols
    return total


def row(rank: int, weights: str, options: Options, rates: dict[str, float]) -> dict[str, Any]:  # Any: JSON
    """Return what one configuration took and should take."""
    from crosslore import create_optimizer

    model = real_model.load_model(options)
    model.config.use_cache = False
    batch = real_model.random_batch(options)
    tokens = batch["input_ids"].numel()
    optimizer = create_optimizer(
        model, "crosslore_plus", lr=1e-6, rank=rank, gradients="compact", weights=weights, embeddings="frozen",
        refresh_every=10**6,
    )  # fmt: skip

    def backward() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()

    def whole() -> None:
        backward()
        optimizer.step()

    whole()
    steps, wholes = [], []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        backward()
        synchronize(options.device)
        middle = time.perf_counter()
        optimizer.step()
        synchronize(options.device)
        steps.append(time.perf_counter() - middle)
        wholes.append(time.perf_counter() - start)
    moved, operations = step_bytes(optimizer, deferred=weights == "deferred"), step_operations(model, optimizer, tokens)
    step, total = statistics.median(steps[1:]), statistics.median(wholes[1:])
    return {
        "rank": rank, "weights": weights, "tokens": tokens,
        "step_seconds": step, "step_bytes": moved, "step_share": moved / rates["bytes_per_second"] / step,
        "whole_seconds": total, "whole_operations": operations,
        "whole_share": operations / rates["operations_per_second"] / total,
    }  # fmt: skip


def main() -> None:
    """Write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for tests")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "roofline.json")
    args = parser.parse_args()
    profile = "tiny" if args.tiny else "full"
    options = Options(out=args.out, device=args.device, dtype=args.dtype, threads=args.threads, profile=profile)
    torch.set_num_threads(args.threads)
    rates = {
        "bytes_per_second": copy_bandwidth(options),
        "operations_per_second": product_rate(options, 128, 1536, 576),
    }
    ranks = (4,) if args.tiny else RANKS
    rows = [row(rank, weights, options, rates) for rank in ranks for weights in ("direct", "deferred")]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"rates": rates, "rows": rows, "environment": environment(options)}
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{rates['bytes_per_second'] / 1e9:.1f} GB/s, {rates['operations_per_second'] / 1e9:.1f} G operations/s")
    for one in rows:
        print(
            f"rank {one['rank']}, {one['weights']}: step {one['step_seconds']:.4f} s, {one['step_share']:.2f} of the "
            f"bandwidth; whole {one['whole_seconds']:.3f} s, {one['whole_share']:.2f} of the products' rate"
        )


if __name__ == "__main__":
    main()
