"""Short runs of the three paper configurations on real rows: the loss falls, and a killed run resumes exactly.

Each task is trained twice with the same seed on the embedded model: once without interruption, once killed with
SIGKILL after its first checkpoint and started again. The logged losses must be equal to the last printed digit.

    python scripts/prepare_data.py                # once; --source DIR for a local folder
    python benchmarks/resume.py                   # writes results/resume.json
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from e2e_training_loss import ROOT, environment

CLI = Path(sys.executable).parent / "llamafactory-cli"
FOLDER = ROOT / "saves" / "resume"
SMALL = (
    "model_name_or_path=models/SmolLM2-135M-Instruct template=chatml pure_bf16=false optim=adamw_torch rank=16 "
    "alpha=32 logging_steps=1 preprocessing_num_workers=1 max_samples=500 warmup_k=5"
).split()


def command(task: str, steps: int, out: Path) -> list[str]:
    """Return the command line of one run: the paper's configuration with the small model's overrides."""
    overrides = [*SMALL, f"max_steps={steps}", f"save_steps={steps // 2}", f"output_dir={out}"]
    return [str(CLI), "train", f"yaml_configs/crosslore_{task}.yaml", *overrides]


def losses(out: Path) -> list[str]:
    """Return the logged losses as printed, by step."""
    lines = (out / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    by_step = {row["current_steps"]: str(row["loss"]) for row in rows if "loss" in row}
    return [by_step[step] for step in sorted(by_step)]


def killed_run(task: str, steps: int, out: Path) -> int:
    """Start a run, kill it a moment after its first checkpoint, and return the last step that it had logged."""
    process = subprocess.Popen(command(task, steps, out), cwd=ROOT, start_new_session=True)
    state = out / f"checkpoint-{steps // 2}" / "trainer_state.json"
    while not state.exists() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(5)  # some steps beyond the checkpoint, which the resumed run has to do again
    if process.poll() is not None:
        raise RuntimeError(f"the {task} run ended with {process.returncode} before it could be killed. See its output.")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return len(losses(out))


def check(task: str, steps: int) -> dict[str, Any]:
    """Run one task both ways and compare."""
    whole, killed = FOLDER / f"{task}_whole", FOLDER / f"{task}_killed"
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(command(task, steps, whole), cwd=ROOT, check=True)
    killed_at = killed_run(task, steps, killed)
    subprocess.run(command(task, steps, killed), cwd=ROOT, check=True)
    first, second = losses(whole), losses(killed)
    third = len(first) // 3
    values = [float(loss) for loss in first]
    shutil.rmtree(FOLDER)
    return {
        "command": "llamafactory-cli " + " ".join(command(task, steps, Path("OUT"))[1:]),
        "losses": first,
        "mean_loss_first_third": statistics.fmean(values[:third]),
        "mean_loss_last_third": statistics.fmean(values[-third:]),
        "killed_after_step": killed_at,
        "resumed_from_step": steps // 2,
        "losses_after_resume_equal": first[steps // 2 :] == second[steps // 2 :],
    }


def main() -> int:
    """Check all tasks; return 1 if a resumed run differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="gsm8k, mawps, e2e (default: all); others are kept")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "resume.json")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    if options.tasks and options.output.is_file():
        results = json.loads(options.output.read_text(encoding="utf-8"))["tasks"]
    for task in options.tasks or ("gsm8k", "mawps", "e2e"):
        results[task] = check(task, options.steps)
        text = json.dumps({"environment": environment(), "tasks": results}, indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")
    for task, result in results.items():
        print(
            f"{task:6} mean loss {result['mean_loss_first_third']:.3f} -> {result['mean_loss_last_third']:.3f}, "
            f"killed after step {result['killed_after_step']}, equal: {result['losses_after_resume_equal']}"
        )
    return 0 if all(result["losses_after_resume_equal"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
