"""The error that a user of the command line can act on."""

from collections.abc import Iterable
from difflib import get_close_matches

# What the extra `eval` brings, by the names that are imported.
PACKAGES = (
    "numpy", "sacrebleu", "nltk", "rouge_score", "rouge_chinese", "jieba", "pycocoevalcap", "rich", "torch",
    "transformers", "tqdm", "matplotlib",
)  # fmt: skip


class EvalError(ValueError):
    """Something that the user gave cannot be used; the message says what, its value, what is allowed, what to do."""


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Return what to say of a package of the extra that is missing; None if it is none of them."""
    package = str(error.name).partition(".")[0]
    return f'{package} is not installed. Install with: pip install "crosslore[eval]"' if package in PACKAGES else None


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 example", "2 examples"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shown(value: object) -> str:
    """Return a value for a message, cut to one short line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def unknown_name(kind: str, name: str, known: Iterable[str]) -> EvalError:
    """Return the error for a name that is not in `known`, with the nearest one.

    Args:
        kind: what it should have named, for example "task".
        name: what was given.
        known: the names there are.
    """
    names = list(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return EvalError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")
