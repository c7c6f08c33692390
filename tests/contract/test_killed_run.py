"""A deferred run that is killed at random leaves only checkpoints that a direct run has at the same step."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crosslore import create_optimizer

# More than a process gets to before it is killed.
STEPS = 100_000
OPTIONS: dict[str, Any] = {
    "lr": 1e-2, "rank": 4, "scale": 1.0, "refresh_every": 7, "warmup_steps": 3, "residual_ratio": 0.05,
    "moments": "rotate", "weight_decay": 0.1, "cross_head_targets": None, "residual_targets": None,
}  # fmt: skip


def started(weights: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24)).double()
    return model, create_optimizer(model, "crosslore", **OPTIONS, gradients="compact", weights=weights)


def train_one(model: nn.Module, optimizer: Any, step: int) -> None:
    optimizer.zero_grad()
    x = torch.randn(48, 24, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    (model(x) - x.roll(1, 0)).square().mean().backward()
    optimizer.step()


def saves_after(step: int) -> bool:
    """Return whether a checkpoint follows a step: about every third one, at no fixed distance from the refreshes."""
    return int(torch.randint(3, (), generator=torch.Generator().manual_seed(10_000 + step))) == 0


def newest(folder: Path) -> Path | None:
    return max(folder.glob("step-*.pt"), key=lambda path: int(path.stem.removeprefix("step-")), default=None)


def run(folder: Path) -> None:
    """Train on from the newest checkpoint; a file has its name only once it is whole."""
    model, optimizer = started("deferred")
    first, found = 0, newest(folder)
    if found is not None:
        held = torch.load(found, weights_only=True)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        first = held["step"]
    for step in range(first, STEPS):
        train_one(model, optimizer, step)
        if saves_after(step):
            parts = {"step": step + 1, "optimizer": optimizer.state_dict(), "model": model.state_dict()}
            if step % 2:  # whichever is read first merges
                parts = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            half = folder / f"half-{os.getpid()}"
            torch.save(parts, half)
            half.replace(folder / f"step-{step + 1}.pt")


def start_process(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_after_new_checkpoint(process: subprocess.Popen[bytes], folder: Path, *, before: int, extra: float) -> None:
    """Kill a process some time after its first checkpoint of its own."""
    deadline = time.monotonic() + 60
    while process.poll() is None and len(list(folder.glob("step-*.pt"))) <= before and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(extra)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # in the middle of the run


def direct_states(steps: set[int]) -> dict[int, tuple[dict[str, Tensor], list[dict[str, Tensor]]]]:
    """Return weights and optimizer states that a direct run has after these steps."""
    model, optimizer = started("direct")
    states = {}
    for step in range(max(steps)):
        train_one(model, optimizer, step)
        if step + 1 in steps:
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
            states[step + 1] = (
                weights,
                [{key: value.clone() for key, value in state.items()} for state in optimizer.state.values()],
            )
    return states


@pytest.mark.slow
def test_a_killed_deferred_run_leaves_checkpoints_of_the_direct_one(tmp_path: Path) -> None:
    kills = 3
    for i in range(kills):
        before = len(list(tmp_path.glob("step-*.pt")))
        extra = float(torch.rand((), generator=torch.Generator().manual_seed(i))) * 0.2
        kill_after_new_checkpoint(start_process(tmp_path), tmp_path, before=before, extra=extra)
    paths = {int(path.stem.removeprefix("step-")): path for path in tmp_path.glob("step-*.pt")}
    assert len(paths) >= kills  # each process got further than the one before
    expected = direct_states(set(paths))
    for step, path in paths.items():
        held = torch.load(path, weights_only=True)
        weights, states = expected[step]
        assert held["step"] == step
        for name, value in weights.items():
            torch.testing.assert_close(held["model"][name], value, rtol=1e-8, atol=1e-10)
        for ours, theirs in zip(held["optimizer"]["state"].values(), states, strict=True):
            assert ours.keys() == theirs.keys()
            assert float(ours["step"]) == float(theirs["step"]) == step


if __name__ == "__main__":
    run(Path(sys.argv[1]))
