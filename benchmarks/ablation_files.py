"""Result files of the ablation: one for each run, complete or not there."""

import json
import math
import os
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from ablation_matrix import Cell, Result
from common import ROOT, commit, device_name, source_hash

RESULTS = ROOT / "results" / "ablation"
PACKAGES = ("torch", "transformers", "numpy")


def new_record(cell: Cell) -> Result:
    """Return a result without what the run measures."""
    names = {"task": cell.task.name, "variant": cell.variant.name, "lr": cell.lr, "seed": cell.seed}
    made = {"commit": commit(), "source": source_hash(), "packages": {n: version(n) for n in PACKAGES}}
    device = {"device": device_name("cpu"), "omp_num_threads": os.environ.get("OMP_NUM_THREADS"), "dtype": "float32"}
    held_out = {"start": None, "end": None}
    parts = {"status": "failed", "error": None, "steps": 0, "losses": [], "held_out": held_out}
    return {"hash": cell.hash, **names, **parts, **made, **device, "config": cell.config}


def write_result(record: Result, path: Path) -> None:
    """Write a result file that is complete or not there; losses that are not finite become null."""
    record["date"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    record["held_out"] = {n: v if v is None or math.isfinite(v) else None for n, v in record["held_out"].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_results(folder: Path, *, failed: bool = True) -> dict[str, Result]:
    """Return the results of a folder by configuration hash, with or without those that failed.

    Raises:
        ValueError: if a file is no result; names it.
    """
    found: dict[str, Result] = {}
    for path in sorted(folder.glob("*--*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if failed or result["status"] != "failed":
                found[result["hash"]] = result
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no result of this benchmark ({error!r}). Delete it and run again.") from error
    return found


def reset_peak_rss() -> None:
    """Let the peak memory of this process count from now on; from its start where the system cannot do that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_rss_gib() -> float | None:
    """Return the peak memory of this process in GiB; None where /proc does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM")), None)


def line(result: Result) -> str:
    """Return a finished run in one line."""
    loss = "-" if result["held_out"]["end"] is None else f"{result['held_out']['end']:.4f}"
    run = f"{result['task']} {result['variant']} lr {result['lr']:g} seed {result['seed']}"
    return f"{run}: {result['status']}, held-out loss {loss}, {result['seconds']:.0f} s"
