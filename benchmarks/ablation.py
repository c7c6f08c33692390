"""The ablation on real fine-tuning: one factor at a time around the paper's setting, then around the best found.

    python scripts/get_model.py && python scripts/prepare_data.py gsm8k e2e     # once
    python benchmarks/ablation.py                    # all stages; run it again and it goes on where it stopped
    python benchmarks/ablation.py --dry-run          # the runs, those done, and the time that the others need
    python benchmarks/ablation_report.py             # tables and figure from the result files

Each run is one file under results/ablation, written when it ends; a run whose configuration hash is there is not done
again. `ablation_matrix.py` says what is run, `ablation_plan.py` how learning rates and stage 2 are chosen. Plain
PyTorch, fp32, no gradient clipping; prompt and answer as LLaMA-Factory's `template: chatml` has them, loss on the
answer only.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ablation_files as files
import torch
from ablation_matrix import ADAMW, REFERENCES, TASKS, Cell, Result, Task, Variant, lr_factor, read_inputs, stage1
from ablation_plan import Plan
from ablation_report import planned
from common import MODEL, ROOT, WORKER_ENVIRONMENT
from torch import Tensor, nn

from crosslore import create_optimizer

DATA = ROOT / "data" / "prepared"
# Steps that one point of the training loss is the mean of.
LOSS_EVERY = 5
HELD_OUT_BATCH = 8
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and answer, and how many of them are the prompt's."""

    ids: list[int]
    prompt: int


@dataclass
class Bench:
    """What a worker loads once: the model, its initial weights, and the tokenised rows of each task."""

    model: nn.Module
    # (rows to draw from, held-out rows) by task name.
    rows: Mapping[str, tuple[list[Example], list[Example]]]
    initial: dict[str, Tensor] = field(init=False)
    # Held-out loss of the initial weights by task name, computed once.
    start: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Keep the initial weights."""
        self.initial = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def reset(self) -> None:
        """Give the model its initial weights back."""
        self.model.load_state_dict(self.initial)
        self.model.zero_grad(set_to_none=True)


# What `start_worker` has loaded in this process.
_bench: Bench | None = None


def load_bench(model: Path, data: Path, tasks: Sequence[Task]) -> Bench:
    """Return model and rows from the disk."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = {task.name: load_rows(task, data, tokenizer) for task in tasks}
    return Bench(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train(), rows)


def load_rows(task: Task, data: Path, tokenizer: Callable[..., Any]) -> tuple[list[Example], list[Example]]:
    """Return the rows that seeds draw from, and the held-out rows; both fit into `max_tokens`."""
    lines = (data / task.train_file).read_text(encoding="utf-8").splitlines()
    if task.held_out_file:
        held_out = (data / task.held_out_file).read_text(encoding="utf-8").splitlines()
    else:
        cut = len(lines) - max(1, len(lines) // 10)
        lines, held_out = lines[:cut], lines[cut:]
    take = ((lines, task.pool_rows), (held_out, task.held_out_rows))
    pool, fixed = (pick_rows(some, count, task.max_tokens, tokenizer) for some, count in take)
    return pool, sorted(fixed, key=lambda example: len(example.ids))  # batches of like lengths


def pick_rows(lines: list[str], count: int, max_tokens: int, tokenizer: Callable[..., Any]) -> list[Example]:
    """Return `count` examples that fit, from rows in an order that is the same for everybody."""
    from crosslore_eval.prompts import content_of, prompt_writer

    write = prompt_writer("chatml", tokenizer)
    chosen: list[Example] = []
    for i in random.Random(0).sample(range(len(lines)), len(lines)):
        row = json.loads(lines[i])
        prompt = tokenizer(write(content_of(row["instruction"], row["input"])), add_special_tokens=False)
        answer = tokenizer(f"{row['output']}<|im_end|>\n", add_special_tokens=False)
        example = Example(prompt["input_ids"] + answer["input_ids"], len(prompt["input_ids"]))
        if len(example.ids) <= max_tokens:
            chosen.append(example)
        if len(chosen) == count:
            break
    return chosen


def answer_loss(model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of the answers' tokens and their number."""
    width = max(len(e.ids) for e in examples)
    # Padding is on the right, where a causal model's other tokens do not see it.
    ids = torch.tensor([e.ids + [0] * (width - len(e.ids)) for e in examples])
    labels = torch.tensor(
        [[IGNORED] * e.prompt + e.ids[e.prompt :] + [IGNORED] * (width - len(e.ids)) for e in examples]
    )
    first = min(e.prompt for e in examples)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=width - first + 1).logits[:, :-1]
    wanted = labels[:, first:].reshape(-1)
    total = nn.functional.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=IGNORED, reduction="sum")
    return total, int((wanted != IGNORED).sum())


@torch.no_grad()
def held_out_loss(model: nn.Module, examples: Sequence[Example]) -> float:
    """Return the mean cross-entropy of the answers' tokens."""
    parts = [answer_loss(model, examples[i : i + HELD_OUT_BATCH]) for i in range(0, len(examples), HELD_OUT_BATCH)]
    return sum(float(total) for total, _ in parts) / sum(count for _, count in parts)


def build_optimizer(model: nn.Module, variant: Variant, *, lr: float, seed: int) -> torch.optim.Optimizer:
    """Return the variant's optimizer."""
    if variant.preset == ADAMW:
        return torch.optim.AdamW(model.parameters(), lr=lr, **{"weight_decay": 0.0, **variant.fields})
    return create_optimizer(model, variant.preset, lr=lr, seed=seed, **variant.fields)


