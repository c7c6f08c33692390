"""What a file of predictions was made from: compared before one is continued or taken as finished."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from crosslore_eval import __version__
from crosslore_eval.errors import EvalError
from crosslore_eval.tasks.base import Example

# JSON values only.
Manifest = dict[str, object]
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "vllm")


def manifest_path(out: Path) -> Path:
    """Return where the manifest of a predictions file is."""
    return out.with_name(f"{out.name}.manifest.json")


def partial_path(out: Path) -> Path:
    """Return where the rows of an unfinished run are."""
    return out.with_name(f"{out.name}.partial")


def examples_hash(examples: Sequence[Example]) -> str:
    """Return the sha256 of prompts' parts and references."""
    text = json.dumps([asdict(example) for example in examples], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the packages that generation depends on."""
    found = {"crosslore_eval": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is complete or not there."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_manifest(out: Path, manifest: Manifest) -> None:
    """Write the manifest beside a predictions file."""
    write_atomically(manifest_path(out), json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_manifest(out: Path) -> Manifest | None:
    """Return the manifest beside a predictions file, or None if there is none that can be read."""
    try:
        held = json.loads(manifest_path(out).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) else None


def check_task(out: Path, task: str) -> None:
    """Raise `EvalError` if the manifest beside `out` says that its outputs are of another task than `task`."""
    held = (read_manifest(out) or {}).get("task")
    if isinstance(held, str) and held != task:
        raise EvalError(
            f"{out} must hold outputs of the task {task}, got those of {held} (so says {manifest_path(out).name}). "
            f"Give {held} as the task, or outputs of {task}; if the manifest belongs to another file, move it away."
        )


def check_same(out: Path, wanted: Mapping[str, object]) -> None:
    """Raise `EvalError` unless the manifest beside `out` says the same; the message names what differs."""
    held = read_manifest(out)
    if held is None:
        found = out if out.exists() else partial_path(out)
        raise EvalError(
            f"{found} is there without a readable manifest ({manifest_path(out).name}). Choose another --out, or "
            "replace it with --overwrite."
        )
    before, now = _flat(held), _flat(wanted)
    changes = [
        f"{name} was {_short(before.get(name))}, now {_short(value)}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if changes:
        raise EvalError(
            f"{out} was made with other settings: {'; '.join(changes)}. Choose another --out, give the same settings, "
            "or replace it with --overwrite."
        )


def _flat(fields: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested settings under dotted names."""
    flat: dict[str, object] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."
