"""From which checkpoint a run goes on: the last whole one, not one whose saving was interrupted."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

# What the Trainer writes last.
LAST_FILE = "trainer_state.json"
# Stages in which LLaMA-Factory does not resume.
NOT_RESUMED = ("rm", "ppo")


def skip_incomplete_checkpoints(training: Any, stage: str) -> None:  # Any: LLaMA-Factory's TrainingArguments
    """Let a run go on from the last whole checkpoint, or from the beginning if there is none; changes `training`.

    Nothing is done where the last checkpoint is whole, or where no checkpoint is asked for.

    Args:
        training: LLaMA-Factory's training arguments, as parsed.
        stage: `stage` of the configuration.

    Raises:
        ValueError: `resume_from_checkpoint` names one that is not whole.
    """
    if not training.do_train or stage in NOT_RESUMED:
        return
    asked = training.resume_from_checkpoint
    if isinstance(asked, str):
        if Path(asked).is_dir() and not is_whole(Path(asked)):
            raise ValueError(
                f"resume_from_checkpoint must be a whole checkpoint, and {asked} has no readable {LAST_FILE}: its "
                "saving was interrupted. Name an earlier one, or leave it out to go on from the last whole one."
            )
        return
    folder = Path(training.output_dir)
    found = checkpoints(folder)
    if not found or is_whole(found[0]) or (asked is None and training.overwrite_output_dir) or asked is False:
        return
    if training.world_size > 1:  # each process sees its own disk
        raise ValueError(
            f"the saving of {found[0]} was interrupted (no readable {LAST_FILE}), and {training.world_size} processes "
            "cannot agree on another checkpoint. Remove that folder, or give resume_from_checkpoint."
        )
    whole = next((checkpoint for checkpoint in found if is_whole(checkpoint)), None)
    training.resume_from_checkpoint = None if whole is None else str(whole)
    if whole is None:
        training.overwrite_output_dir = True  # look for no checkpoint; the log of the lost steps goes too
    logger.warning(
        "The saving of %s was interrupted (no readable %s): the run goes on from %s.",
        found[0],
        LAST_FILE,
        whole or "the beginning",
    )


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in an output folder, the last one first."""
    steps = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and path.is_dir():
            steps[int(step)] = path
    return [steps[step] for step in sorted(steps, reverse=True)]


def is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint was saved to the end."""
    try:
        return isinstance(json.loads((checkpoint / LAST_FILE).read_text(encoding="utf-8")), dict)
    except (FileNotFoundError, ValueError):
        return False
