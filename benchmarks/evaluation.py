"""Time and memory of evaluation: generation in batches against one at a time, and all E2E metrics of a test set.

    python benchmarks/evaluation.py                  # writes results/evaluation/speed.json; a few minutes on 2 cores

Generation: SmolLM2-135M-Instruct, fp32, greedy, 50 prompts of the bundled restaurants, batch sizes 1 and 16 in turns;
outputs that differ are counted. Scoring: the E2E challenge's test set (630 examples, 4693 references) with its
baseline's outputs, read below CROSSLORE_DATA_DIR, by `crosslore-eval score`, Java's start included; the peak is the
sum over all its processes, sampled.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from common import MODEL, ROOT
from e2e_training_loss import environment

from crosslore_eval.engines import load_engine
from crosslore_eval.generate import Decoding, batches_of
from crosslore_eval.prompts import write_prompts
from crosslore_eval.tasks import find_task
from crosslore_eval.tasks.loading import DATA_VARIABLE, load_rows

PROMPTS = 50
NEW_TOKENS = 64
BATCH_SIZES = (1, 16)
SAMPLE_SECONDS = 0.02


def measure_generation(rounds: int) -> dict[str, Any]:
    """Return tokens per second by batch size, medians over rounds, and the outputs that differ."""
    task = find_task("restaurants")
    examples = task.examples(load_rows(task, task.split(None), folder=ROOT / "data"))[:PROMPTS]
    engine = load_engine("transformers", str(MODEL), device="cpu", dtype="float32")
    prompts = write_prompts(engine.tokenizer, examples, template="chatml")
    lengths = [len(tokens) for tokens in prompts.tokens]
    speeds: dict[int, list[float]] = {size: [] for size in BATCH_SIZES}
    texts: dict[int, list[str]] = {}
    for _ in range(rounds):
        for size in BATCH_SIZES:
            started = time.perf_counter()
            batches = engine.answers(prompts.tokens, batches_of(lengths, size), Decoding(max_new_tokens=NEW_TOKENS))
            answers = sorted((answer for batch in batches for answer in batch), key=lambda answer: answer.index)
            speeds[size].append(sum(answer.tokens for answer in answers) / (time.perf_counter() - started))
            texts[size] = [answer.text for answer in answers]
    one, many = BATCH_SIZES
    return {
        "prompts": PROMPTS,
        "max_new_tokens": NEW_TOKENS,
        "tokens_per_second": {size: statistics.median(found) for size, found in speeds.items()},
        "ratio": statistics.median(b / a for a, b in zip(speeds[one], speeds[many], strict=True)),
        "outputs_that_differ": sum(a != b for a, b in zip(texts[one], texts[many], strict=True)),
        "threads": torch.get_num_threads(),
    }


def tree_rss(process: psutil.Process) -> int:
    """Return the bytes that a process and its children hold."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.Error:  # ended meanwhile
            continue
    return total


def measure_scoring(rounds: int, data: Path) -> dict[str, Any]:
    """Return seconds and peak memory of scoring the E2E test set, and the scores."""
    command = [
        str(Path(sys.executable).with_name("crosslore-eval")), "score", "e2e",
        "--predictions", str(data / "e2e" / "tgen_test_output.txt"),
        "--references", str(data / "e2e" / "test_refs.txt"), "--json",
    ]  # fmt: skip
    seconds, peaks = [], []
    output = ""
    for _ in range(rounds):
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peak, watched = 0, psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, tree_rss(watched))
            except psutil.NoSuchProcess:
                break
            time.sleep(SAMPLE_SECONDS)
        output = process.communicate()[0]
        seconds.append(time.perf_counter() - started)
        peaks.append(peak / 2**30)
        if process.returncode != 0:
            raise RuntimeError(f"scoring ended with {process.returncode}. See its output.")
    found = json.loads(output)
    return {
        "examples": found["n"],
        "seconds": statistics.median(seconds),
        "peak_gib": max(peaks),
        "scores": {name: score["value"] for name, score in found["scores"].items()},
    }


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "evaluation" / "speed.json")
    args = parser.parse_args()
    data = os.environ.get(DATA_VARIABLE)
    if data is None or not (Path(data) / "e2e" / "tgen_test_output.txt").is_file():
        raise SystemExit(f"{DATA_VARIABLE} must name a folder with e2e/tgen_test_output.txt, got {data}.")
    result = {"environment": environment(), "scoring": measure_scoring(args.rounds, Path(data))}
    result["generation"] = measure_generation(args.rounds)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
