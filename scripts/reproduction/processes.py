"""Subprocesses of a cell: logged, stopped with this process however it ends, one at a time in a folder."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# Becomes the command that follows it and, on Linux, dies with the process that started it (prctl's PR_SET_PDEATHSIG is
# 1). A program of its own, because a function that Popen runs between fork and exec may deadlock beside threads.
LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
# How long a process may take to end after it was asked to.
GRACE_SECONDS = 10


class FolderBusy(RuntimeError):
    """Another run works in a folder; the message says which."""


class Stopped(RuntimeError):
    """The run was interrupted: no further process is started."""


class Processes:
    """The running subprocesses, which `stop` ends all at once."""

    def __init__(self) -> None:
        """Nothing runs yet."""
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(
        self, command: list[str], *, log: Path, environment: Mapping[str, str], folder: Path, output: Path | None = None
    ) -> int:
        """Return the exit code of a command.

        Args:
            command: the words; the first is a program's path.
            log: what it prints is appended here.
            environment: added to this process's own.
            folder: where it runs.
            output: a file for its standard output; None: the log.

        Raises:
            Stopped: if `stop` was called.
        """
        with log.open("ab") as errors, (output or log).open("wb" if output else "ab") as out:
            errors.write(f"$ {' '.join(command)}\n".encode())
            errors.flush()
            with self._lock:
                if self._stopped:
                    raise Stopped
                process = subprocess.Popen(
                    [sys.executable, "-c", LAUNCHER, str(os.getpid()), *command],
                    cwd=folder,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=errors,
                    start_new_session=True,  # Ctrl-C is for this process, which stops them in order
                )
                self._running.add(process)
            try:
                code = process.wait()
            except BaseException:  # Ctrl-C in the thread that waits: nobody else knows of the process
                _end([process])
                raise
            finally:
                with self._lock:
                    self._running.discard(process)
        if self._stopped:
            raise Stopped
        return code

    def stop(self) -> None:
        """End what runs, and refuse what would come."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        _end(running)


def _end(processes: "list[subprocess.Popen[bytes]]") -> None:
    """Ask processes to end, and kill those that do not in time."""
    for process in processes:
        _signal_group(process, signal.SIGTERM)
    for process in processes:
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a folder for this process.

    Raises:
        FolderBusy: if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderBusy(
                f"another run works in {folder}. Wait for it to end, or choose another folder with --work."
            ) from None
        yield
