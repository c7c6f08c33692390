"""Checks of option values; each message says what is wrong, the value, what is allowed, what to do."""

import math

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
