"""What a run with `finetuning_type: crosslore` must not combine; checked before anything is loaded."""

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from crosslore.integrations.llamafactory.optimizer import choose_rule
from crosslore.integrations.llamafactory.resume import skip_incomplete_checkpoints


def check_run(parsed: tuple[Any, ...]) -> None:
    """Raise a ValueError for a combination that cannot work.

    Args:
        parsed: LLaMA-Factory's dataclasses, as its parser returns them; training arguments only when training.
    """
    by_name = {type(args).__name__.removeprefix("CrossLore"): args for args in parsed}
    finetuning, training = by_name.get("FinetuningArguments"), by_name.get("TrainingArguments")
    if training is None or finetuning is None or not finetuning.use_crosslore:
        return
    if training.do_train:
        _refuse_quantised(by_name["ModelArguments"])
    _refuse_sharding(training)
    choose_rule(training.optim)
    if training.do_train and finetuning.crosslore_gradients not in ("full", "auto"):
        _check_processes(training, finetuning.crosslore_gradients)
    if training.do_train and finetuning.crosslore_gradients.endswith("layerwise"):
        _check_layerwise(training, finetuning.crosslore_gradients)
    skip_incomplete_checkpoints(training, finetuning.stage)


def check_sharding_keys(args: dict[str, Any]) -> None:  # Any: values of a configuration
    """Refuse sharding by its keys, before transformers looks at them (it would ask for deepspeed first)."""
    for key, what in (("deepspeed", "DeepSpeed ZeRO"), ("fsdp", "FSDP")):
        if args.get(key):
            _refuse(what)


def _check_processes(training: Any, gradients: str) -> None:  # Any: LLaMA-Factory's TrainingArguments
    """Refuse what takes a gradient before the processes have averaged it."""
    if training.world_size > 1:
        raise ValueError(
            f"crosslore_gradients must be 'full' on {training.world_size} processes, got {gradients!r}: a gradient is "
            "taken before it is averaged. Set CUDA_VISIBLE_DEVICES to one GPU, or use 'full' (or 'auto')."
        )


def _check_layerwise(training: Any, gradients: str) -> None:  # Any: LLaMA-Factory's TrainingArguments
    """Refuse what needs the gradients that layerwise frees."""
    if training.fp16:
        raise ValueError(
            f"fp16 must be false with crosslore_gradients {gradients!r}: the loss scaling is undone after backward, "
            "when the weights have stepped. Use bf16 or fp32, or crosslore_gradients: full."
        )


def _refuse_quantised(model_args: Any) -> None:  # Any: LLaMA-Factory's ModelArguments
    if model_args.quantization_bit is not None:
        raise ValueError(
            f"quantization_bit must be unset for `finetuning_type: crosslore`, got {model_args.quantization_bit}: all "
            "weights are trained, and quantised ones cannot be. Remove it, or use finetuning_type: lora."
        )
    if model_args.use_unsloth:
        raise ValueError(
            "use_unsloth must be false for `finetuning_type: crosslore`: unsloth replaces the layers whose gradients "
            "are projected. Remove it."
        )
    config = Path(model_args.model_name_or_path) / "config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("quantization_config"):
        raise ValueError(
            f"model_name_or_path must be an unquantised model for `finetuning_type: crosslore`, and {config} has a "
            "quantization_config. Use the original bf16 or fp32 weights, or finetuning_type: lora."
        )


def _refuse_sharding(training: Any) -> None:  # Any: LLaMA-Factory's TrainingArguments
    if training.deepspeed:
        _refuse("DeepSpeed ZeRO")
    if training.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        _refuse("FSDP")


def _refuse(sharding: str) -> NoReturn:
    raise ValueError(
        f"`finetuning_type: crosslore` does not work with {sharding} yet, whose optimizer sees flat or sharded "
        "weights instead of matrices. Remove `deepspeed` or `fsdp`; plain DDP (torchrun without them) works."
    )
