"""What came of a cell's processes, read from what they left: measurement, scores, and why one failed."""

import json
import re
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from reproduction.results import Score

# What a program prints when memory is short.
OOM = re.compile(r"out of memory|OutOfMemoryError|DefaultCPUAllocator: can't allocate|Cannot allocate memory", re.I)
KILLED = -9  # exit code of a process that was killed; nobody but the system does that, for memory
# Trainer's evaluation: rows are put into batches, each with its loss by token.
HELD_OUT = "mean over the batches of the held-out rows, by transformers' Trainer"


class CellFailed(RuntimeError):
    """A cell's process ended badly; `oom` says whether for memory."""

    def __init__(self, reason: str, *, oom: bool) -> None:
        """Keep the reason, one line."""
        super().__init__(reason)
        self.oom = oom


def read_json(path: Path) -> dict[str, Any] | None:  # Any: JSON
    """Return the object that a file holds, None if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def score_of(entry: Mapping[str, Any]) -> Score:  # Any: JSON of crosslore-eval
    """Return an entry of crosslore-eval's output as a score."""
    low, high = entry.get("confidence_95") or (None, None)
    value = entry.get("value")
    reason = "" if value is not None else str(entry.get("error") or "not computed")
    return Score(value=value, low=low, high=high, signature=str(entry.get("signature", "")), reason=reason)


def held_out(measure: Mapping[str, Any]) -> dict[str, Score]:  # Any: JSON of the callback
    """Return the held-out loss of a run for tuning; without a value if it diverged."""
    value = measure.get("eval_loss")
    if value is None or not isfinite(value):
        return {"eval_loss": Score(value=None, reason="the training diverged: its held-out loss is no finite number")}
    return {"eval_loss": Score(value=float(value), signature=HELD_OUT)}


def failure(what: str, code: int, log: Path) -> CellFailed:
    """Return why a process failed, by its exit code and the end of its log."""
    # Of the last command alone: earlier attempts and runs stand in the same log.
    text = "\n" + log.read_text(encoding="utf-8", errors="replace")
    lines = [line.rstrip() for line in text.rpartition("\n$ ")[2].splitlines()[1:] if line.strip()]
    last = next((line for line in reversed(lines) if not line.startswith(" ")), "no output")[:300]
    short = next((line.strip() for line in reversed(lines) if OOM.search(line)), None)
    if short or code == KILLED:
        return CellFailed(f"{what}: {(short or 'killed by the system')[:300]}", oom=True)
    return CellFailed(f"{what} ended with exit code {code}: {last} (its log: {log})", oom=False)


def without_folder(value: Any) -> Any:  # Any: a value of a configuration
    """Return a path as its last part: whose folders they were says nothing about a result."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
