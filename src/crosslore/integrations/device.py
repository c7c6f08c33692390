"""What a measurement ran on, without the libraries that it measures."""

import platform
from pathlib import Path
from typing import Any

import torch


def describe_device(device: torch.device) -> dict[str, Any]:  # Any: what JSON holds
    """Return kind, name and number of CPU threads of what the training ran on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = next(names, platform.processor() or platform.machine())
    return {"kind": device.type, "name": name, "threads": torch.get_num_threads()}
