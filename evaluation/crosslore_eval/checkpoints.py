"""Where a model's files are (folder, LoRA adapter and its base, name on the hub), and what identifies them."""

import hashlib
import json
import os
from pathlib import Path

from crosslore_eval.errors import EvalError

WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".gguf")
ADAPTER = "adapter_config.json"
# Everything else that outputs depend on.
CONFIGURATIONS = ("config.json", ADAPTER, "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
# Files of a checkpoint that have a weight's ending and are none.
TRAINING_STATE = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "training_args.bin")
CHUNK_BYTES = 1 << 24
# A loader would ask again and again, for 23 seconds.
HUB_TIMEOUT_SECONDS = 10


def check_model(name: str, *, base: str | None = None) -> None:
    """Raise `EvalError` unless a model, and of a LoRA adapter its base, is there; the hub is asked once at most.

    Args:
        name: folder or hub name.
        base: of an adapter, instead of the one that it names.
    """
    if Path(name).is_dir():
        _check_folder("model folder", Path(name))
    elif base is None:
        _check_on_hub("--model", name)
    found = adapter_base(name, base=base)
    if found is None:
        return
    if Path(found).is_dir():
        _check_folder("the adapter's base" if base is None else "--base-model", Path(found))
    elif base is not None:
        _check_on_hub("--base-model", base)
    elif (reason := _missing_on_hub(found)) is not None:
        raise EvalError(
            f"the base model of the LoRA adapter {name} must be a folder or a name on the hub, got {found} from its "
            f"adapter_config.json: no such folder here or above the adapter, and {reason}. Give the base with "
            "--base-model DIR."
        )


def _check_folder(what: str, folder: Path) -> None:
    if not any((folder / file).is_file() for file in ("config.json", ADAPTER)):
        raise EvalError(f"{what} must hold config.json or adapter_config.json, got {folder}. {_nearby(folder)}")
    if not any(path.suffix in WEIGHT_ENDINGS and path.name not in TRAINING_STATE for path in folder.iterdir()):
        raise EvalError(f"{what} must hold weights ({', '.join(WEIGHT_ENDINGS)}), got {folder} with none.")


def _check_on_hub(option: str, name: str) -> None:
    if Path(name).exists():
        folder = Path(name).parent
        raise EvalError(f"{option} must be a folder with a model, got the file {name}. Give its folder, {folder}.")
    reason = _missing_on_hub(name) if name.count("/") == 1 else "no name on the hub looks like this"
    if reason is not None:
        raise EvalError(
            f"{option} must be a folder or a name on the hub (owner/name), got {name}, which is not there: {reason}. "
            "Check the path."
        )


def _missing_on_hub(name: str) -> str | None:
    """Return why a model cannot be had from the hub, None if it is in the cache or there."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return "no name on the hub looks like this"
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except HFValidationError:
        return "no name on the hub looks like this"
    except RepositoryNotFoundError:
        return "the hub has no such model, or you may not see it"
    except Exception as error:  # of whichever HTTP package the hub's client uses
        return f"the hub cannot be asked ({str(error).strip().split(chr(10))[0] or type(error).__name__})"
    return None


def _nearby(folder: Path) -> str:
    found = sorted({path.parent.name for path in folder.glob("*/*config.json")})
    return f"Did you mean one of its folders: {', '.join(found)}?" if found else "Check the path, or train first."


def model_hash(name: str, *, base: str | None = None) -> str:
    """Return what identifies a model: a folder's sha256 (weights, configurations, tokenizer), a hub name as it is.

    Args:
        name: folder or hub name. Of a LoRA adapter the base counts too; optimizer states and logs do not.
        base: of an adapter, instead of the one that it names.
    """
    folder = Path(name)
    if not folder.is_dir():
        return _on_hub(name)
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        is_weight = file.suffix in WEIGHT_ENDINGS and file.name not in TRAINING_STATE
        if is_weight or file.name in (*CONFIGURATIONS, *TOKENIZER_FILES):
            digest.update(file.name.encode())
            with file.open("rb") as content:
                while chunk := content.read(CHUNK_BYTES):
                    digest.update(chunk)
    found = adapter_base(name, base=base)
    if found is not None:
        digest.update(model_hash(found).encode())
    return digest.hexdigest()


def _on_hub(name: str) -> str:
    """Return a hub name with the commit of the files that are used, or the name alone if that cannot be found out."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        return f"{name}@{HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS).sha}"
    except Exception:  # no network: then those of the cache are used, and if there are none, loading will say so
        parts = Path(str(try_to_load_from_cache(name, "config.json"))).parts
        return f"{name}@{parts[parts.index('snapshots') + 1]}" if "snapshots" in parts else name


def adapter_base(name: str, *, base: str | None = None) -> str | None:
    """Return the base model of a LoRA adapter's folder, or None if it is no adapter.

    A relative path is looked for in the current folder, then in the adapter's and those above it: training writes it
    relative to where it ran.

    Args:
        name: folder or hub name of the model.
        base: instead of the one that the adapter names.

    Raises:
        EvalError: if the adapter's configuration cannot be read or names no base, or `base` is given for no adapter.
    """
    if base is not None:
        if not (Path(name) / ADAPTER).is_file():
            raise EvalError(f"--base-model is for the folder of a LoRA adapter, got {name}. Leave the option out.")
        return base
    named = named_base(name)
    if named is None:
        return None
    above = Path(name).resolve()
    places = [Path(named), *(parent / named for parent in (above, *above.parents))]
    return str(next((place for place in places if os.path.isfile(place / "config.json")), named))


def named_base(name: str) -> str | None:
    """Return the base as a LoRA adapter's configuration names it, or None if the model is no adapter.

    Raises:
        EvalError: if the configuration cannot be read or names no base.
    """
    file = Path(name) / ADAPTER
    if not file.is_file():
        return None
    try:
        named = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise EvalError(f"{file} must hold one JSON object: {error}. Take it from the original adapter.") from error
    if not named and not file.with_name("config.json").is_file():  # with it: a whole model, trained with an adapter
        raise EvalError(f"{file} must name the adapter's base model, got none. Give it with --base-model DIR.")
    return str(named) if named else None
