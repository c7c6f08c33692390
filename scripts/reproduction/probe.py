"""How fast this machine is: a few steps of one cell, before hours are promised."""

import json
import shutil
from collections.abc import Sequence

from reproduction.cell_run import Setup, config_of, train
from reproduction.cells import BASE_METHOD, Experiment
from reproduction.costs import step_and_refresh

STEPS = 5


def speed_factor(cells: Sequence[Experiment], setup: Setup) -> float:
    """Return the time of a step here over the one that the profile's figures promise.

    Args:
        cells: those to be run; one of CrossLore's is taken if there is one.
        setup: models, data and folders.

    Raises:
        CellFailed: if the steps cannot be run; the message says why.
    """
    cell = next((cell for cell in cells if cell.base_method == BASE_METHOD), cells[0])
    folder = setup.work / "probe"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = config_of(cell, setup) | {"output_dir": str(folder / "model"), "max_steps": STEPS, "save_strategy": "no"}
    try:
        train({key: value for key, value in config.items() if key not in ("do_eval", "eval_dataset")}, folder, setup)
        measure = json.loads((folder / "measure.json").read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(folder / "model", ignore_errors=True)
    step, refresh = step_and_refresh(cell)
    # The first step fits all bases, which GaLore takes minutes for.
    promised = int(measure["steps"]) * step + refresh
    return float(measure["train_seconds"]) / promised
