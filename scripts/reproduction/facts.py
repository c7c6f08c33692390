"""What a result says about the code and the machine that made it."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from reproduction.results import Device

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("crosslore", "torch", "transformers", "llamafactory", "peft", "accelerate", "datasets", "bitsandbytes",
            "galore-torch", "numpy")  # fmt: skip


@cache
def commit() -> str:
    """Return the commit of the code, with "+changes" if files differ from it; "unknown" outside a repository."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + (
            "+changes" if _git("status", "--porcelain", "--untracked-files=no", "--", "src", "scripts") else ""
        )
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
    """Return what a cell runs on: the first GPU, or the processor."""
    import torch

    if torch.cuda.is_available():
        return Device(name=torch.cuda.get_device_name(0), kind="cuda", threads=threads)
    return Device(name=f"{processor()}, {os.cpu_count()} cores", kind="cpu", threads=threads)


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
