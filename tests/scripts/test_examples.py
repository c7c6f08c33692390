"""Every example runs as its docstring says, and learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason='needs transformers: pip install "crosslore[llamafactory]"')

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
NEEDS_MODEL = ("transformers_trainer.py",)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name: str) -> None:
    if name in NEEDS_MODEL and not (ROOT / "models" / "SmolLM2-135M-Instruct" / "config.json").is_file():
        pytest.skip("needs the embedded model: make model")
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    assert f"python examples/{name}" in text
    found = subprocess.run(
        [sys.executable, f"examples/{name}"], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    losses = [float(number) for number in re.findall(r"(?:loss|to|steps) (\d+\.\d+)", found.stdout)]
    assert losses[-1] < losses[0]


def test_the_minimal_one_is_short() -> None:
    assert len((ROOT / "examples" / "minimal.py").read_text(encoding="utf-8").splitlines()) <= 32
