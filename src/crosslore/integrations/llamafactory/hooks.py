"""The seams: what is changed in some modules of LLaMA-Factory, right after each of them ran.

| module | seam | change |
|---|---|---|
| launcher | `launch` | checks the stack under it before the heavy imports |
| hparams.parser | `_parse_args` | parses our fields when the type is asked for |
| model.adapter | `_setup_full_tuning` | logs the honest type |
| train.trainer_utils | `create_custom_optimizer`, `create_modelcard_and_push` | our optimizer, the honest type |
| train.tuner | `run_exp` | measures the run if `CROSSLORE_MEASURE` names a file; logs telemetry |
| webui.components.top, webui.locales | `METHODS`, `LOCALES` | our type in the dropdown, our labels |
| webui.components.train, webui.runner | `create_train_tab`, `Runner._parse_train_args` | our tab, what it sends |
| v1.plugins.trainer_plugins.optimizer | `OptimizerPlugin` | our plugin |

For every other fine-tuning type each of them calls the original with the original arguments; but `run_exp` measures
any type when that variable is set, and `_parse_args` refuses our fields and our type's misspelt name with a hint, which
the original would refuse without one.
"""

import copy
import functools
import logging
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from itertools import pairwise
from types import ModuleType
from typing import Any

from crosslore.integrations.llamafactory import compat

TYPE = "crosslore"
# Fields of the type that do not start with its name.
OWN_NAMES = ("rank", "alpha", "residual_ratio", "warmup_k")


def patch(module: ModuleType) -> None:
    """Change one module that just ran; a seam that is not there is remembered and raised when the type is used."""
    for name, make in SEAMS.get(module.__name__, {}).items():
        owner, _, attribute = name.rpartition(".")
        holder = getattr(module, owner, None) if owner else module
        original = getattr(holder, attribute, None)
        if not callable(original):
            compat.report(f"{module.__name__} has no function {name}")
        elif not hasattr(original, "__crosslore__"):
            wrapped = functools.wraps(original)(make(module, original))
            wrapped.__crosslore__ = True  # type: ignore[attr-defined]
            setattr(holder, attribute, wrapped)
    for name, add in ADDITIONS.get(module.__name__, {}).items():
        if hasattr(module, name):
            add(module)
        else:
            compat.report(f"{module.__name__} has no {name}")


def asks_for_type(args: Any) -> bool:  # Any: a dict from a file, or a list of command-line words
    """Return whether these arguments ask for `finetuning_type: crosslore`."""
    if isinstance(args, dict):
        return args.get("finetuning_type") == TYPE
    return option_values(args).get("finetuning_type") == TYPE


def option_values(words: list[Any]) -> dict[str, str]:  # Any: command-line words
    """Return the options of a command line: `--some-name=value` and `--some_name value` alike; no value is ""."""
    found: dict[str, str] = {}
    for word, following in pairwise([*map(str, words), "--"]):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name.replace("-", "_")] = value if equals or following.startswith("--") else following
    return found


def _wrap_launch(module: ModuleType, launch: Callable[[], None]) -> Callable[[], None]:
    def checked_launch() -> None:
        if _command_line_asks_for_type(sys.argv[2:]):
            compat.require_supported()
            compat.require_matching_torch()
        launch()

    return checked_launch


def _command_line_asks_for_type(words: list[str]) -> bool:
    """Return whether `llamafactory-cli COMMAND words` asks for the type; an unreadable file is left to upstream."""
    overrides = dict(word.split("=", 1) for word in words[1:] if "=" in word and not word.startswith("-"))
    if "finetuning_type" in overrides or not words or not words[0].endswith((".yaml", ".yml", ".json")):
        return overrides.get("finetuning_type") == TYPE or asks_for_type(words)
    import yaml  # LLaMA-Factory depends on it; JSON is YAML too

    try:
        with open(words[0], encoding="utf-8") as file:
            return asks_for_type(yaml.safe_load(file) or {})
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError):
        return False


