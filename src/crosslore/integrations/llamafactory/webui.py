"""The CrossLore tab of LLaMA-Factory's WebUI: its elements, what they send, and what a preset sets them to."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from crosslore.compact.attach import WEIGHTS
from crosslore.config import ALL_LINEAR, CHOICES, LowRankConfig
from crosslore.integrations.llamafactory.arguments import CONFIG_FIELDS, GRADIENTS
from crosslore.presets import PRESETS, get_preset
from crosslore.telemetry import EVERY

TYPE = "crosslore"
# Element -> key of the configuration, where they differ: LLaMA-Factory's page has one space of names.
KEYS = {
    "crosslore_rank": "rank",
    "crosslore_alpha": "alpha",
    "crosslore_residual_ratio": "residual_ratio",
    "crosslore_warmup_k": "warmup_k",
}
# Shown in a run's preview even if they are the preset's own.
ALWAYS = ("rank", "alpha")
OF_THE_RESIDUAL = ("residual_ratio", "warmup_k")
# Chosen when the page opens (`make webui`): data sets with commas; the template of a model by its path.
DATASET_VARIABLE, TEMPLATE_VARIABLE = "CROSSLORE_WEBUI_DATASET", "CROSSLORE_WEBUI_TEMPLATE"

Component = Any  # gradio is not typed
Values = dict[str, Any]  # Any: what elements hold


def preset_values(preset: str) -> Values:
    """Return what each element shows for a preset, by element."""
    config = get_preset(preset).config
    return {
        element: shown(CONFIG_FIELDS[key], config)
        for element in ELEMENTS
        if (key := KEYS.get(element, element)) in CONFIG_FIELDS and element not in OTHERS
    }


def shown(field: str, config: LowRankConfig) -> Any:  # Any: a value of an element
    """Return the value of a configuration's field as an element holds it."""
    value = getattr(config, field)
    if field == "targets":
        return "all" if value == ALL_LINEAR else ",".join(value)
    if field.endswith("targets"):
        return ",".join(value) if value else "none" if field == "cross_head_targets" else "all"
    return value


def training_values(values: Mapping[str, Any]) -> Values:  # Any: what elements hold
    """Return the keys that a run's configuration gets from the elements: those that differ from the preset's own.

    Args:
        values: what the elements hold, by element.
    """
    preset = str(values["crosslore_preset"])
    own, config = preset_values(preset), get_preset(preset).config
    sparse = config.residual == "sparse" or float(values["crosslore_residual_ratio"]) > 0
    always = (*ALWAYS, *(OF_THE_RESIDUAL if sparse else ()))
    found: Values = {"crosslore_preset": preset}
    for element, default in own.items():
        key, value = KEYS.get(element, element), values[element]
        if isinstance(default, str) and not str(value).strip():
            value = default
        if key in always or value != default:
            found[key] = value
    for element, default in (("crosslore_gradients", "auto"), ("crosslore_weights", "direct")):
        found[element] = values[element] or default
    if str(values["crosslore_gradients"]).endswith("layerwise"):
        found["crosslore_clip"] = values["crosslore_clip"]
    if values["crosslore_telemetry"]:
        found |= {name: values[name] for name in ("crosslore_telemetry", "crosslore_telemetry_every")}
    for element in ("crosslore_seed", "crosslore_random_after"):
        text = str(values[element] or "").strip()
        if text:
            found[element] = int(text) if text.isdigit() else text  # what is no number is refused by its name later
    return found


def _slider(low: float, high: float, step: float) -> Callable[[Any, Any], Component]:
    return lambda gr, value: gr.Slider(minimum=low, maximum=high, step=step, value=value)


def _dropdown(*choices: str) -> Callable[[Any, Any], Component]:
    return lambda gr, value: gr.Dropdown(choices=list(choices), value=value)


def _text(gr: Any, value: Any) -> Component:
    return gr.Textbox(value=value)


def _switch(gr: Any, value: Any) -> Component:
    return gr.Checkbox(value=value)


