"""The file that `--out` names: whether it can be written, and that one process at a time does."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crosslore_eval.errors import EvalError


def check_out(out: Path) -> None:
    """Raise `EvalError` unless `out` is a file, or nothing yet, in a folder that can be written or made."""
    try:
        if out.exists() and not out.is_file():
            kind = "the folder" if out.is_dir() else "the device or pipe"
            raise EvalError(f"--out must be a file, got {kind} {out}. Give the name of a file.")
        folder = out.absolute().parent
        while not folder.exists():
            folder = folder.parent
    except OSError as error:
        raise _not_writable(out, error.strerror) from error
    if not folder.is_dir():
        raise _not_writable(out, f"{folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _not_writable(out, f"no permission to write in {folder}")


def _not_writable(out: Path, reason: str | None) -> EvalError:
    return EvalError(f"--out must be a file that can be written, got {out}: {reason}. Choose another --out.")


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Make the folder and hold a lock beside `out`, where the system has such locks.

    A process that ends, however, lets go of it.

    Raises:
        EvalError: if another process holds it, or nothing can be written there.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(out, error.strerror) from error
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = out.with_name(f"{out.name}.lock")
    while True:
        try:
            file = path.open("w")
        except OSError as error:
            raise _not_writable(out, error.strerror) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise EvalError(f"another process is writing {out}. Wait for it, or choose another --out.") from error
            try:
                is_current = os.fstat(file.fileno()).st_ino == path.stat().st_ino
            except FileNotFoundError:
                is_current = False
            if not is_current:  # its last holder removed it after we had opened it: what we hold locks nobody out
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