def _wrap_parse(module: ModuleType, parse: Callable[..., Any]) -> Callable[..., Any]:
    def parse_with_type(parser: Any, args: Any = None, allow_extra_keys: bool = False) -> Any:
        kinds = list(parser.dataclass_types)
        args = module.read_args(args)
        wants_help = isinstance(args, list) and ("-h" in args or "--help" in args)
        if module.FinetuningArguments not in kinds or not (asks_for_type(args) or wants_help):
            if module.FinetuningArguments in kinds and not allow_extra_keys:
                _refuse_near_miss(args, {name for kind in kinds for name in kind.__dataclass_fields__})
            return parse(parser, args, allow_extra_keys)
        try:
            compat.require_supported()
        except compat.UnsupportedError:
            if asks_for_type(args):
                raise
            return parse(parser, args, allow_extra_keys)  # only help was asked for
        from crosslore.integrations.llamafactory.arguments import (
            FIELDS,
            CrossLoreFinetuningArguments,
            refuse_other_methods,
        )
        from crosslore.integrations.llamafactory.checks import check_run, check_sharding_keys

        compat.require_no_clash(FIELDS, {name for kind in kinds for name in kind.__dataclass_fields__})
        kinds[kinds.index(module.FinetuningArguments)] = CrossLoreFinetuningArguments
        if isinstance(args, dict) and not allow_extra_keys:
            _refuse_unknown_keys(args, {name for kind in kinds for name in kind.__dataclass_fields__})
        given = args if isinstance(args, dict) else option_values(args)
        check_sharding_keys(given)
        refuse_other_methods(given)
        parsed = parse(type(parser)(kinds), args, allow_extra_keys)
        check_run(parsed)
        return parsed

    return parse_with_type


def _refuse_unknown_keys(args: dict[str, Any], known: set[str]) -> None:
    from crosslore.factory import PEER_NAMES
    from crosslore.integrations.llamafactory.arguments import CONFIG_FIELDS

    ours = {python_name: yaml_name for yaml_name, python_name in CONFIG_FIELDS.items()}
    for key in args:
        if key not in known:
            near = get_close_matches(str(key), sorted(known), n=3, cutoff=0.6)
            hint = f"Did you mean {' or '.join(near)}?" if near else "See `llamafactory-cli train -h` for all fields."
            here = ours.get(PEER_NAMES.get(str(key), str(key)))
            raise ValueError(
                f"unknown field {key!r} in the configuration. {f'It is `{here}` in a configuration.' if here else hint}"
            )


def _refuse_near_miss(args: Any, known: set[str]) -> None:  # Any: a dict from a file, or command-line words
    """Raise a ValueError for what must have been meant for our type: its name misspelt, or its fields without it."""
    from crosslore.presets import PRESETS

    given = args if isinstance(args, dict) else option_values(args)
    kind = str(given.get("finetuning_type", "lora"))
    if kind in PRESETS or get_close_matches(kind.lower(), [TYPE], cutoff=0.8):
        preset = f" with `crosslore_preset: {kind}`" if kind in PRESETS else ""
        raise ValueError(f"unknown finetuning_type {kind!r}. Did you mean `finetuning_type: {TYPE}`{preset}?")
    ours = [key for key in given if (key in OWN_NAMES or str(key).startswith(f"{TYPE}_")) and key not in known]
    if ours:
        raise ValueError(
            f"{', '.join(ours)}: these fields are for `finetuning_type: {TYPE}`, got {kind!r}. Set that type, or "
            "remove them."
        )