def train(bench: Bench, cell: Cell, record: Result) -> None:
    """Train from the initial weights and write losses and times into `record`; stops at a loss that is not finite."""
    task, (pool, held_out) = cell.task, bench.rows[cell.task.name]
    bench.reset()
    if task.name not in bench.start:
        bench.start[task.name] = held_out_loss(bench.model, held_out)
    record["held_out"]["start"] = bench.start[task.name]
    optimizer = build_optimizer(bench.model, cell.variant, lr=cell.lr, seed=cell.seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, task.steps))
    order = random.Random(cell.seed).sample(range(len(pool)), task.steps * task.batch_size)
    times, losses = [], []
    for step in range(1, task.steps + 1):
        started = time.perf_counter()
        total, count = answer_loss(bench.model, [pool[i] for i in order[-task.batch_size :]])
        del order[-task.batch_size :]
        losses.append(total.item() / count)
        record["steps"] = step
        if not math.isfinite(losses[-1]):
            record["status"] = "diverged"
            return
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        times.append(time.perf_counter() - started)
        record["seconds_per_step"] = statistics.fmean(times)
        if step % LOSS_EVERY == 0 or step == task.steps:
            recent = losses[-((step - 1) % LOSS_EVERY + 1) :]
            record["losses"].append({"step": step, "mean_loss": statistics.fmean(recent)})
    record["held_out"]["end"] = held_out_loss(bench.model, held_out)
    record["seconds_per_step_median"] = statistics.median(times)
    record["status"] = "ok" if math.isfinite(record["held_out"]["end"]) else "diverged"


def run_cell(bench: Bench, cell: Cell, folder: Path) -> Result:
    """Do one run and write its file; a failure is a result too."""
    record, started = files.new_record(cell), time.perf_counter()
    files.reset_peak_rss()
    try:
        train(bench, cell, record)
    except Exception as error:  # of any kind: it ends in the result file and in the table
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    record |= {"seconds": time.perf_counter() - started, "peak_rss_gib": files.peak_rss_gib()}
    files.write_result(record, folder / cell.file_name)
    return record


def start_worker(load: Callable[..., Bench], arguments: Sequence[Any]) -> None:
    """Load once what all runs of this process need."""
    global _bench
    torch.set_num_threads(1)
    _bench = load(*arguments)


def work(cell: Cell, folder: Path) -> Result:
    """Do a run with what `start_worker` has loaded."""
    assert _bench is not None
    return run_cell(_bench, cell, folder)


def run_variants(
    plan: Plan,
    variants: Sequence[Variant],
    results: dict[str, Result],
    submit: Callable[[Cell], Future[Result]],
    workers: int = 1,
    deadline: float = math.inf,
    label: str = "runs",
) -> None:
    """Do all runs of these variants that `results` does not hold, and add theirs; `submit` starts one.

    At most `workers` at the same time, and none is started after `deadline` (of `time.monotonic()`).
    """
    from tqdm import tqdm

    running: dict[Future[Result], str] = {}
    with tqdm(total=plan.remaining(variants, results).total(), desc=label, unit="run", smoothing=0) as bar:
        while True:
            for cell in plan.ready(variants, results):
                if cell.hash not in running.values() and len(running) < workers and time.monotonic() < deadline:
                    running[submit(cell)] = cell.hash
            if not running:
                return
            future = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            result = future.result()
            results[running.pop(future)] = result
            bar.update()
            bar.total = bar.n + plan.remaining(variants, results).total()
            bar.write(files.line(result))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), help="only this stage (all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds for each variant at its best rate (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes side by side (%(default)s)")
    parser.add_argument("--budget-minutes", type=float, default=math.inf, help="start no run after so many minutes")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and the time that they need")
    parser.add_argument("--retry-failed", action="store_true", help="do runs again that failed (not: diverged)")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the model (%(default)s)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the rows (%(default)s)")
    parser.add_argument("--output", type=Path, default=files.RESULTS, help="folder of the result files (%(default)s)")
    return parser.parse_args(argv)


def run_stages(plan: Plan, results: dict[str, Result], options: argparse.Namespace, *, deadline: float) -> None:
    """Do what is missing of the stages that the options name."""
    os.environ |= WORKER_ENVIRONMENT
    load = (options.model, options.data, plan.tasks)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, start_worker, (load_bench, load)) as pool:

        def submit(cell: Cell) -> Future[Result]:
            return pool.submit(work, cell, options.output)

        try:
            for stage in (options.stage,) if options.stage else (1, 2, 3):
                if time.monotonic() < deadline:
                    variants = {1: stage1, 2: lambda: plan.stage2(results), 3: lambda: REFERENCES}[stage]()
                    run_variants(plan, variants, results, submit, options.workers, deadline, f"stage {stage}")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 when the plan or the budget is at its end, 1 with a message, 130 after Ctrl-C."""
    options = parse(argv)
    deadline = time.monotonic() + 60 * options.budget_minutes
    try:
        plan = Plan(inputs=read_inputs(options.model, options.data, TASKS), seeds=options.seeds)
        results = files.read_results(options.output, failed=not options.retry_failed)
        if options.dry_run:
            print(planned(plan, results, workers=options.workers))
            return 0
        run_stages(plan, results, options, deadline=deadline)
    except (LookupError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        print("error: a worker ended. Without a reason above: killed, mostly for memory; --workers 1.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted. Run it again: finished runs are kept.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
