"""The training half of `demo.py`: LLaMA-Factory's own command as a subprocess, afresh or continued."""

import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parents[1]
INSTALL_LINE = 'pip install "crosslore[llamafactory,eval]"'


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the training starts: afresh, or from the checkpoint of a run that was interrupted."""

    message: str
    checkpoint: Path | None = None
    clear_folder: bool = False


def peak_rss_gib(who: int) -> float:
    """Return the largest resident memory so far, in GiB, of this process or of its finished children."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(who).ru_maxrss * unit / 1024**3


def is_finished(folder: Path) -> bool:
    """Return whether `folder` holds a finished run: LLaMA-Factory writes this file there after the model."""
    return (folder / "trainer_state.json").is_file()


def plan_training(folder: Path) -> Plan:
    """Return how to start training in `folder`: continue an interrupted run, otherwise train afresh.

    A checkpoint counts when it holds `trainer_state.json`, which transformers writes last of its files.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return Plan(message=f"training in {folder}")
    if is_finished(folder):
        moves = f"{folder} holds a finished run, which moves to {previous(folder)}: training afresh"
        return Plan(message=moves, clear_folder=True)
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    if not complete:
        return Plan(
            message=f"{folder} holds an interrupted run without a checkpoint: training afresh", clear_folder=True
        )
    last = max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")))
    return Plan(message=f"continuing an interrupted run from {last}", checkpoint=last)


def previous(folder: Path) -> Path:
    """Return where the last finished run is kept while another one takes its place."""
    return folder.with_name(f"{folder.name}.previous")


def put_aside(folder: Path) -> None:
    """Empty the place of a run: a finished one is kept, in place of the one before it."""
    if is_finished(folder):
        shutil.rmtree(previous(folder), ignore_errors=True)
        folder.rename(previous(folder))
    else:
        shutil.rmtree(folder)


def training_command(config: Path, folder: Path, plan: Plan) -> list[str]:
    """Return the `llamafactory-cli train` command for a plan."""
    executable = Path(sys.executable).with_name("llamafactory-cli")
    if not executable.is_file():
        raise DemoError(f"llamafactory-cli is not installed beside {sys.executable}. Install with: {INSTALL_LINE}")
    command = [str(executable), "train", str(config), f"output_dir={folder}"]
    if plan.checkpoint is None:
        return [*command, "overwrite_output_dir=true"]
    return [*command, "overwrite_output_dir=false", f"resume_from_checkpoint={plan.checkpoint}"]


def run_logged(command: list[str], log: Path) -> int:
    """Return the exit code of `command`, whose output appears here as it comes and in the file `log`."""
    # LLaMA-Factory starts a bare `torchrun` when it sees several GPUs.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"}
    with (
        log.open("wb") as sink,
        subprocess.Popen(
            command, cwd=REPO_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 65536):
            sink.write(chunk)
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
    return process.returncode


def train(config: Path, folder: Path) -> dict[str, Any]:
    """Train as `plan_training` says, and return the seconds, peak memory and command of the run."""
    plan = plan_training(folder)
    command = training_command(config, folder, plan)
    print(f"{plan.message}\n$ {' '.join(command)}", flush=True)
    if plan.clear_folder:
        put_aside(folder)
    log = folder.with_name("train.log")
    started = time.perf_counter()
    code = run_logged(command, log)
    if code != 0:
        raise DemoError(f"training ended with exit code {code}. Its output is above and in {log}.")
    return {
        "seconds": time.perf_counter() - started,
        "peak_rss_gib": peak_rss_gib(resource.RUSAGE_CHILDREN),
        "command": command,
        "continued_from": None if plan.checkpoint is None else plan.checkpoint.name,
    }
