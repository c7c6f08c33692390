"""Models to evaluate: plain checkpoints, what LLaMA-Factory saves, LoRA adapters, and names on the hub."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosslore_eval.errors import EvalError

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".gguf")
# Everything else that outputs depend on.
CONFIGURATIONS = ("config.json", "adapter_config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
# Files of a checkpoint that have a weight's ending and are none.
TRAINING_STATE = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "training_args.bin")
CHUNK_BYTES = 1 << 24


def check_model(name: str) -> None:
    """Raise `EvalError` unless `name` is a folder with a model, or can be a name on the hub."""
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise EvalError(f"model folder must hold config.json or adapter_config.json, got {name}. {_nearby(folder)}")
        if not any(path.suffix in WEIGHT_ENDINGS and path.name not in TRAINING_STATE for path in folder.iterdir()):
            raise EvalError(f"model folder must hold weights ({', '.join(WEIGHT_ENDINGS)}), got {name} with none.")
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise EvalError(f"--model must be a folder or a name on the hub (owner/name), got {name}, which is not there.")


def _nearby(folder: Path) -> str:
    found = sorted({path.parent.name for path in folder.glob("*/*config.json")})
    return f"Did you mean one of its folders: {', '.join(found)}?" if found else "Check the path, or train first."


def model_hash(name: str) -> str:
    """Return what identifies a model: a folder's sha256 (weights, configurations, tokenizer), a hub name as it is.

    Args:
        name: folder or hub name. Of a LoRA adapter the base counts too; optimizer states and logs do not.
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
    base = adapter_base(name)
    if base is not None:
        digest.update(model_hash(base).encode())
    return digest.hexdigest()


def _on_hub(name: str) -> str:
    """Return a hub name with the commit of the files that are used, or the name alone if that cannot be found out."""
    from transformers.utils import cached_file

    try:
        file = cached_file(name, "config.json")
    except (OSError, ValueError):  # loading will say what is wrong
        return name
    parts = Path(str(file)).parts
    return f"{name}@{parts[parts.index('snapshots') + 1]}" if "snapshots" in parts else name


def adapter_base(name: str) -> str | None:
    """Return the base model that a LoRA adapter's folder names, or None if it is no adapter."""
    file = Path(name) / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise EvalError(f"{file} must hold one JSON object: {error}. Take it from the original adapter.") from error
    return str(base) if base else None


def pick_device(name: str | None = None) -> Any:
    """Return the device of that name; for None the CUDA device when there is one, else the CPU."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise EvalError(f"--device must be a torch device such as cpu or cuda:0, got {name}.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EvalError(f"--device {name} needs a CUDA device, and torch sees none. Leave the option out.")
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise EvalError(f"--device {name} does not work here: {reason}. Leave the option out.") from error
    return device


def pick_dtype(name: str, device: Any) -> Any:
    """Return the torch dtype of that name; for "auto" bf16 on a GPU, fp32 on a CPU."""
    import torch

    if name not in DTYPES:
        raise EvalError(f"--dtype must be one of {', '.join(DTYPES)}, got {name}.")
    return getattr(torch, {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(name, name))


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model: of an adapter its own if it was saved with it, else its base's."""
    from transformers import AutoTokenizer

    base = adapter_base(name)
    has_own = (Path(name) / "tokenizer_config.json").is_file()
    return _from_pretrained(AutoTokenizer, name if base is None or has_own else base)


def load_model(name: str | Path, *, device: Any = None, dtype: Any = None) -> tuple[Any, Any]:
    """Return the model in evaluation mode and its tokenizer; `Any` because transformers' classes are dynamic.

    Args:
        name: folder or hub name; a LoRA adapter is put on its base and merged.
        device: where to put the model (default: `pick_device()`).
        dtype: of its weights (default: bf16 on a GPU, fp32 on a CPU).

    Raises:
        EvalError: if there is no such model, or it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    check_model(str(name))
    device = pick_device() if device is None else device
    dtype = pick_dtype("auto", device) if dtype is None else dtype
    base = adapter_base(str(name))
    model = _from_pretrained(AutoModelForCausalLM, str(name) if base is None else base, dtype=dtype)
    tokenizer = load_tokenizer(str(name))
    if base is not None:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise EvalError(f"{name} is a LoRA adapter, which needs peft: pip install peft") from error
        rows = embedding_rows(Path(name)) or max(len(tokenizer), model.get_input_embeddings().num_embeddings)
        if rows != model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(rows)  # training added tokens
        model = _loaded(str(name), lambda: PeftModel.from_pretrained(model, str(name)).merge_and_unload())
    return model.to(device).eval(), tokenizer


def embedding_rows(adapter: Path) -> int | None:
    """Return how many rows the embeddings have that an adapter brings along, None if it brings none.

    LLaMA-Factory rounds them up when it adds tokens, so the tokenizer does not tell.
    """
    from safetensors import SafetensorError, safe_open

    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as held:
            names = [name for name in held.keys() if "embed_tokens" in name or "lm_head" in name]  # noqa: SIM118
            whole = [name for name in names if "lora_" not in name]
            return int(held.get_slice(whole[0]).get_shape()[0]) if whole else None
    except SafetensorError as error:
        raise EvalError(f"cannot load {file}: {error}. It may be incomplete.") from error


def _from_pretrained(kind: Any, name: str, **options: Any) -> Any:
    return _loaded(name, lambda: kind.from_pretrained(name, **options))


def _loaded(name: str, load: Callable[[], Any]) -> Any:
    """Return what `load` returns; whatever is wrong with the files becomes one line."""
    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise EvalError(f"cannot load {name}: {type(error).__name__}: {reason}") from error
