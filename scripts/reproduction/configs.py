"""LLaMA-Factory configuration and evaluation command of a cell, and the hash of what decides its result."""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from crosslore_eval.tasks import TASKS
from reproduction.cells import TUNING, Experiment
from reproduction.paper import Paper, load_paper
from reproduction.profiles import Profile, load_profiles
from reproduction.settings import Hyperparameters

# LLaMA-Factory's name of an optimizer of tables 3 and 4.
OPTIMIZERS = {"AdamW8bit": "adamw_8bit"}
# Protocol whose scores stand in the paper's columns.
PROTOCOLS = {"gsm8k": "accuracy", "mawps": "accuracy", "e2e": "paper", "cnn_dm": "paper", "xsum": "paper"}
# Keys that decide where a run reads, writes and reports, not what comes out.
PLACES = (
    "model_name_or_path", "dataset_dir", "output_dir", "preprocessing_num_workers", "overwrite_cache", "logging_steps",
    "save_strategy", "save_steps", "save_total_limit", "plot_loss", "report_to",
)  # fmt: skip
# The order of keys in a configuration, by part; those of the method are all others.
MODEL_KEYS = ("model_name_or_path", "disable_gradient_checkpointing")
TASK_KEYS = ("stage", "do_train")
DATA_KEYS = (
    "dataset", "eval_dataset", "dataset_dir", "template", "cutoff_len", "max_samples", "preprocessing_num_workers",
    "overwrite_cache",
)  # fmt: skip
TRAINING_KEYS = (
    "pure_bf16", "optim", "weight_decay", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio", "seed",
)  # fmt: skip
EVALUATION_KEYS = ("do_eval", "per_device_eval_batch_size")
OUTPUT_KEYS = (
    "output_dir", "logging_steps", "save_strategy", "save_steps", "save_total_limit", "plot_loss", "report_to",
)  # fmt: skip

Config = dict[str, Any]  # Any: values of a LLaMA-Factory configuration


def training_config(exp: Experiment, *, model: Path | str, data: Path | str, output: Path | str) -> Config:
    """Return the LLaMA-Factory configuration of a cell, its keys in the order of `parts`.

    Args:
        exp: the cell; of a profile that tunes with its learning rate (`tuning.with_lr`).
        model: folder or hub name of the model to train.
        data: folder with the training files and their `dataset_info.json`.
        output: folder that the trained model is written to.

    Raises:
        ValueError: if the cell has no learning rate.
    """
    config = merged_settings(exp)
    if "learning_rate" not in config:
        raise ValueError(
            f"{exp.name} has no learning rate: profile {exp.profile} tunes them. Give it the chosen one "
            "(tuning.with_lr), or put learning_rate into its settings."
        )
    config |= {
        "model_name_or_path": str(model), "dataset_dir": str(data), "output_dir": str(output),
        "dataset": f"{exp.dataset}_train", "seed": exp.seed,
    }  # fmt: skip
    if exp.table == TUNING:
        config |= {"eval_dataset": f"{exp.dataset}_dev", "do_eval": True}
    return {key: config[key] for part in parts(config).values() for key in part}


def parts(config: Mapping[str, Any]) -> dict[str, list[str]]:  # Any: values of a configuration
    """Return the keys of a configuration by what they are about, in the order in which they are written."""
    known = {
        "model": MODEL_KEYS, "task": TASK_KEYS, "method": (), "data": DATA_KEYS, "training": TRAINING_KEYS,
        "evaluation": EVALUATION_KEYS, "output": OUTPUT_KEYS,
    }  # fmt: skip
    found = {name: [key for key in keys if key in config] for name, keys in known.items()}
    others = [key for key in config if not any(key in keys for keys in known.values())]
    found["method"] = [*found.pop("task"), *others]
    return {name: found[name] for name in ("model", "method", "data", "training", "evaluation", "output")}


