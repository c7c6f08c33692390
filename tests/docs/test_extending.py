"""docs/extending.md, word for word: its projector and its preset are registered as it says, and train."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from tests.docs.blocks import ROOT, blocks_of
from tests.unit.models import tiny_decoder, train

from crosslore import PRESETS, LowRankConfig, create_optimizer
from crosslore.layout import MatrixLayout
from crosslore.presets import Preset
from crosslore.registry import REGISTRY

TEXTS = [
    block.text for block in blocks_of((ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), "extending.md")
]


def block(start: str) -> str:
    (found,) = [text for text in TEXTS if text.startswith(start)]
    return found


def entry(start: str) -> ast.Dict:
    """The row of a dictionary that a block shows."""
    row = ast.parse("{" + block(start) + "}", mode="eval").body
    assert isinstance(row, ast.Dict) and len(row.keys) == 1
    return row


@pytest.fixture
def axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The projector in the file and under the name that the page gives it."""
    text = block("# src/crosslore/projectors/axes.py")
    (tmp_path / "axes.py").write_text(text, encoding="utf-8")
    ((name, place),) = ast.literal_eval(entry("# src/crosslore/registry.py")).items()
    assert place == "crosslore.projectors.axes:Axes"
    import importlib.util

    found = importlib.util.spec_from_file_location("crosslore.projectors.axes", tmp_path / "axes.py")
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "crosslore.projectors.axes", module)
    found.loader.exec_module(module)
    monkeypatch.setitem(REGISTRY["projector"], name, place)
    return name


@pytest.fixture
def preset(axes: str, monkeypatch: pytest.MonkeyPatch) -> str:
    row = ast.Expression(entry("# src/crosslore/presets.py"))
    ((name, value),) = eval(
        compile(row, "presets.py", "eval"), {"Preset": Preset, "LowRankConfig": LowRankConfig}
    ).items()
    monkeypatch.setitem(PRESETS, name, value)
    return name


def calls() -> list[str]:
    """The two calls of `create_optimizer` that the page ends its sections with."""
    return [text for text in TEXTS if text.startswith("optimizer = create_optimizer")]


@pytest.mark.parametrize("number", [0, 1])
def test_what_the_page_adds_trains(number: int, preset: str) -> None:
    model = tiny_decoder()
    names = {"create_optimizer": create_optimizer, "model": model}
    exec(calls()[number], names)
    low = next(group for group in names["optimizer"].param_groups if any(group["blocks"]))
    assert low["projector"] == "axes" and low["rank"] == 16
    assert len(train(model, names["optimizer"], range(3))) == 3
    bases = [state["basis"] for state in names["optimizer"].state.values() if "basis" in state]
    assert bases and all(basis.sum() == 16 and basis.max() == 1 for basis in bases)


def test_the_pages_preset_learns(preset: str) -> None:
    model = tiny_decoder()
    losses = train(model, create_optimizer(model, preset, lr=3e-4, rank=8), range(25))
    assert losses[-1] < 0.8 * losses[0]


def test_the_page_shows_two_calls() -> None:
    assert len(calls()) == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_its_basis_holds_the_largest_rows_or_columns(axes: str, side: str) -> None:
    module, _, name = REGISTRY["projector"][axes].partition(":")
    projector = getattr(sys.modules[module], name)()
    grad = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    layout = MatrixLayout(rows=6, cols=9, rank=2, side=side)
    basis = projector.fit(grad, layout, previous=None, generator=torch.Generator())
    norms = grad.square().sum(1 if side == "left" else 0)
    kept = projector.project(grad, basis, layout)
    assert torch.equal(basis.T @ basis, torch.eye(2))
    torch.testing.assert_close(kept.square().sum(), norms.topk(2).values.sum())
