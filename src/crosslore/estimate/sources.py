"""From what the user names to a model on torch's meta device: a folder, a config.json, a known name, a hub id."""

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crosslore.registry import unknown_name

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class EstimateError(ValueError):
    """What was asked for cannot be estimated; the message is one line for the user."""


@cache
def known_models() -> dict[str, dict[str, Any]]:  # Any: JSON
    """Return the configurations that work without a file and without a network, by name."""
    found: dict[str, dict[str, Any]] = json.loads(files("crosslore.estimate").joinpath("models.json").read_text())
    return found


def load_config(model: str) -> Any:  # Any: transformers' own
    """Return transformers' configuration of a model.

    Args:
        model: folder with a config.json, a config.json itself, a name of `known_models`, or a hub id ("owner/name").

    Raises:
        EstimateError: if there is no such model, its configuration cannot be read, or transformers is missing.
    """
    transformers = _transformers()
    path = Path(model)
    if path.exists():
        return _from_file(transformers, path / "config.json" if path.is_dir() else path)
    known = {name.lower(): values for name, values in known_models().items()}
    if model.lower() in known:
        return transformers.AutoConfig.for_model(**known[model.lower()])
    if "/" not in model or model.startswith((".", "/", "~")):
        hint = " A folder with a config.json and a hub id (owner/name) are allowed too."
        raise EstimateError(unknown_name("model", model, known_models()) + hint)
    try:
        return transformers.AutoConfig.from_pretrained(model)
    except Exception as error:  # the hub's own kinds of errors are many; what they say goes on to the user
        raise EstimateError(
            f"the configuration of {model!r} cannot be had from the hub ({_first_line(error)}). "
            "Give a folder with its config.json, or one of " + ", ".join(known_models()) + "."
        ) from error


def meta_model(config: Any, dtype: str) -> nn.Module:  # Any: transformers' own
    """Return the causal language model of a configuration without memory, in "bf16" or "fp32".

    Raises:
        EstimateError: if transformers has no such model.
    """
    transformers = _transformers()
    try:
        with torch.device("meta"):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    except (ValueError, ImportError, AttributeError) as error:
        raise EstimateError(
            f"transformers builds no causal language model of type {getattr(config, 'model_type', '?')!r} "
            f"({_first_line(error)}). Use a decoder such as LLaMA, Mistral or Qwen2."
        ) from error
    return model


def _from_file(transformers: Any, path: Path) -> Any:  # Any: transformers' own
    if not path.is_file():
        raise EstimateError(f"no configuration at {path}. A model's folder holds a config.json; give that folder.")
    try:
        return transformers.AutoConfig.from_pretrained(str(path))
    except Exception as error:  # JSON that is none, a type that is unknown, values that the type refuses
        raise EstimateError(
            f"{path} is no configuration that transformers reads ({_first_line(error)}). "
            "Give the config.json of a causal language model."
        ) from error


def _transformers() -> Any:  # Any: an optional package
    try:
        import transformers
    except ImportError as error:
        raise EstimateError(
            "transformers is not installed, and the shapes of a model come from it. "
            'Install it: pip install "crosslore[estimate]"'
        ) from error
    return transformers


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]
