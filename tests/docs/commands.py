"""Command lines of the pages: each is given to the program's own parser, or to `make -n`; nothing is started."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.docs.blocks import ROOT, Block

ASSIGNMENT = re.compile(r"^[A-Z][A-Z0-9_]*=")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Stand for a file of the reader.
PLACEHOLDERS = ("config.yaml", "FILE")
FACTORY_COMMANDS = ("api", "chat", "export", "train", "webui", "sft")


def commands_of(block: Block) -> Iterator[list[str]]:
    """Yield the words of each command, continued lines joined, comments left out."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def without_environment(words: list[str]) -> list[str]:
    """Return a command without the variables that are set for it."""
    at = next(i for i, word in enumerate(words) if not ASSIGNMENT.match(word))
    return words[at:]


def is_script(words: list[str]) -> bool:
    """Whether the command runs a Python file of the repository."""
    return words[0] == "python" and words[1].endswith(".py")


def check(words: list[str]) -> None:
    """Raise if the program would not take the command, SystemExit if its parser says so."""
    words = without_environment(words)
    program, *options = words
    checks = {
        "cd": _cd, "crosslore": _crosslore, "crosslore-eval": _crosslore_eval, "git": _git, "make": _make,
        "pip": _pip, "pytest": _pytest, "python": _python, "source": _source,
    }  # fmt: skip
    assert program in checks, f"no check for {program!r}: add one to {__file__}, or mark the block"
    checks[program](options)


def _crosslore(options: list[str]) -> None:
    from crosslore.cli import build_parser

    build_parser().parse_args(options)


def _crosslore_eval(options: list[str]) -> None:
    from crosslore_eval.options import build_parser

    build_parser().parse_args(options)


def _make(options: list[str]) -> None:
    assert shutil.which("make"), "needs make"
    planned(options)


def planned(options: list[str]) -> str:
    """Return what `make` would run."""
    done = subprocess.run(["make", "-n", *options], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _pip(options: list[str]) -> None:
    from pip._internal.commands import create_command

    command, *rest = options
    given, wanted = create_command(command).parse_args(rest)
    for file in given.constraints:
        assert (ROOT / file).is_file(), file
    for requirement in [*wanted, *given.editables]:
        name, _, extras = requirement.partition("[")
        assert name in (".", "crosslore"), requirement
        known = PROJECT["optional-dependencies"]
        assert all(extra in known for extra in extras.rstrip("]").split(",") if extra), requirement


def _pytest(options: list[str]) -> None:
    for path in options:
        assert path.startswith("-") or (ROOT / path).exists(), path


def _python(options: list[str]) -> None:
    assert options[:2] == ["-m", "crosslore.integrations.llamafactory"], options
    assert options[2] in FACTORY_COMMANDS


def _git(options: list[str]) -> None:
    home = next(iter(PROJECT["urls"].values())).split("/blob/")[0]
    assert options == ["clone", home]


def _cd(options: list[str]) -> None:
    assert options == [PROJECT["name"]]


def _source(options: list[str]) -> None:
    assert options == [".venv/bin/activate"]
    assert "VENV := .venv\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


# Reads one command a line; runs each script up to the point where its parser has taken the options.
DRIVER = """
import argparse, runpy, shlex, sys

class Taken(BaseException):
    pass

real = argparse.ArgumentParser.parse_args

def parse_args(self, args=None, namespace=None):
    real(self, args, namespace)
    raise Taken

argparse.ArgumentParser.parse_args = parse_args
modules, path = set(sys.modules), list(sys.path)
for line in sys.stdin:
    file, *options = shlex.split(line)
    for name in [name for name, module in sys.modules.items() if name not in modules
                 and "site-packages" not in (getattr(module, "__file__", None) or "site-packages")]:
        del sys.modules[name]
    sys.argv, sys.path[:] = [file, *options], [file.rpartition("/")[0], *path]
    try:
        runpy.run_path(file, run_name="__main__")
        outcome = "ended without parsing options"
    except Taken:
        outcome = "taken"
    except SystemExit as stop:
        without = stop.code in (None, 0) and not options  # a program without options, run whole
        outcome = "taken" if without else f"refused, exit code {stop.code}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    print("RESULT", outcome, flush=True)
"""


def outcomes(scripts: list[list[str]]) -> list[str]:
    """Return for each script with its options "taken" or what went wrong."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=ROOT, input="".join(shlex.join(words) + "\n" for words in scripts),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(found) == len(scripts), done.stderr[-2000:]
    return found


def existing(path: str) -> Path:
    """Return a file of the repository."""
    found = ROOT / path
    assert found.is_file(), path
    return found
