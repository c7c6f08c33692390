"""Hugging Face's Trainer, and what is built on it (TRL's SFTTrainer): its arguments as those of `create_optimizer`.

    args = TrainingArguments(..., learning_rate=1e-5)
    Trainer(model, args, ..., optimizer_cls_and_kwargs=trainer_optimizer(args, "crosslore", rank=128))

Checkpoints, resume, accumulation, schedulers and bf16 are the Trainer's own and work as with any optimizer.
"""

import logging
import os
from typing import Any

from torch import nn

from crosslore.factory import create_optimizer
from crosslore.integrations.accelerate import report_true_norm
from crosslore.optimizer import LowRankOptimizer

logger = logging.getLogger(__name__)

# Modes that take their gradients before a Trainer could clip them, and so clip themselves.
TAKING = ("compact", "layerwise", "compact-layerwise")


class OptimizerFactory:
    """What the Trainer calls with its model: an optimizer for every trainable weight."""

    def __call__(self, model: nn.Module, **options: Any) -> LowRankOptimizer:  # Any: of create_optimizer
        """Return the optimizer of a model; see `create_optimizer`."""
        return create_optimizer(model, **options)


def trainer_optimizer(
    args: Any,  # Any: transformers' TrainingArguments
    preset: str = "crosslore",
    **overrides: Any,  # Any: of create_optimizer
) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    """Return what `Trainer(optimizer_cls_and_kwargs=...)` takes.

    Args:
        args: the Trainer's; its learning rate and weight decay are taken, its betas and epsilon where they are not
            transformers' defaults, and for gradients that are not whole its accumulation steps and `max_grad_norm`.
        preset: a name of `PRESETS`.
        **overrides: options of `create_optimizer`, which come before those of `args`.

    Raises:
        TypeError: if `args` are no training arguments.
        ValueError: if the Trainer would undo loss scaling after weights have stepped, or shard the weights, or split a
            batch over several GPUs where the gradients are not whole.
        RuntimeError: if transformers is too old to give its model to an optimizer.
    """
    import transformers

    if not hasattr(transformers.trainer, "is_optimizer_factory"):
        raise RuntimeError(
            f"trainer_optimizer needs a transformers whose Trainer gives its model to the optimizer, got "
            f"{transformers.__version__}. Run `pip install -U transformers`, or use "
            "Trainer(optimizers=(create_optimizer(model, ...), None))."
        )
    for name in ("learning_rate", "gradient_accumulation_steps", "max_grad_norm", "adam_beta1"):
        if not hasattr(args, name):
            raise TypeError(
                f"trainer_optimizer takes transformers' TrainingArguments, got {type(args).__name__}, which has no "
                f"{name}. Pass the `args` of the Trainer."
            )
    options: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if (args.adam_beta1, args.adam_beta2) != (0.9, 0.999):
        options["betas"] = (args.adam_beta1, args.adam_beta2)
    if args.adam_epsilon != 1e-8:
        options["eps"] = args.adam_epsilon
    _warn_of_optim(args, overrides)
    mode = overrides.get("gradients") or ("layerwise" if overrides.get("layerwise") else "full")
    if mode in TAKING:
        options["accumulation_steps"] = args.gradient_accumulation_steps
        options["max_grad_norm"] = args.max_grad_norm or None
        report_true_norm()
    elif overrides.get("max_grad_norm") is not None:
        raise ValueError(
            f"max_grad_norm must be given to TrainingArguments for gradients={mode!r}, got "
            f"{overrides['max_grad_norm']!r} here: the Trainer clips whole gradients itself. Leave it out here."
        )
    if str(mode).endswith("layerwise") and args.fp16:
        raise ValueError(
            f"fp16 must be False for gradients={mode!r}: the loss scaling is undone after backward, when the weights "
            "have stepped. Use bf16=True or fp32, or gradients='compact'."
        )
    _refuse_several(args, mode)
    return OptimizerFactory, {"preset": preset, **options, **overrides}


def _warn_of_optim(args: Any, overrides: dict[str, Any]) -> None:  # Any: transformers' TrainingArguments; options
    """Warn that the Trainer's own choice of an optimizer is not read."""
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in ("adamw_torch", "adamw_torch_fused") and "rule" not in overrides:
        eight_bit = " For 8-bit moments give rule='adamw8bit' to trainer_optimizer." if "8bit" in optim else ""
        logger.warning("optim=%r is not read: the optimizer is crosslore's.%s", optim, eight_bit)


def _refuse_several(args: Any, mode: str) -> None:  # Any: transformers' TrainingArguments
    """Raise a ValueError for weights in parts, and for compact or layerwise gradients of several GPUs."""
    for name, what in (("deepspeed", "DeepSpeed ZeRO"), ("fsdp", "FSDP")):
        if getattr(args, name, None) or os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() in ("1", "true"):
            raise ValueError(
                f"{what} does not work with crosslore: its optimizer sees flat or sharded weights instead of matrices. "
                f"Remove `{name}` from the training arguments and from accelerate's configuration; plain DDP works."
            )
    if mode in TAKING and args.n_gpu > 1:
        raise ValueError(
            f"gradients must be 'full' where one process uses several GPUs, got {mode!r} and {args.n_gpu} GPUs: each "
            "would hand over the gradient of its share of a batch. Set CUDA_VISIBLE_DEVICES=0."
        )
