"""What the ablation runs, as data: tasks, variants, learning rates. `ablation_plan.py` says in which order, and why.

Stage 1 changes one factor at a time of the paper's setting (`paper`). Stage 2 puts the winning value of every factor
together (`best`) and changes one factor at a time of that. Stage 3 are reference lines.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
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
# Of all weights; the low-rank update has `scale` times it. Ascending.
LRS = (3e-6, 1e-5, 3e-5, 1e-4)
# Where the search for the best one starts.
FIRST_LRS = (1e-5, 3e-5)
# Rates whose loss for the first seed is so close to the best are run with all seeds before one is chosen: another seed
# shifts the loss of the same run by 0.07, and the difference of two rates by 0.03.
LR_MARGIN = 0.01


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
    # Takes the learning rate of this variant instead of looking for its own.
    like: "Variant | None" = None


# Sized so that all stages take about three hours of two cores.
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
}
# Values that were seen to help only together; they win together if their row beats each of them.
TOGETHER: Mapping[str, str] = {"residual": "exact", "select": "residual"}
TOGETHER_NAME = "residual-exact-select-residual"
REFERENCES = (
    Variant(name="galore", preset="galore", fields={**COMMON, **INTERVAL}),
    Variant(name="projector-power", fields={**BASE, "projector": "power", "oversampling": 0, "power_iterations": 1}),
    Variant(name=ADAMW, preset=ADAMW),
    Variant(name="rank32", fields={**BASE, "rank": 32}),
    Variant(name="ldadam", preset="ldadam", fields=COMMON),
)


def lr_factor(step: int, steps: int) -> float:
    """Return the factor on the learning rate at a step, counted from 0."""
    warm = min(LR_WARMUP_STEPS, max(1, steps // 2))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def combined(name: str, values: Mapping[str, str], *, like: Variant | None = None) -> Variant:
    """Return the paper's setting with these values of the factors."""
    overrides: dict[str, Any] = dict(BASE)  # Any: as Fields
    for factor, value in values.items():
        overrides |= FACTORS[factor][value]
    return Variant(name=name, fields=overrides, like=like)


def stage1() -> list[Variant]:
    """Return the paper's setting and one variant for each other value of a factor."""
    single = [combined(f"{f}-{v}", {f: v}) for f, values in FACTORS.items() for v in values]
    return [PAPER, *single, combined(TOGETHER_NAME, TOGETHER)]


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
