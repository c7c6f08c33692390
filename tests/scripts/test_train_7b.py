"""The GPU benchmark runs, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_7b.py"
pytestmark = pytest.mark.slow


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=300)


def test_every_method_has_its_row_and_is_not_measured_twice(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    words = (
        "--tiny",
        "--device",
        "cpu",
        "--rank",
        "8",
        "--tokens",
        "16,gsm8k+checkpointing",
        "--steps",
        "2",
        "--out",
        str(out),
    )
    assert run(*words, "--methods", "galore-torch,lora").returncode == 0
    assert run(*words, "--methods", "galore-torch,crosslore:deferred").returncode == 0
    rows = json.loads(out.read_text())
    assert [row["status"] for row in rows.values()] == ["ok"] * 6, rows
    assert all(row["amortised_seconds"] >= row["ordinary_seconds"] > 0 for row in rows.values())
    fitted = {row["method"]: row["fitting_layers"] for row in rows.values()}
    assert fitted == {"galore-torch": 2, "lora": 3, "crosslore:deferred": 3}


def test_without_a_gpu_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = run()
    assert result.returncode == 2 and "no CUDA device" in result.stderr


def test_an_unknown_method_lists_the_known_ones() -> None:
    result = run("--methods", "galor", "--device", "cpu")
    assert result.returncode == 2 and "Known: lora, dora" in result.stderr