def merged_settings(exp: Experiment) -> Config:
    """Return what decides a cell's training apart from model, data and seed; later ones win.

    The profile's common keys, tables 3-4 (profile "paper"), the data set's, the method's, the profile's for the method,
    and the cell's own.
    """
    profiles = load_profiles()
    profile, method = profiles.profile(exp.profile), profiles.methods[exp.base_method]
    values, training = dict(profile.values), {}
    if "alpha" not in values:
        entry = hyperparameters(exp, profile)
        training = training_settings(entry)
        values |= {"alpha": entry.alpha, "residual_ratio": round(entry.residual_ratio_percent / 100, 6)}
    values["rank"] = exp.rank
    return {
        "stage": "sft",
        "do_train": True,
        **method.settings,
        **{key: values[value] for value, key in method.keys.items()},
        **{key: exp.rank * factor for key, factor in method.per_rank.items()},
        "template": profile.template,
        "overwrite_cache": True,
        "report_to": "none",
        **profile.common,
        **training,
        **profile.datasets[exp.dataset].settings,
        **profile.methods[exp.base_method].settings,
        **exp.settings,
    }


def hyperparameters(exp: Experiment, profile: Profile) -> Hyperparameters:
    """Return the settings of tables 3-4 for a cell, or those that stand in for ones that the paper does not give.

    The training of all weights takes those of the lowest rank, of which it uses none that depends on the rank.
    """
    model, dataset = (profile.borrow.get(name, name) for name in (exp.model, exp.dataset))
    return _paper().hyperparameters(model=model, dataset=dataset, rank=exp.rank or min(profile.ranks))


@lru_cache
def _paper() -> Paper:
    return load_paper()


def training_settings(entry: Hyperparameters) -> Config:
    """Return the keys that tables 3-4 give."""
    return {
        "optim": OPTIMIZERS[entry.optimizer],
        "per_device_train_batch_size": entry.batch_size,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": entry.epochs,
        "learning_rate": entry.learning_rate,
        "lr_scheduler_type": entry.lr_schedule,
    }


def evaluation_command(
    exp: Experiment, *, model: Path | str, data: Path | str, out: Path | str, base: Path | str | None = None
) -> list[str]:
    """Return the `crosslore-eval run` command of a trained cell, which prints one JSON object.

    Args:
        exp: the cell.
        model: the trained model, or the adapter of LoRA and DoRA.
        data: folder that `prepare_profile_data` wrote.
        out: file for the outputs; an interrupted command goes on with it.
        base: the base of an adapter; None: the one that the adapter names, which it was trained on.

    Raises:
        ValueError: if the cell is a run for tuning, which is measured by its held-out loss.
    """
    if exp.table == TUNING:
        raise ValueError(
            f"{exp.name} is measured by the held-out loss at the end of its training, and is not scored. Read "
            "`eval_loss` in eval_results.json of its output folder."
        )
    places = ["--model", str(model), "--data", str(data), "--out", str(out)]
    places += ["--base-model", str(base)] if base is not None else []
    return ["crosslore-eval", "run", exp.dataset, *places, *evaluation_options(exp)]


def evaluation_options(exp: Experiment) -> list[str]:
    """Return the options of `crosslore-eval run` that decide a cell's scores."""
    profile = load_profiles().profile(exp.profile)
    tokens = profile.datasets[exp.dataset].max_new_tokens or TASKS[exp.dataset].max_new_tokens
    chosen = {
        "--template": profile.template, "--batch-size": profile.batch_size, "--max-new-tokens": tokens,
        "--protocol": PROTOCOLS[exp.dataset],
    }  # fmt: skip
    words = [word for option, value in chosen.items() for word in (option, str(value))]
    return [*words, "--confidence", "--json"]


def config_hash(config: Mapping[str, Any], *, exp: Experiment) -> str:  # Any: values of a configuration
    """Return 16 hex digits of what decides the scores of a cell, whatever folders it runs in and table it is of.

    Args:
        config: what `training_config` returns.
        exp: the cell, for the model's identifier and the evaluation. The data are told apart by their names and row
            counts; results hold their sums.
    """
    data = load_profiles().profile(exp.profile).datasets[exp.dataset]
    rows = [data.train_rows, data.dev_rows if exp.table == TUNING else data.test_rows]
    content = {
        "model": exp.model,
        "profile": exp.profile,
        "training": {key: value for key, value in config.items() if key not in PLACES},
        "rows": rows,
        "evaluation": [] if exp.table == TUNING else evaluation_options(exp),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
