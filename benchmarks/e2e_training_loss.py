"""Training loss and time per step of CrossLore, GaLore (ours and LLaMA-Factory's own) and LoRA on real E2E rows.

Each method is a run of the stock `llamafactory-cli train` with the same model, rows, order, steps and rank.

    python scripts/prepare_data.py e2e            # once; --source DIR for a local folder
    python benchmarks/e2e_training_loss.py        # writes results/e2e_training_loss.json and .png

A finished method is not run again (delete its folder under saves/e2e_training_loss to do so); an interrupted one
goes on from its last checkpoint.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("crosslore", "llamafactory", "torch", "transformers", "peft", "galore-torch", "numpy")
# What all methods share.
COMMON = {
    "model_name_or_path": "models/SmolLM2-135M-Instruct",
    "stage": "sft",
    "do_train": True,
    "dataset": "e2e_train",
    "dataset_dir": "data/prepared",
    "template": "chatml",
    "cutoff_len": 256,
    "max_samples": 2000,
    "lr_scheduler_type": "cosine",
    "optim": "adamw_torch",
    "logging_steps": 1,
    "disable_gradient_checkpointing": True,  # short rows fit easily; it would only cost time
    "save_steps": 100,
    "save_total_limit": 1,
    "report_to": "none",
    "seed": 42,
}


def methods(rank: int) -> dict[str, dict[str, Any]]:
    """Return what differs: the paper's learning rate and alpha (table 3, E2E, rank 16 and 32) for the GaLore family."""
    family = {"learning_rate": 1e-6, "rank": rank, "alpha": 32.0, "crosslore_refresh_every": 200}
    stock = {"galore_rank": rank, "galore_scale": 32.0, "galore_update_interval": 200, "galore_target": "all"}
    return {
        "crosslore": {"finetuning_type": "crosslore", "residual_ratio": 0.012, "warmup_k": 100, **family},
        "galore (ours)": {"finetuning_type": "crosslore", "crosslore_preset": "galore", **family},
        "galore (LLaMA-Factory)": {"finetuning_type": "full", "use_galore": True, "learning_rate": 1e-6, **stock},
        # The paper does not give LoRA's learning rate; 1e-4 is the one of LLaMA-Factory's examples.
        "lora": {"finetuning_type": "lora", "lora_rank": rank, "lora_target": "all", "learning_rate": 1e-4},
    }


def run_method(name: str, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one method (or take a finished run) and return its losses and times."""
    out = folder / hashlib.sha256(name.encode()).hexdigest()[:12]
    if not (out / "train_results.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        path = out / "config.yaml"
        path.write_text(json.dumps({**config, "output_dir": str(out)}, indent=1), encoding="utf-8")  # JSON is YAML
        command = [str(Path(sys.executable).parent / "llamafactory-cli"), "train", str(path)]
        print(f"--- {name}", flush=True)
        subprocess.run(command, check=True, cwd=ROOT)
    rows = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "loss" in row]
    seconds = [_seconds(row["elapsed_time"]) for row in rows]
    steady = rows[9:]
    results = json.loads((out / "train_results.json").read_text(encoding="utf-8"))
    return {
        "config": config,
        "loss": [row["loss"] for row in rows],
        "loss_last_50_mean": statistics.fmean(row["loss"] for row in rows[-50:]),
        "train_loss_mean": results["train_loss"],
        "seconds_per_step": results["train_runtime"] / len(rows),
        "seconds_per_step_without_first_10": (seconds[-1] - seconds[9]) / (len(steady) - 1),
        "seconds_of_first_step": seconds[0],
    }


def _seconds(text: str) -> int:
    hours, minutes, seconds = (int(part) for part in text.split(":"))
    return 3600 * hours + 60 * minutes + seconds


def environment() -> dict[str, Any]:
    """Return what the numbers depend on."""
    data = ROOT / "data" / "prepared" / "e2e_train.jsonl"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": f"CPU, {os.cpu_count()} cores",
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
    }


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the losses, a moving average over 20 steps, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, result in results.items():
        losses, width = result["loss"], 20
        smooth = [statistics.fmean(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]
        axes.plot(range(1, len(losses) + 1), smooth, label=name)
    axes.set(xlabel="step", ylabel="training loss (mean of 20 steps)", title="SmolLM2-135M on E2E")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    """Run all methods and write the result file after each one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "e2e_training_loss.json")
    options = parser.parse_args()
    if not (ROOT / "data" / "prepared" / "e2e_train.jsonl").is_file():
        parser.error("data/prepared/e2e_train.jsonl is not there. Run: python scripts/prepare_data.py e2e")
    results: dict[str, dict[str, Any]] = {}
    folder = ROOT / "saves" / "e2e_training_loss"
    for name, special in methods(options.rank).items():
        size = {"max_steps": options.steps, "per_device_train_batch_size": options.batch_size}
        results[name] = run_method(name, {**COMMON, **size, **special}, folder)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"environment": environment(), "methods": results}, indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")
        draw(results, options.output.with_suffix(".png"))
    for name, result in results.items():
        print(
            f"{name:24} last 50 steps: loss {result['loss_last_50_mean']:.4f}, "
            f"{result['seconds_per_step']:.2f} s a step (first step {result['seconds_of_first_step']} s)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
