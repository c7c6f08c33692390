"""Run `crosslore-eval predict` in forked processes, each killed by SIGKILL at another of its writes, and again.

    python killed_at_each_write.py MODEL DATA FOLDER first|overwrite

Prints one JSON object: the points at which processes were killed, and what was wrong after those that were. Run by
test_predict.py: forks of one process that has imported everything are quick, and forks of pytest would not be safe.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosslore_eval import cli

SECONDS_EACH = 60


class Points:
    """Counts what changes files below a folder, and kills the process at one of these points."""

    def __init__(self, folder: Path, at: int | None) -> None:
        self.folder, self.at, self.names = folder, at, []
        for module, name in ((os, "replace"), (os, "fsync"), (os, "truncate"), (Path, "unlink")):
            setattr(module, name, self.before(getattr(module, name), name))
        open_path = Path.open
        points = self

        def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            if mode[0] == "r" or path.parent != points.folder:
                return open_path(path, mode, *args, **options)
            points.reach(f"open {path.name}")
            return Written(open_path(path, mode, *args, **options), points, path.name)

        Path.open = opened

    def reach(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.reach(f"{name} {Path(args[0]).name}" if isinstance(args[0], str | Path) else name)
            return call(*args, **options)

        return counted


class Written:
    """A file whose writes reach the disk in two halves, with a point between and one after."""

    def __init__(self, file: Any, points: Points, name: str) -> None:
        self.file, self.points, self.name = file, points, name

    def write(self, data: Any) -> None:
        half = len(data) // 2
        self.file.write(data[:half])
        self.file.flush()
        self.points.reach(f"half of a write to {self.name}")
        self.file.write(data[half:])
        self.points.reach(f"a write to {self.name} before its flush")

    def __enter__(self) -> "Written":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def run(words: list[str], out: Path, *, at: int | None = None, names: Path | None = None) -> int:
    """Return how a forked process ended: its code, or minus the signal."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS_EACH)
        points = Points(out.parent, at)
        code = cli.main([*words, "--out", str(out)])
        if names is not None:
            with open(names, "w") as file:
                json.dump(points.names, file)
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> None:
    model, data, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    options = ["--data", data, "--batch-size", "2", "--max-new-tokens", "6", "--device", "cpu"]
    words = ["predict", "e2e", "--model", model, *options]
    before = [*words, "--max-new-tokens", "3"]  # a file with other settings, which is replaced
    (folder / "whole").mkdir(parents=True)
    whole = folder / "whole" / "out.jsonl"
    assert cli.main([*words, "--out", str(whole)]) == 0  # in this process: it loads what all others need
    old = folder / "old" / "out.jsonl"
    assert run(before, old) == 0
    replaced = sys.argv[4] == "overwrite"
    if replaced:
        words += ["--overwrite"]

    def start(name: str) -> Path:
        (folder / name).mkdir()
        for file, held in content(old.parent).items() if replaced else ():
            (folder / name / file).write_bytes(held)
        return folder / name / "out.jsonl"

    names, wrong = folder / "names.json", {}
    assert run(words, start("counted"), names=names) == 0
    points = json.loads(names.read_text())
    for at in range(1, len(points) + 1):
        out = start(str(at))
        codes = [run(words, out, at=at)]
        states = {whole.read_bytes(), *([old.read_bytes()] if replaced else [])}
        is_whole = not out.is_file() or out.read_bytes() in states
        codes += [run(words, out, at=1 + at * 7 % len(points)), run(words, out)]
        same = content(out.parent) == content(whole.parent)
        if codes[0] != -signal.SIGKILL or codes[2] != 0 or not is_whole or not same:
            wrong[f"{at}: {points[at - 1]}"] = {"codes": codes, "whole": is_whole, "same": same}
    print(json.dumps({"points": points, "wrong": wrong}))


if __name__ == "__main__":
    main()