# Element -> how it is made; row by row, four in each: with more, help texts are a word wide on a page of 1400 pixels.
ROWS: tuple[dict[str, Callable[[Any, Any], Component]], ...] = (
    {
        "crosslore_preset": _dropdown(*PRESETS),
        "crosslore_rank": _slider(1, 1024, 1),
        "crosslore_alpha": _slider(0.05, 256, 0.05),
        "crosslore_refresh_every": _slider(1, 2000, 1),
    },
    {
        "crosslore_residual_ratio": _slider(0, 0.2, 0.001),
        "crosslore_warmup_k": _slider(0, 2000, 1),
        "crosslore_residual_rule": _dropdown(*CHOICES["residual_rule"]),
        "crosslore_residual_select": _dropdown(*CHOICES["residual_select"]),
    },
    {
        "crosslore_gradients": _dropdown(*GRADIENTS),
        "crosslore_weights": _dropdown(*WEIGHTS),
        "crosslore_clip": _dropdown("weight", "stale-global"),
        "crosslore_embeddings": _dropdown(*CHOICES["embeddings"]),
    },
    {
        "crosslore_target": _text,
        "crosslore_cross_head_target": _text,
        "crosslore_residual_target": _text,
        "crosslore_head_choice": _dropdown(*CHOICES["head_choice"]),
    },
    {
        "crosslore_projector": _dropdown("randomized", "power", "svd", "random", "gaussian"),
        "crosslore_moments": _dropdown("keep", "rotate", "rotate_first", "reset"),
        "crosslore_fit_window": _slider(1, 50, 1),
        "crosslore_random_after": _text,
    },
    {
        "crosslore_seed": _text,
        "crosslore_refresh_stagger": _switch,
        "crosslore_stochastic_rounding": _switch,
    },
    {
        "crosslore_telemetry": _switch,
        "crosslore_telemetry_every": _slider(1, 1000, 1),
    },
)
ELEMENTS = tuple(name for row in ROWS for name in row)
# Values of the elements that no preset sets.
OTHERS: Values = {
    "crosslore_preset": "crosslore", "crosslore_gradients": "auto", "crosslore_weights": "direct",
    "crosslore_clip": "weight", "crosslore_telemetry": False, "crosslore_telemetry_every": EVERY,
    "crosslore_seed": "", "crosslore_random_after": "",
}  # fmt: skip


def create_tab() -> dict[str, Component]:
    """Return the tab and its elements, by name, made where the page is being built."""
    import gradio as gr

    values = {**preset_values("crosslore"), **OTHERS}
    found: dict[str, Component] = {}
    with gr.Accordion(open=False) as tab:
        for row in ROWS:
            with gr.Row():
                found |= {name: make(gr, values[name]) for name, make in row.items()}
    found["crosslore_preset"].input(
        lambda preset: list(preset_values(preset).values()),
        [found["crosslore_preset"]],
        [found[name] for name in preset_values("crosslore")],
        queue=False,
    )
    return {"crosslore_tab": tab, **found}


def add_type(module: Any) -> None:
    """Offer our type in the page's dropdown."""
    if TYPE not in module.METHODS:
        module.METHODS = [*module.METHODS, TYPE]


def add_locales(module: Any) -> None:
    """Add the texts of our elements to the page's."""
    from crosslore.integrations.llamafactory.locales import locales

    module.LOCALES.update(locales())


def wrap_train_tab(module: Any, create: Callable[[Any], dict[str, Component]]) -> Callable[[Any], dict[str, Component]]:
    """Return `create_train_tab` with our tab below BAdam's, its elements among those that a run reads and saves."""

    def create_with_tab(engine: Any) -> dict[str, Component]:
        mine = create_tab()
        base = engine.manager.get_base_elems
        inputs = {element for name, element in mine.items() if name != "crosslore_tab"}
        engine.manager.get_base_elems = lambda: base() | inputs
        try:
            found = create(engine)
        finally:
            del engine.manager.get_base_elems
        _move_behind(mine["crosslore_tab"], found.get("badam_tab"))
        _preselect(engine, found)
        return {**found, **mine}

    return create_with_tab


def wrap_train_args(module: Any, parse: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return `Runner._parse_train_args` with our keys for our type; what the user wrote as extra arguments wins."""

    def parse_with_tab(self: Any, data: Mapping[Component, Any]) -> dict[str, Any]:
        args = parse(self, data)
        if args["finetuning_type"] != TYPE:
            return args
        values = {name: data[self.manager.get_elem_by_id(f"train.{name}")] for name in ELEMENTS}
        return {**training_values(values), **args}

    return parse_with_tab


def _move_behind(element: Component, other: Component | None) -> None:
    """Put an element of the page behind another one of the same parent."""
    siblings = element.parent.children
    if other is not None and other in siblings:
        siblings.remove(element)
        siblings.insert(siblings.index(other) + 1, element)


def _preselect(engine: Any, found: Mapping[str, Component]) -> None:
    """Choose what `make webui` asks for by the environment; nothing without it."""
    names = [name for name in os.environ.get(DATASET_VARIABLE, "").split(",") if name]
    if not names:
        return
    found["dataset"].value, found["dataset"].choices = names, [(name, name) for name in names]
    engine.manager.get_elem_by_id("top.finetuning_type").value = TYPE
    if not torch.cuda.is_available():
        found["compute_type"].value = "fp32"
    if template := os.environ.get(TEMPLATE_VARIABLE):
        from llamafactory.extras.constants import DEFAULT_TEMPLATE

        DEFAULT_TEMPLATE["Custom"] = template
