"""What a result says about the code and the machine that made it."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from reproduction.results import Device

ROOT = Path(__file__).resolve().parents[2]
# What decides a result: the method, the runner, the scores, the bundled rows.
CODE = ("src", "scripts", "evaluation", "data")
PACKAGES = ("crosslore", "torch", "transformers", "llamafactory", "peft", "accelerate", "datasets", "bitsandbytes",
            "galore-torch", "numpy")  # fmt: skip


@cache
def commit() -> str:
    """Return the commit of the code, with "+changes" if files differ from it; "unknown" outside a repository."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no", "--", *CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


@cache
def packages() -> dict[str, str]:
    """Return the versions of what decides a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def device(threads: int) -> Device:
    """Return what a cell runs on, as its measurement names it: the first GPU, or the processor."""
    import torch

    from crosslore.integrations.device import describe_device

    found = describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return Device(name=found["name"], kind=found["kind"], threads=threads)