def _wrap_full_tuning(module: ModuleType, setup: Callable[..., Any]) -> Callable[..., Any]:
    def setup_with_honest_log(model: Any, finetuning_args: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(finetuning_args, "use_crosslore", False):
            return setup(model, finetuning_args, *args, **kwargs)

        def rename(record: logging.LogRecord) -> bool:
            record.msg = str(record.msg).replace("Fine-tuning method: Full", "Fine-tuning method: CrossLore")
            return True

        module.logger.addFilter(rename)
        try:
            return setup(model, finetuning_args, *args, **kwargs)
        finally:
            module.logger.removeFilter(rename)

    return setup_with_honest_log


def _wrap_optimizer(module: ModuleType, create: Callable[..., Any]) -> Callable[..., Any]:
    def create_with_type(model: Any, training_args: Any, finetuning_args: Any) -> Any:
        if not getattr(finetuning_args, "use_crosslore", False):
            return create(model, training_args, finetuning_args)
        from crosslore.integrations.llamafactory.optimizer import create_crosslore_optimizer

        optimizer = create_crosslore_optimizer(model, training_args, finetuning_args)
        module.logger.info_rank0(f"Using CrossLore ({finetuning_args.crosslore_preset}): {optimizer!r}")
        return optimizer

    return create_with_type


def _wrap_model_card(module: ModuleType, push: Callable[..., Any]) -> Callable[..., Any]:
    def push_with_honest_type(
        trainer: Any, model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any
    ) -> Any:
        if getattr(finetuning_args, "use_crosslore", False):
            finetuning_args = copy.copy(finetuning_args)
            finetuning_args.finetuning_type = TYPE
        return push(trainer, model_args, data_args, training_args, finetuning_args)

    return push_with_honest_type


def _wrap_run(module: ModuleType, run: Callable[..., None]) -> Callable[..., None]:
    def run_with_callbacks(args: Any = None, callbacks: list[Any] | None = None) -> None:
        added: list[Any] = []  # transformers' callbacks
        path = os.environ.get("CROSSLORE_MEASURE")
        if path:
            from crosslore.integrations.measure import MeasureCallback

            added.append(MeasureCallback(path))
        if asks_for_type(module.read_args(args)):
            from crosslore.integrations.telemetry import TelemetryCallback

            added.append(TelemetryCallback(every=None))  # logs if `crosslore_telemetry` made something look
        run(args, [*(callbacks or []), *added] if added else callbacks)

    return run_with_callbacks


def _webui() -> ModuleType:
    """Return our side of the page, loaded only where the page is."""
    from crosslore.integrations.llamafactory import webui

    return webui


def _of_webui(name: str) -> Callable[[ModuleType, Callable[..., Any]], Callable[..., Any]]:
    return lambda module, original: getattr(_webui(), name)(module, original)


def _register_v1(module: ModuleType) -> None:
    from crosslore.integrations.llamafactory.v1 import register

    register(module)


# Module -> function -> what makes the replacement from (module, original).
SEAMS: dict[str, dict[str, Callable[[ModuleType, Callable[..., Any]], Callable[..., Any]]]] = {
    "llamafactory.launcher": {"launch": _wrap_launch},
    "llamafactory.hparams.parser": {"_parse_args": _wrap_parse},
    "llamafactory.model.adapter": {"_setup_full_tuning": _wrap_full_tuning},
    "llamafactory.train.trainer_utils": {
        "create_custom_optimizer": _wrap_optimizer,
        "create_modelcard_and_push": _wrap_model_card,
    },
    "llamafactory.train.tuner": {"run_exp": _wrap_run},
    "llamafactory.webui.components.train": {"create_train_tab": _of_webui("wrap_train_tab")},
    "llamafactory.webui.runner": {"Runner._parse_train_args": _of_webui("wrap_train_args")},
}
# Module -> name of a value that is added to -> what adds to it.
ADDITIONS: dict[str, dict[str, Callable[[ModuleType], None]]] = {
    "llamafactory.webui.components.top": {"METHODS": lambda module: _webui().add_type(module)},
    "llamafactory.webui.locales": {"LOCALES": lambda module: _webui().add_locales(module)},
    # Where releases after 0.9.5 have it, and where it is.
    "llamafactory.v1.plugins.trainer_plugins.optimizers.optimizer": {"OptimizerPlugin": _register_v1},
    "llamafactory.v1.plugins.trainer_plugins.optimizer": {"OptimizerPlugin": _register_v1},
}
