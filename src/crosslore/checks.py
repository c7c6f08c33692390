"""Checks of option values; each message says what is wrong, the value, what is allowed, what to do."""

import math

import torch

from crosslore.registry import unknown_name


def check_int(name: str, value: object, *, low: int, hint: str) -> None:
    """Raise a TypeError or ValueError unless `value` is an integer >= `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer >= {low}, got {value!r} ({type(value).__name__}). {hint}")
    if value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value}. {hint}")


def check_float(
    name: str,
    value: object,
    *,
    low: float,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
    hint: str,
) -> None:
    """Raise a TypeError or ValueError unless `value` is a finite number between `low` and `high`."""
    allowed = f"{'>' if low_open else '>='} {low:g}"
    if high < math.inf:
        allowed += f" and {'<' if high_open else '<='} {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number {allowed}, got {value!r} ({type(value).__name__}). {hint}")
    too_low = value < low or (low_open and value == low)
    too_high = value > high or (high_open and value == high)
    if not math.isfinite(value) or too_low or too_high:
        raise ValueError(f"{name} must be a number {allowed}, got {value!r}. {hint}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(unknown_name(name, value, choices))


def check_names(name: str, value: object, *, whole: str | None = None) -> str | tuple[str, ...]:
    """Return module names as a tuple, or `whole` as it is; raise a TypeError for anything else."""
    if isinstance(value, str) and value == whole:
        return value
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple | list) or not names or not all(isinstance(n, str) and n for n in names):
        also = f"{whole!r} or " if whole else ""
        raise TypeError(
            f"{name} must be {also}a list of module names, got {value!r}. Example: {name}=('q_proj', 'k_proj')."
        )
    return tuple(names)


def check_bool(name: str, value: object, *, hint: str) -> None:
    """Raise a TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__}). {hint}")


def check_limits(accumulation_steps: int, max_grad_norm: float | None, clip: str) -> None:
    """Raise a TypeError or ValueError for an option out of range."""
    check_int("accumulation_steps", accumulation_steps, low=1, hint="1: a step for each backward pass.")
    check_choice("clip", clip, ("weight", "stale-global"))
    if max_grad_norm is not None:
        check_float("max_grad_norm", max_grad_norm, low=0.0, low_open=True, hint="None switches clipping off.")


def refuse_several_processes(mode: str) -> None:
    """Raise a ValueError in a process that trains together with others."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size() > 1:
        raise ValueError(
            f"{mode} steps one process's gradients, got {torch.distributed.get_world_size()} processes. "
            "Train with gradients='full' on several GPUs, or on one GPU."
        )
