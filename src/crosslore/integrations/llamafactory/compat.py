"""What must hold for the type to work here: the version of LLaMA-Factory, its seams, and the stack under it."""

import importlib
import importlib.metadata
import importlib.util

# The releases that the tests ran with.
TESTED = ("0.9.5",)
# The set of versions in constraints.txt that belongs together.
TORCH_PINS = "torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0"

# Seams that were not found as expected, one line each; filled while modules are patched.
_problems: list[str] = []


class UnsupportedError(RuntimeError):
    """The type `crosslore` cannot be used with what is installed; the message says why and what to do."""


def report(problem: str) -> None:
    """Remember that a seam moved; raised only when the type is used."""
    _problems.append(problem)


def require_supported() -> None:
    """Raise an UnsupportedError if this LLaMA-Factory was not tested or a seam moved."""
    version = importlib.metadata.version("llamafactory")
    problems = list(_problems)
    if version not in TESTED:
        problems.insert(0, f"version {version} is not among the tested ones")
    if problems:
        raise UnsupportedError(
            f"`finetuning_type: crosslore` does not work with the installed llamafactory {version}: "
            f"{'; '.join(problems)}. Tested: {', '.join(TESTED)}. "
            f'Run `pip install "llamafactory=={TESTED[-1]}"`; other fine-tuning types are not affected.'
        )


def require_no_clash(ours: set[str], theirs: set[str]) -> None:
    """Raise an UnsupportedError if LLaMA-Factory has fields of the names that the type brings."""
    clash = sorted(ours & theirs)
    if clash:
        raise UnsupportedError(
            f"llamafactory {importlib.metadata.version('llamafactory')} has fields of its own called {clash}, "
            f"which `finetuning_type: crosslore` brings too. Tested: {', '.join(TESTED)}. "
            f'Run `pip install "llamafactory=={TESTED[-1]}"`; other fine-tuning types are not affected.'
        )


def require_matching_torch() -> None:
    """Raise an UnsupportedError if torchaudio was built for another CUDA version than torch.

    LLaMA-Factory imports torchaudio, which then refuses to load; pip picks such a pair when nothing is pinned.
    """
    if importlib.util.find_spec("torchaudio") is None:
        return
    try:
        importlib.import_module("torchaudio")
    except (RuntimeError, OSError) as error:
        torch, audio = (importlib.metadata.version(name) for name in ("torch", "torchaudio"))
        raise UnsupportedError(
            f"torch {torch} and torchaudio {audio} do not belong together: {' '.join(str(error).split())} "
            f"LLaMA-Factory needs both. Run `pip install {TORCH_PINS}` (the tested set, see constraints.txt)."
        ) from error
