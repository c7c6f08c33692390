"""What the ablation runs, as data: tasks, variants, learning rates, seeds; and what follows from finished runs.

Stage 1 changes one factor at a time of the paper's setting (`paper`) and adds reference lines. Stage 2 puts the winning
value of every factor together (`best`) and takes one winner at a time back to the paper's value. It reads the winners
from stage 1's results, so nothing is edited between the two.

Every variant is run at each learning rate of one grid with the first seed; the rate with the lowest held-out loss at
the end is then run with the other seeds. Two cells with the same configuration are one run, whatever their names.
"""

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from crosslore.config import LowRankConfig
from crosslore.presets import get_preset, rule_options
from crosslore.registry import unknown_name

Result = dict[str, Any]  # Any: what a JSON result file holds
Fields = Mapping[str, Any]  # Any: fields of LowRankConfig and rule options

# Full-rank torch.optim.AdamW, which is no preset.
ADAMW = "adamw"
# Part of every run: linear warm-up over so many steps, then linear decay to 0.
LR_WARMUP_STEPS = 5
# Of all weights; the low-rank update has `scale` times it. `paper` after 8 steps of E2E: loss 1.78, 1.68, 1.90.
LRS = (1e-5, 3e-5, 1e-4)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows to train on and rows that are held out, and how much of them a run takes."""

    name: str
    train_file: str
    # None: the last rows of `train_file`, on which nobody trains. Never a test set: stage 2 chooses by these rows.
    held_out_file: str | None = None
    steps: int
    batch_size: int
    # Longer rows are left out, in training and held out alike.
    max_tokens: int
    held_out_rows: int
    # Rows that seeds draw from, evenly spaced in the file.
    pool_rows: int = 2000


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table: a preset with overrides, or full-rank AdamW."""

    name: str
    preset: str = "crosslore"
    fields: Fields = field(default_factory=dict)


# Sized so that both stages take about three hours of two cores.
TASKS = (
    Task(
        name="e2e",
        train_file="e2e_train.jsonl",
        held_out_file="e2e_dev.jsonl",
        steps=70,
        batch_size=2,
        max_tokens=96,
        held_out_rows=80,
    ),
    Task(name="gsm8k", train_file="gsm8k_train.jsonl", steps=70, batch_size=1, max_tokens=192, held_out_rows=40),
)

# The low-rank methods have rank, scale and interval in common, so that the learning rates mean the same.
COMMON: Fields = {"rank": 16, "scale": 32.0}
INTERVAL: Fields = {"refresh_every": 20}
# The paper gives neither warm-up nor interval: 10 and 20 make a short run see four refreshes and an active residual.
BASE: Fields = {**COMMON, **INTERVAL, "warmup_steps": 10}
PAPER = Variant(name="paper", fields=BASE)

# What is tried in place of the paper's value, one factor at a time.
FACTORS: Mapping[str, Mapping[str, Fields]] = {
    "residual": {"off": {"residual": None}, "exact": {"residual_rule": "exact"}},
    "select": {"residual": {"residual_select": "residual"}},
    "heads": {"own": {"cross_head_targets": None}},
    "window": {"4": {"fit_window": 4}},
    "moments": {"rotate": {"moments": "rotate"}},
    "projector": {"power": {"projector": "power", "oversampling": 0, "power_iterations": 1}},
}
# Values that were seen to help only together; they win together if their row beats each of them.
TOGETHER: Mapping[str, str] = {"residual": "exact", "select": "residual"}
TOGETHER_NAME = "residual-exact-select-residual"
REFERENCES = (
    Variant(name="galore", preset="galore", fields={**COMMON, **INTERVAL}),
    Variant(name="ldadam", preset="ldadam", fields=COMMON),
    Variant(name=ADAMW, preset=ADAMW),
    Variant(name="rank32", fields={**BASE, "rank": 32}),
)


