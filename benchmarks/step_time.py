"""Seconds of a whole training step and of the optimizer alone, all methods interleaved in one process.

Interleaving makes the ratios fair on a machine that is not idle. Writes results/step_time.json.

    python benchmarks/step_time.py
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from e2e_training_loss import ROOT, environment
from galore_torch.adamw import AdamW as GaLoreAdamW
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from crosslore import create_optimizer
from crosslore.targets import select_targets

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"


def stock_galore(model: nn.Module, rank: int) -> torch.optim.Optimizer:
    """Return the optimizer that LLaMA-Factory builds for `use_galore`, from the package galore-torch."""
    low = [module.weight for module in select_targets(model, "all-linear").values()]
    others = [p for p in model.parameters() if all(p is not weight for weight in low)]
    group = {"params": low, "rank": rank, "update_proj_gap": 200, "scale": 32.0, "proj_type": "std"}
    return GaLoreAdamW([{"params": others}, group], lr=1e-6, no_deprecation_warning=True)


def build(name: str, rank: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a fresh fp32 model and its optimizer."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).train()
    if name == "lora":
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    if name == "galore (galore-torch)":
        return model, stock_galore(model, rank)
    if name == "full AdamW":
        return model, torch.optim.AdamW(model.parameters(), lr=1e-6)
    options = {"warmup_steps": 2} if name == "crosslore" else {"scale": 32.0}
    return model, create_optimizer(model, name.split()[0], lr=1e-6, rank=rank, **options)


def main() -> int:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96, help="tokens of the one row in a batch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    names = ("crosslore", "galore (ours)", "galore (galore-torch)", "lora", "full AdamW")
    pairs = {name: build(name, options.rank) for name in names}
    torch.manual_seed(0)
    row = torch.randint(1000, 40000, (1, options.tokens))
    steps: dict[str, list[float]] = {name: [] for name in names}
    updates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, (model, optimizer) in pairs.items():
            start = time.perf_counter()
            model(input_ids=row, labels=row).loss.backward()
            middle = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            steps[name].append(time.perf_counter() - start)
            updates[name].append(time.perf_counter() - middle)
    results: dict[str, Any] = {
        name: {
            "step_seconds_median": statistics.median(steps[name][3:]),
            "optimizer_seconds_median": statistics.median(updates[name][3:]),
            "optimizer_seconds_with_refresh": updates[name][0],
            "step_seconds": steps[name],
        }
        for name in names
    }
    settings = {"rank": options.rank, "tokens": options.tokens, "dtype": "fp32", "threads": torch.get_num_threads()}
    output = Path(ROOT / "results" / "step_time.json")
    text = json.dumps({"environment": environment(), "settings": settings, "methods": results}, indent=1)
    output.write_text(text + "\n", encoding="utf-8")
    for name, result in results.items():
        print(
            f"{name:24} step {result['step_seconds_median']:.2f} s, "
            f"optimizer {result['optimizer_seconds_median']:.2f} s, "
            f"with a refresh {result['optimizer_seconds_with_refresh']:.1f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
