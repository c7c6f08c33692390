"""The README's projector, taken from its text, works with one line in the registry."""

import re
from pathlib import Path

import pytest
from tests.unit.models import tiny_decoder, train

from crosslore import create_optimizer
from crosslore.registry import REGISTRY

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_projector_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(# src/crosslore/projectors/first_rows\.py.*?)```", README.read_text(), re.S)
    (tmp_path / "first_rows.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(REGISTRY["projector"], "first_rows", "first_rows:FirstRows")
    model = tiny_decoder()
    losses = train(model, create_optimizer(model, lr=5e-3, rank=4, scale=2.0, projector="first_rows"), range(40))
    assert losses[-1] < 0.8 * losses[0]