def lr_factor(step: int, steps: int) -> float:
    """Return the factor on the learning rate at a step, counted from 0."""
    warm = min(LR_WARMUP_STEPS, max(1, steps // 2))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def combined(name: str, values: Mapping[str, str]) -> Variant:
    """Return the paper's setting with these values of the factors."""
    overrides: dict[str, Any] = dict(BASE)  # Any: as Fields
    for factor, value in values.items():
        overrides |= FACTORS[factor][value]
    return Variant(name=name, fields=overrides)


def stage1() -> list[Variant]:
    """Return the paper's setting, one variant for each other value of a factor, and the reference lines."""
    single = [combined(f"{f}-{v}", {f: v}) for f, values in FACTORS.items() for v in values]
    return [PAPER, *single, combined(TOGETHER_NAME, TOGETHER), *REFERENCES]


def resolve(variant: Variant) -> dict[str, Any]:  # Any: as Fields
    """Return what makes up a variant's optimizer: rule options, and each field that is not at its default.

    Fields at their default are left out, so that a field that is added later leaves finished runs valid.

    Raises:
        TypeError: if a field is unknown; names the variant and the near fields.
        ValueError: if the preset is unknown, or a value is out of range.
    """
    if variant.preset == ADAMW:
        return {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, **variant.fields}
    preset = get_preset(variant.preset)
    options, names = rule_options(preset), {f.name for f in fields(LowRankConfig)}
    for name in variant.fields:
        if name not in names | set(options):
            raise TypeError(f"variant {variant.name!r}: " + unknown_name("field", name, names | set(options)))
    given = {name: value for name, value in variant.fields.items() if name in names}
    config, default = replace(preset.config, **given), LowRankConfig()
    special = {n: getattr(config, n) for n in sorted(names) if getattr(config, n) != getattr(default, n)}
    return {**options, **{n: v for n, v in variant.fields.items() if n in options}, **special}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run."""

    task: Task
    variant: Variant
    lr: float
    seed: int
    # sha256 of the model's weights and of the task's files.
    inputs: Mapping[str, str]

    @cached_property
    def config(self) -> dict[str, Any]:  # Any: JSON
        """All that the losses depend on, except versions."""
        schedule = f"linear, {LR_WARMUP_STEPS} steps of warm-up, decay to 0"
        size = {"task": asdict(self.task), "lr": self.lr, "seed": self.seed, "schedule": schedule}
        content = {**size, "optimizer": self.variant.preset, "options": resolve(self.variant), "inputs": self.inputs}
        plain: dict[str, Any] = json.loads(json.dumps(content))
        return plain

    @cached_property
    def hash(self) -> str:
        """The identity of the run."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def file_name(self) -> str:
        """The name of the result file."""
        return f"{self.task.name}--{self.variant.name}--lr{self.lr:g}--s{self.seed}.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all stages have in common."""

    # sha256 by task name: model, and the task's files.
    inputs: Mapping[str, Mapping[str, str]]
    tasks: Sequence[Task] = TASKS
    lrs: Sequence[float] = LRS
    seeds: int = 3

    def cell(self, task: Task, variant: Variant, lr: float, seed: int) -> Cell:
        """Return one run."""
        return Cell(task=task, variant=variant, lr=lr, seed=seed, inputs=self.inputs[task.name])

    def grid(self, task: Task, variant: Variant) -> list[Cell]:
        """Return the runs that choose the learning rate."""
        return [self.cell(task, variant, lr, 0) for lr in self.lrs]

    def best_lr(self, task: Task, variant: Variant, results: Mapping[str, Result]) -> float | None:
        """Return the learning rate with the lowest final loss; None if a run is missing or none ended well."""
        found = [(results.get(cell.hash), cell.lr) for cell in self.grid(task, variant)]
        ended = [(final_loss(result), lr) for result, lr in found if result is not None]
        loss, lr = min(ended, default=(math.inf, 0.0))
        return lr if len(ended) == len(self.lrs) and loss < math.inf else None

    def cells(self, task: Task, variant: Variant, results: Mapping[str, Result]) -> list[Cell]:
        """Return the runs of one place in the table that can be named so far: the grid, then the other seeds."""
        lr = self.best_lr(task, variant, results)
        others = [] if lr is None else [self.cell(task, variant, lr, seed) for seed in range(1, self.seeds)]
        return self.grid(task, variant) + others

    def ready(self, variants: Iterable[Variant], results: Mapping[str, Result]) -> list[Cell]:
        """Return the runs that are to be done and can be named, in order, without duplicates."""
        cells = [c for v in variants for task in self.tasks for c in self.cells(task, v, results)]
        return list({cell.hash: cell for cell in cells if cell.hash not in results}.values())

    def remaining(self, variants: Iterable[Variant], results: Mapping[str, Result]) -> Counter[tuple[str, str]]:
        """Return how many runs are to be done by task and variant name, those that cannot be named yet included."""
        left: Counter[tuple[str, str]] = Counter()
        for variant in variants:
            for task in self.tasks:
                missing = [cell.hash not in results for cell in self.cells(task, variant, results)]
                unnamed = self.seeds - 1 if any(missing[: len(self.lrs)]) else 0
                left[task.name, variant.name] = sum(missing) + unnamed
        return left

    def losses(self, task: Task, variant: Variant, results: Mapping[str, Result]) -> dict[int, float]:
        """Return the final loss by seed at the variant's learning rate; inf for a run that diverged or failed."""
        lr = self.best_lr(task, variant, results)
        cells = [] if lr is None else [self.cell(task, variant, lr, seed) for seed in range(self.seeds)]
        return {cell.seed: final_loss(results[cell.hash]) for cell in cells if cell.hash in results}

    def differences(
        self, task: Task, variant: Variant, results: Mapping[str, Result], *, base: Variant = PAPER
    ) -> list[float]:
        """Return the paired differences to `base`, one for each seed that both have."""
        mine, other = self.losses(task, variant, results), self.losses(task, base, results)
        return [mine[seed] - other[seed] for seed in mine if seed in other]

    def gain(self, values: Mapping[str, str], results: Mapping[str, Result]) -> float:
        """Return the mean difference to the paper's setting over tasks and seeds; inf if a task has none."""
        variant = combined("candidate", values)
        found = [self.differences(task, variant, results) for task in self.tasks]
        means = [statistics.fmean(d) if d and not any(map(math.isnan, d)) else math.inf for d in found]
        return statistics.fmean(means)

    def winners(self, results: Mapping[str, Result]) -> dict[str, str]:
        """Return for each factor the value with the lowest mean difference, if it is below the paper's value, 0."""
        chosen = {}
        for factor, values in FACTORS.items():
            best = min(values, key=lambda value: self.gain({factor: value}, results))  # noqa: B023
            if self.gain({factor: best}, results) < 0:
                chosen[factor] = best
        alone = [self.gain({f: chosen[f]}, results) for f in chosen.keys() & TOGETHER]
        if self.gain(TOGETHER, results) < min([0.0, *alone]):
            chosen |= TOGETHER
        if chosen.get("residual") == "off":
            chosen.pop("select", None)  # without a residual there is nothing to select
        return {factor: chosen[factor] for factor in FACTORS if factor in chosen}

    def stage2(self, results: Mapping[str, Result]) -> list[Variant]:
        """Return `best` and one variant for each winner that is taken back; none if the paper's values won all.

        Raises:
            LookupError: if stage 1 is not finished; says how many runs are missing.
        """
        missing = self.ready(stage1(), results)
        if missing:
            raise LookupError(
                f"stage 2 starts from stage 1's results, and {len(missing)} of its runs are missing, the first one is "
                f"{missing[0].file_name}. Run: python benchmarks/ablation.py --stage 1"
            )
        chosen = self.winners(results)
        without = {f: {g: v for g, v in chosen.items() if g != f} for f in chosen}
        rows = [combined(f"best-without-{factor}", values) for factor, values in without.items()]
        return [combined("best", chosen), *rows] if chosen else []


def sha256_of(*paths: Path) -> str:
    """Return the sha256 of the files' contents."""
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not there. Make the model with scripts/get_model.py, the rows with scripts/prepare_data.py."
            )
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_inputs(model: Path, data: Path, tasks: Iterable[Task]) -> dict[str, dict[str, str]]:
    """Return by task what the files are that a run depends on."""
    weights = sha256_of(model / "model.safetensors")
    names = {task.name: [name for name in (task.train_file, task.held_out_file) if name] for task in tasks}
    return {
        task: {"model_sha256": weights, "data_sha256": sha256_of(*(data / name for name in files))}
        for task, files in names.items()
    }


def final_loss(result: Result) -> float:
    """Return the held-out loss at the end of a run, inf unless it ended well."""
    return float(result["held_out"]["end"]) if result["status"] == "ok" else math.inf
