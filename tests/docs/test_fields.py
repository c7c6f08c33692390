"""The field tables of docs/yaml.md and README.md are those of the code: every field, its default, its choices."""

import re

import pytest
from tests.docs.blocks import ROOT

pytest.importorskip("llamafactory", reason="llamafactory is not installed (extra llamafactory)")

from crosslore.compact.attach import WEIGHTS  # noqa: E402
from crosslore.config import CHOICES  # noqa: E402
from crosslore.integrations.llamafactory.arguments import (  # noqa: E402
    CONFIG_FIELDS,
    FIELDS,
    GRADIENTS,
    CrossLoreArguments,
)
from crosslore.integrations.llamafactory.optimizer import RULES  # noqa: E402
from crosslore.integrations.llamafactory.webui import shown  # noqa: E402
from crosslore.presets import get_preset  # noqa: E402
from crosslore.registry import REGISTRY  # noqa: E402

# Set by the type itself.
HIDDEN = {"use_crosslore"}
OWN_CHOICES = {
    "crosslore_gradients": GRADIENTS, "crosslore_weights": WEIGHTS, "crosslore_clip": ("weight", "stale-global"),
    "crosslore_projector": tuple(REGISTRY["projector"].keys() - {"cross_head"}),
    "crosslore_moments": tuple(REGISTRY["moments"]),
}  # fmt: skip


def table(file: str) -> dict[str, list[str]]:
    """Return the cells behind the name of each row of the table that starts with `field | default`."""
    text = (ROOT / file).read_text(encoding="utf-8")
    rows = re.search(r"^\| field \| default \|.*\n\|[-| ]+\n((?:\|.*\n)+)", text, re.M).group(1)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows.splitlines()]
    return {name.strip("`"): rest for name, *rest in cells}


def default(field: str) -> str:
    """Return what a field is if it is left out, as YAML has it."""
    value = getattr(CrossLoreArguments(), field)
    if value is None and field in CONFIG_FIELDS and field != "crosslore_seed":
        value = shown(CONFIG_FIELDS[field], get_preset("crosslore").config)
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize("file", ["docs/yaml.md", "README.md"])
def test_the_table_has_every_field_with_its_default(file: str) -> None:
    found = table(file)
    assert found.keys() == FIELDS - HIDDEN
    said = {name: cells[0] for name, cells in found.items()}
    if said["crosslore_seed"] == "the training seed":
        said["crosslore_seed"] = "unset"
    assert said == {name: default(name) for name in FIELDS - HIDDEN}


def test_choices_are_those_of_the_code() -> None:
    choices = {name: CHOICES[field] for name, field in CONFIG_FIELDS.items() if field in CHOICES} | OWN_CHOICES
    for name, allowed in choices.items():
        assert sorted(table("docs/yaml.md")[name][1].split(", ")) == sorted(allowed), name


def test_the_rules_of_optim_are_all_named() -> None:
    for file in ("docs/yaml.md", "README.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert all(f"`{name}`" in text for name in RULES)


def test_the_papers_letters_have_the_same_defaults() -> None:
    """docs/equations.md."""
    text = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| `([\w`, ]+)` \| ([^|]+) \|$", text, re.M)
    preset = get_preset("crosslore")
    values = {**vars(preset.config), "betas": preset.betas, "eps": preset.eps}
    assert len(rows) == 7
    for name, yaml_name, said in rows:
        value = values[name]
        assert CONFIG_FIELDS.get(yaml_name, name) == name
        assert [float(part) for part in said.split(",")] == list(value if isinstance(value, tuple) else (value,))
