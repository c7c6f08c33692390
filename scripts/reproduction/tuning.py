"""Learning rates of a profile that tunes them: the runs of a grid, and the best of their results."""

import json
from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from reproduction.cells import TUNING, Experiment
from reproduction.profiles import Profile, Tuning, load_profiles


class TuningError(ValueError):
    """No learning rate is known for a cell; the message says which runs lack and how to get them."""


def tuning_grid(profile: Profile, model: str, *, method: str, dataset: str) -> list[Experiment]:
    """Return the runs that try every learning rate of a method's family on a data set."""
    tuning, how = _require_tuning(profile), load_profiles().methods[method]
    return [
        Experiment(
            table=TUNING,
            profile=profile.name,
            model=model,
            method=method,
            dataset=dataset,
            rank=tuning.rank if how.has_rank else 0,
            seed=tuning.seed,
            column=rate_text(rate),
            settings={**tuning.settings, "learning_rate": rate},
        )
        for rate in tuning.learning_rates[how.family]
    ]


def grid_of(exp: Experiment) -> list[Experiment]:
    """Return the runs that the learning rate of a cell is chosen from."""
    profile = load_profiles().profile(exp.profile)
    return tuning_grid(profile, exp.model, method=exp.base_method, dataset=exp.dataset)


def rate_text(rate: float) -> str:
    """Return a learning rate as names have it: 3e-5."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _require_tuning(profile: Profile) -> Tuning:
    if profile.tuning is None:
        raise ValueError(
            f"profile {profile.name} has fixed learning rates and no tuning. Tune in another profile, or add it to "
            "profiles.toml."
        )
    return profile.tuning


def chosen_lr(results_folder: Path, exp: Experiment) -> float:
    """Return the learning rate of the lowest held-out loss for the method and data set of a cell.

    Variants of an ablation take that of CrossLore. Runs that diverged are passed over. One that failed or had no
    memory says nothing of its rate and counts as not run: it is tried again.

    Raises:
        TuningError: if runs of the grid are not there, or all of them diverged; names them and the command.
    """
    grid = grid_of(exp)
    losses = {run.name: _held_out_loss(results_folder / TUNING / f"{run.name}.json") for run in grid}
    command = f"Run: python scripts/reproduce.py {TUNING} --profile {exp.profile}"
    missing = [name for name, loss in losses.items() if loss is None]
    if missing:
        raise TuningError(
            f"the learning rate of {exp.name} is chosen from {len(grid)} tuning runs, and {results_folder / TUNING} "
            f"has no loss of {', '.join(missing)}. {command}"
        )
    finite = [run for run in grid if isfinite(losses[run.name] or 0.0)]
    if not finite:
        raise TuningError(
            f"the learning rate of {exp.name} needs one tuning run that trains, all {len(grid)} in "
            f"{results_folder / TUNING} diverged. Change the grid in profiles.toml, then: {command}"
        )
    best = min(finite, key=lambda run: losses[run.name] or 0.0)
    return float(best.settings["learning_rate"])


def at_an_end(exp: Experiment) -> str:
    """Return a line if the rate of a cell is the lowest or highest of its grid, else nothing."""
    rates = [run.settings["learning_rate"] for run in grid_of(exp)]
    if exp.settings["learning_rate"] not in (min(rates), max(rates)):
        return ""
    what = f"the learning rate of {exp.base_method} on {exp.dataset}, {exp.settings['learning_rate']:g},"
    return f"{what} is at an end of its grid: a better one may lie beyond. Widen the grid in profiles.toml."


def _held_out_loss(path: Path) -> float | None:
    """Return the loss in a result file, infinity for a run that diverged, None where a run has yet to end."""
    if not path.is_file():
        return None
    try:
        content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))  # Any: JSON
        if content["status"] != "ok":
            return None
        if "eval_loss" not in content["scores"]:
            raise ValueError("it has no score `eval_loss`")
        value = content["scores"]["eval_loss"]["value"]
        return float(value) if value is not None and isfinite(value) else float("inf")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise TuningError(
            f"{path} must be the result of a tuning run, and cannot be used: {error}. Remove it and run "
            f"python scripts/reproduce.py {TUNING} again."
        ) from None


def with_lr(exp: Experiment, results_folder: Path) -> Experiment:
    """Return a cell with its learning rate: the tuned one where its profile tunes, else as it is."""
    if load_profiles().profile(exp.profile).tuning is None or "learning_rate" in exp.settings:
        return exp
    return replace(exp, settings={**exp.settings, "learning_rate": chosen_lr(results_folder, exp)})
