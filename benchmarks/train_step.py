"""Part e: whole training steps of SmolLM2-135M, batch 1 x 128 tokens: what full-parameter training costs beside LoRA.

Each contender is a process of its own, which loads the model and trains; they take turns, a round each, so that a slow
moment of the machine concerns all of them. Of a process:

- *ordinary*: median of the measured steps, after three others. Where refreshes are staggered (crosslore,
  crosslore_plus), every step has its share of them: 210 weights in an interval of 200 steps.
- *amortised*: over 200 steps. Staggered: the mean of the measured steps. Else ordinary + (first - ordinary) / 200, the
  first step being the one that fits all bases.
- *worst*: the slowest measured step over the ordinary one.
- *peak*: resident memory above the loaded model, most of all steps; *gradients* and *state*: bytes of `.grad` after
  backward, and of the optimizer's tensors.

*compact* and *deferred* are `gradients="compact"` without and with `weights="deferred"`. LoRA and DoRA train adapters
at all linear layers only, BAdam one layer at a time. "frozen" leaves the embeddings out as LoRA does; the paper trains
all weights. Gradient checkpointing is off.
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
from common import ENVIRONMENT, Options, Records, Row, grouped, measuring, median, of_environment, shown, write_rows
from contenders import INTERVAL, LEARNING_RATE, Skip
from torch import nn
from tqdm import tqdm

NAME = "train_step"
FIGURES = (
    "first_seconds",
    "ordinary_seconds",
    "mean_seconds",
    "worst_seconds",
    "peak_mib",
    "gradient_mib",
    "state_mib",
)
RAW = ("contender", "rank", "round", *FIGURES, "note")
SUMMARY = (
    "contender", "rank", "status", "ordinary_seconds", "amortised_seconds", "over_lora", "over_adamw", "worst",
    "peak_mib", "gradient_mib", "state_mib", "rounds",
)  # fmt: skip
WARM_UP = 3
LORA = "LoRA"
ADAMW = "torch AdamW foreach"

Setup = tuple[nn.Module, torch.optim.Optimizer]


def adamw(model: nn.Module, rank: int, **options: Any) -> Setup:
    """All weights, by torch's own."""
    return model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, **options)


def adamw8bit(model: nn.Module, rank: int) -> Setup:
    """The one of bitsandbytes, all weights."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise Skip("bitsandbytes is not installed") from error
    return model, AdamW8bit(model.parameters(), lr=LEARNING_RATE)


def lora(model: nn.Module, rank: int, **options: Any) -> Setup:
    """Peft's adapters at all linear layers, torch's AdamW."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    wrapped = get_peft_model(model, config)
    return wrapped, torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)


