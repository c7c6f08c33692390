"""About how long a cell takes, by what its profile says was measured or, of the paper's models, printed."""

from math import ceil

from crosslore_eval.tasks import TASKS
from reproduction.cells import TUNING, Experiment
from reproduction.configs import merged_settings
from reproduction.profiles import load_profiles

# Rows in a step of the profiles that tune.
STEP_ROWS = 2


def training_steps(exp: Experiment) -> int:
    """Return the optimizer steps of a cell."""
    settings = merged_settings(exp)
    if "max_steps" in settings:
        return int(settings["max_steps"])
    rows = min(TASKS[exp.dataset].splits[0].rows, settings.get("max_samples", TASKS[exp.dataset].splits[0].rows))
    batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    return ceil(rows / batch) * int(settings["num_train_epochs"])


def step_and_refresh(exp: Experiment) -> tuple[float, float]:
    """Return about how many seconds a step of a cell takes without a refresh, and all that is refreshed at a time."""
    profiles = load_profiles()
    profile = profiles.profile(exp.profile)
    method, data = profile.methods[exp.base_method], profile.datasets[exp.dataset]
    # A variant with the exact SVD refreshes as GaLore does.
    exact = merged_settings(exp).get("crosslore_projector") == "svd"
    refresh = profile.methods["galore"].refresh_seconds if exact else method.refresh_seconds
    step = data.step_seconds_of.get(exp.model, data.step_seconds)
    return step * method.cost, refresh * profile.refresh_factor.get(exp.model, 1.0)


def estimated_seconds(exp: Experiment) -> float:
    """Return about how long a cell takes on the hardware that its profile's numbers are of."""
    profile, how = load_profiles().profile(exp.profile), load_profiles().methods[exp.base_method]
    steps, (step, refresh) = training_steps(exp), step_and_refresh(exp)
    refreshes = ceil(steps / profile.values["refresh_every"]) if "refresh_every" in how.keys else 0
    return profile.start_seconds + steps * step + refreshes * refresh + evaluation_seconds(exp)


def evaluation_seconds(exp: Experiment) -> float:
    """Return about how long the answers of a cell take, or the held-out loss of a run for tuning."""
    profile = load_profiles().profile(exp.profile)
    data = profile.datasets[exp.dataset]
    if exp.table == TUNING:
        # A forward pass is a third of a step; rows count, not batches.
        return data.dev_rows * data.step_seconds / (3 * STEP_ROWS)
    # The imports and the model again, without LLaMA-Factory: half of a training's start.
    return profile.start_seconds / 2 + (data.test_rows or TASKS[exp.dataset].split(None).rows) * data.answer_seconds
