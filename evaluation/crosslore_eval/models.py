"""Models to evaluate, loaded: checkpoints, what LLaMA-Factory saves, LoRA adapters, and names on the hub."""

from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

from crosslore_eval.checkpoints import adapter_base, check_model
from crosslore_eval.errors import EvalError

DTYPES = ("auto", "float32", "bfloat16", "float16")


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


def load_tokenizer(name: str, *, base: str | None = None) -> Any:
    """Return the tokenizer of a model: of an adapter its own if it was saved with it, else its base's.

    Args:
        name: folder or hub name.
        base: of an adapter, instead of the one that it names.
    """
    from transformers import AutoTokenizer

    base = adapter_base(name, base=base)
    has_own = (Path(name) / "tokenizer_config.json").is_file()
    return _from_pretrained(AutoTokenizer, name if base is None or has_own else base)


def load_model(name: str | Path, *, device: Any = None, dtype: Any = None, base: str | None = None) -> tuple[Any, Any]:
    """Return the model in evaluation mode and its tokenizer; `Any` because transformers' classes are dynamic.

    Args:
        name: folder or hub name; a LoRA adapter is put on its base and merged.
        device: where to put the model (default: `pick_device()`).
        dtype: of its weights (default: bf16 on a GPU, fp32 on a CPU).
        base: of an adapter, instead of the one that it names.

    Raises:
        EvalError: if there is no such model, or it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    check_model(str(name), base=base)
    device = pick_device() if device is None else device
    dtype = pick_dtype("auto", device) if dtype is None else dtype
    tokenizer = load_tokenizer(str(name), base=base)
    base = adapter_base(str(name), base=base)
    model = _from_pretrained(AutoModelForCausalLM, str(name) if base is None else base, dtype=dtype)
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
        reason = shorten(str(error), 300)
        raise EvalError(f"cannot load {name}: {type(error).__name__}: {reason}") from error
