"""`crosslore doctor`: what of the stack is there, works, and what to do about the rest."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from crosslore.integrations.llamafactory.compat import TESTED, UnsupportedError, require_matching_torch

Level = Literal["ok", "warning", "problem"]
# Those of pyproject.toml; a test holds them equal.
OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 8)
# Of disk: what a 7B model's checkpoints take, result and two of them.
WANTED_GB = 60


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    level: Level
    text: str
    # what to do; empty for ok
    fix: str = ""


def examine() -> list[Finding]:
    """Return one finding for each part of the stack; nothing of it raises."""
    return [_guarded(name, check) for name, check in CHECKS.items()]


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # a report of what is broken must not break
        return Finding(name=name, level="problem", text=f"{type(error).__name__}: {error}", fix="Report this message.")


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        return Finding(
            name="Python", level="problem", text=version, fix=f"Use Python {_dotted(OLDEST_PYTHON)} or newer."
        )
    return Finding(name="Python", level="ok", text=version)


def _torch() -> Finding:
    version = torch.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        fix = f"Run `pip install -U torch`: {_dotted(OLDEST_TORCH)} is the oldest."
        return Finding(name="torch", level="problem", text=version, fix=fix)
    try:
        if importlib.util.find_spec("llamafactory") is not None:
            require_matching_torch()
    except UnsupportedError as error:
        return Finding(name="torch", level="problem", text=version, fix=str(error))
    return Finding(name="torch", level="ok", text=version)


def _device() -> Finding:
    if torch.cuda.is_available():
        held = torch.cuda.get_device_properties(0)
        gib = held.total_memory / 2**30
        text = f"{held.name}, {gib:.0f} GiB, CUDA {torch.version.cuda}"
        if not torch.cuda.is_bf16_supported():
            return Finding(name="device", level="warning", text=f"{text}, no bf16", fix="Train in fp16 or fp32.")
        return Finding(name="device", level="ok", text=text)
    text = f"no CUDA device, {os.cpu_count()} CPU cores"
    fix = "Small models train on it; for a 7B model use a GPU of 24 GB." if torch.version.cuda else ""
    return Finding(name="device", level="warning", text=text, fix=fix or "This torch is built without CUDA.")


def _llamafactory() -> Finding:
    name = "LLaMA-Factory"
    version = _version("llamafactory")
    if version is None:
        return Finding(
            name=name,
            level="warning",
            text="not installed",
            fix='Run `pip install "crosslore[llamafactory]"` to use it.',
        )
    if version not in TESTED:
        fix = f"Run `pip install llamafactory=={TESTED[-1]}`; `finetuning_type: crosslore` is refused otherwise."
        return Finding(name=name, level="problem", text=f"{version}, not among the tested {', '.join(TESTED)}", fix=fix)
    return Finding(name=name, level="ok", text=version)


def _hook() -> Finding:
    name = "start-up hook"
    if _version("llamafactory") is None:
        return Finding(name=name, level="ok", text="not needed without LLaMA-Factory")
    if os.environ.get("CROSSLORE_LLAMAFACTORY") == "0":
        return Finding(name=name, level="warning", text="switched off", fix="Unset CROSSLORE_LLAMAFACTORY.")
    if any(type(finder).__name__ == "SeamFinder" for finder in sys.meta_path):
        return Finding(name=name, level="ok", text="active")
    fix = "Install crosslore again, or start training by `python -m crosslore.integrations.llamafactory train ...`."
    return Finding(name=name, level="problem", text="not active: Python did not read its .pth file", fix=fix)


def _bitsandbytes() -> Finding:
    name, version = "bitsandbytes", _version("bitsandbytes")
    if version is None:
        fix = 'Run `pip install "crosslore[bnb]"` for 8-bit moments; without it they are fp32.'
        return Finding(name=name, level="warning", text="not installed", fix=fix)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fix = "Run `pip install -U bitsandbytes`, or train with optim: adamw_torch."
    try:
        from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

        values = torch.linspace(-1, 1, 4096, device=device)
        back = dequantize_blockwise(*quantize_blockwise(values))
    except Exception as error:  # whatever its native library meets
        text = f"{version} does not work on {device}: {type(error).__name__}: {error}"
        return Finding(name=name, level="problem", text=text, fix=fix)
    if float((back - values).abs().max()) > 0.1:
        return Finding(name=name, level="problem", text=f"{version} gives wrong values on {device}", fix=fix)
    return Finding(name=name, level="ok", text=f"{version}, works on {device}")


def _triton() -> Finding:
    name, version = "Triton kernels", _version("triton")
    if not torch.cuda.is_available():
        return Finding(name=name, level="ok", text="not used without a CUDA device")
    if version is None:
        return Finding(name=name, level="warning", text="not installed", fix="Plain torch is used; pip install triton.")
    return Finding(name=name, level="ok", text=version)


def _java() -> Finding:
    name, java = "Java", shutil.which("java")
    with suppress(OSError, subprocess.SubprocessError):
        if java and subprocess.run([java, "-version"], capture_output=True, timeout=60).returncode == 0:
            return Finding(name=name, level="ok", text=java)
    fix = "Install a Java runtime (`apt-get install default-jre-headless`) for METEOR and the official tokeniser."
    return Finding(name=name, level="warning", text="no `java` that runs", fix=fix)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    text = f"{free:.0f} GB free in this folder"
    if free < WANTED_GB:
        fix = f"A 7B model's checkpoints take about {WANTED_GB} GB: set output_dir to another disk."
        return Finding(name="disk", level="warning", text=text, fix=fix)
    return Finding(name="disk", level="ok", text=text)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": _python,
    "torch": _torch,
    "device": _device,
    "LLaMA-Factory": _llamafactory,
    "start-up hook": _hook,
    "bitsandbytes": _bitsandbytes,
    "Triton kernels": _triton,
    "Java": _java,
    "disk": _disk,
}