def linear_groups(model: nn.Module, low: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the groups of galore-torch and apollo-torch: linear layers with their options, the rest without."""
    linear = {id(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}
    weights = list(model.parameters())
    return [
        {"params": [p for p in weights if id(p) not in linear]},
        {"params": [p for p in weights if id(p) in linear], **low},
    ]


def galore_torch(model: nn.Module, rank: int) -> Setup:
    """The package of GaLore's authors, AdamW."""
    try:
        from galore_torch import GaLoreAdamW
    except ImportError as error:
        raise Skip("galore-torch is not installed") from error
    low = {"rank": rank, "update_proj_gap": INTERVAL, "scale": 0.25, "proj_type": "std"}
    return model, GaLoreAdamW(linear_groups(model, low), lr=LEARNING_RATE, no_deprecation_warning=True)


def apollo_torch(model: nn.Module, rank: int) -> Setup:
    """The package of APOLLO's authors."""
    try:
        from apollo_torch import APOLLOAdamW
    except ImportError as error:
        raise Skip("apollo-torch is not installed") from error
    low = {"rank": rank, "proj": "random", "scale_type": "channel", "scale": 1.0, "update_proj_gap": INTERVAL,
           "proj_type": "std"}  # fmt: skip
    return model, APOLLOAdamW(linear_groups(model, low), lr=LEARNING_RATE)


def badam(model: nn.Module, rank: int) -> Setup:
    """The package of BAdam's authors: one transformer layer at a time, as LLaMA-Factory sets it up."""
    try:
        from badam import BlockOptimizer
    except ImportError as error:
        raise Skip("badam is not installed") from error
    base = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    named = list(model.named_parameters())
    return model, BlockOptimizer(base, named, switch_block_every=50, switch_mode="ascending", verbose=0)


def ours(model: nn.Module, rank: int, preset: str, mode: str) -> Setup:
    """One of our presets; a residual that starts at once."""
    from crosslore import create_optimizer

    gradients, _, frozen = mode.partition(" ")
    options: dict[str, Any] = {"embeddings": "frozen"} if frozen else {}
    if preset == "crosslore":
        options["warmup_steps"] = 1
    if gradients == "deferred":
        gradients, options["weights"] = "compact", "deferred"
    settings = {"lr": LEARNING_RATE, "rank": rank, "refresh_every": INTERVAL, "gradients": gradients}
    return model, create_optimizer(model, preset, **settings, **options)


# How gradients come; "frozen": without the embeddings, as LoRA.
OURS = {
    "crosslore": (
        "full", "layerwise", "compact", "compact-layerwise", "compact frozen", "compact-layerwise frozen",
        "deferred frozen",
    ),
    "crosslore_plus": (
        "compact", "compact-layerwise", "compact frozen", "compact-layerwise frozen", "deferred", "deferred frozen",
    ),
}  # fmt: skip
SETUPS: dict[str, Callable[..., Setup]] = {
    ADAMW: adamw,
    "torch AdamW fused": lambda model, rank: adamw(model, rank, fused=True),
    "bitsandbytes AdamW8bit": adamw8bit,
    LORA: lora,
    "DoRA": lambda model, rank: lora(model, rank, use_dora=True),
    "galore-torch": galore_torch,
    "apollo-torch": apollo_torch,
    "BAdam": badam,
    **{
        f"{preset} {mode}": lambda model, rank, p=preset, m=mode: ours(model, rank, p, m)
        for preset, modes in OURS.items()
        for mode in modes
    },
}
# Those whose time does not depend on the rank are measured once.
WITHOUT_RANK = (ADAMW, "torch AdamW fused", "bitsandbytes AdamW8bit", "BAdam")


def run(options: Options) -> None:
    """Measure what is missing and write OUT/train_step.csv."""
    with measuring(NAME, RAW, options, summarise) as records:
        ranks = options.pick(full=(16, 128), quick=(16,), tiny=(4,))
        wanted = [(name, rank) for rank in ranks for name in SETUPS if name not in WITHOUT_RANK or rank == ranks[0]]
        if options.contenders:
            wanted = [(name, rank) for name, rank in wanted if name in options.contenders]
        rounds = range(options.pick(full=3, quick=2, tiny=1))
        missing = [
            (index, name, rank)
            for index in rounds
            for name, rank in wanted
            if not records.select(contender=name, rank=rank, round=index)
        ]
        for index, name, rank in tqdm(missing, desc=NAME, disable=None):
            records.append(contender=name, rank=rank, round=index, **in_process(name, rank, options))


def in_process(name: str, rank: int, options: Options) -> Row:
    """Return the figures of one contender, measured in a fresh process."""
    child = {"name": name, "rank": rank, "profile": options.profile, "device": options.device, "dtype": options.dtype,
             "threads": options.threads}  # fmt: skip
    done = subprocess.run([sys.executable, __file__, json.dumps(child)], capture_output=True, text=True)
    if done.returncode == 0:
        row: Row = json.loads(done.stdout.splitlines()[-1])
        return row
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return {"note": f"failed: {last[0][:200]}"}


def measured(name: str, rank: int, options: Options) -> Row:
    """Return the figures of one contender; this process does nothing else."""
    import real_model

    torch.set_num_threads(options.threads)
    batch = real_model.random_batch(options)
    model = real_model.load_model(options)
    model.config.use_cache = False
    base = reset_peak(options.device)
    try:
        model, optimizer = SETUPS[name](model, rank)
    except Skip as reason:
        return {"note": f"skipped: {reason}"}
    steps, gradients = [], 0
    for _ in range(1 + WARM_UP + options.pick(full=10, quick=5, tiny=2)):
        start = time.perf_counter()
        model(**batch).loss.backward()
        paused = time.perf_counter()
        gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
        start += time.perf_counter() - paused
        optimizer.step()
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()
        steps.append(time.perf_counter() - start)
    later = steps[1 + WARM_UP :]
    state = sum(
        t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)
    )
    return {
        "first_seconds": steps[0],
        "ordinary_seconds": statistics.median(later),
        "mean_seconds": statistics.fmean(later),
        "worst_seconds": max(later),
        "peak_mib": (peak(options.device) - base) / 2**20,
        "gradient_mib": gradients / 2**20,
        "state_mib": state / 2**20,
    }


def reset_peak(device: str) -> int:
    """Return the bytes in use, and let the peak start from there."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def peak(device: str) -> int:
    """Return the most bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def summarise(records: Records, options: Options) -> None:
    """Write one row for each contender and rank: medians over rounds."""
    rows = []
    for session in filter(None, records.sessions().values()):
        found = {key: summary(mine) for key, mine in grouped(session, "contender", "rank").items()}
        base = found.get((ADAMW, min((rank for _, rank in found), key=int)), {}).get("amortised_seconds")
        for (_, rank), row in found.items():
            lora_seconds = found.get((LORA, rank), {}).get("amortised_seconds")
            others = {"over_lora": None if row["contender"] in WITHOUT_RANK else lora_seconds, "over_adamw": base}
            if row["status"] == "ok":
                row |= {c: shown(float(row["amortised_seconds"]) / float(o)) for c, o in others.items() if o}
            rows.append(row)
    write_rows(options.out / f"{NAME}.csv", rows, (*SUMMARY, *ENVIRONMENT))


def summary(rows: list[Row]) -> Row:
    """Return the medians of one contender at one rank."""
    first = rows[0]
    good = [row for row in rows if not row.get("note")]
    row: Row = {"contender": first["contender"], "rank": first["rank"], "status": "ok", "rounds": len(good)}
    if not good:
        return {**row, "status": first.get("note"), **of_environment(rows)}
    figures = {name: median(good, name) or 0.0 for name in FIGURES}
    staggered = str(first["contender"]).startswith("crosslore")
    fitted = str(first["contender"]) in ("galore-torch", "apollo-torch")
    ordinary = figures["ordinary_seconds"]
    extra = max(0.0, figures["first_seconds"] - ordinary) / INTERVAL if fitted else 0.0
    row["amortised_seconds"] = shown(figures["mean_seconds"] if staggered else ordinary + extra)
    row["worst"] = shown(statistics.median(float(r["worst_seconds"]) / float(r["ordinary_seconds"]) for r in good))
    row |= {name: shown(figures[name]) for name in ("ordinary_seconds", "peak_mib", "gradient_mib", "state_mib")}
    return {**row, **of_environment(rows)}


def main() -> None:
    """Measure one contender for `in_process`."""
    parser = argparse.ArgumentParser(description="One contender of part e; see `run.py --only e`.")
    parser.add_argument("child", help="JSON")
    child = json.loads(parser.parse_args().child)
    name, rank = child.pop("name"), child.pop("rank")
    print(json.dumps(measured(name, rank, Options(out=Path(), **child))))


if __name__ == "__main__":
    main()
