"""LLaMA-Factory v1 with the optimizer plugin `crosslore`: what it builds, and a short run of its own command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crosslore import LowRankOptimizer
from crosslore.integrations.llamafactory.v1 import build

pytest.importorskip("llamafactory", reason='needs LLaMA-Factory: pip install "crosslore[llamafactory]"')


def layers() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))


def test_options_are_those_of_the_paper_or_of_python_and_texts_are_numbers() -> None:
    config = {"name": "crosslore", "lr": "1e-6", "preset": "crosslore_plus", "rank": 4, "alpha": "16", "targets": ["0"]}
    optimizer = build(layers(), config)
    assert isinstance(optimizer, LowRankOptimizer)
    low = next(group for group in optimizer.param_groups if any(group["blocks"]))
    assert (low["lr"], low["rank"], low["scale"], len(low["params"])) == (1e-6, 4, 16.0, 1)


def test_a_missing_rate_and_unknown_options_are_named() -> None:
    with pytest.raises(ValueError, match="has no `lr`: LLaMA-Factory v1 does not pass"):
        build(layers(), {"name": "crosslore"})
    with pytest.raises(TypeError, match="unknown option 'rnak'. Did you mean 'rank'"):
        build(layers(), {"name": "crosslore", "lr": 1e-6, "rnak": 4})


def test_a_whole_number_in_quotes_is_one() -> None:
    config = {"name": "crosslore", "lr": "1e-6", "rank": "4", "gradients": "compact", "accumulation_steps": "2"}
    optimizer = build(layers(), config)
    assert optimizer.param_groups[0]["rank"] == 4 and optimizer.compact.accumulation_steps == 2


def test_two_names_of_an_option_and_a_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two names of one option, `alpha` \(16\) and `scale` \(2\). Remove one"):
        build(layers(), {"name": "crosslore", "lr": 1e-6, "rank": 4, "alpha": 16, "scale": 2})
    with pytest.raises(TypeError, match="has no option `model`"):
        build(layers(), {"name": "crosslore", "lr": 1e-6, "rank": 4, "model": "other"})


def test_the_plugin_is_registered_when_its_module_is_imported() -> None:
    where = "llamafactory.v1.plugins.trainer_plugins.optimizer"
    code = f"from {where} import OptimizerPlugin as plugin; print(plugin('crosslore')['__call__'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "function build" in found.stdout, found.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["full", "compact"])
def test_a_short_run_of_its_own_command(gradients: str, tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"instruction": f"Say {word}.", "input": "", "output": f"{word} it is."} for word in "abcdefghijklmnop"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    info = f"rows:\n  path: {tmp_path / 'rows.jsonl'}\n  source: local\n  converter: alpaca\n"
    (tmp_path / "data.yaml").write_text(info, encoding="utf-8")
    config = f"""
model: {tiny_model}
template: qwen3_nothink
train_dataset: {tmp_path / "data.yaml"}
output_dir: {tmp_path / "out"}
micro_batch_size: 2
global_batch_size: 4
cutoff_len: 64
max_steps: 6
bf16: false
batching_workers: 0
logging_steps: 1
optim_config: {{name: crosslore, lr: 1.0e-2, preset: crosslore_plus, rank: 4, alpha: 1.0, gradients: {gradients}{
        ", accumulation_steps: 2" if gradients == "compact" else ""
    }}}
"""
    (tmp_path / "run.yaml").write_text(config, encoding="utf-8")
    program = Path(sys.executable).with_name("llamafactory-cli")
    found = subprocess.run(
        [program, "sft", tmp_path / "run.yaml"], capture_output=True, text=True, timeout=400,
        env={**os.environ, "USE_V1": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    text = found.stdout + found.stderr
    assert found.returncode == 0, text[-3000:]
    losses = [float(number) for number in re.findall(r"['\"]?loss['\"]?[:=]\s*([0-9.]+)", text)]
    assert len(losses) >= 6 and losses[-1] < losses[0], text[-3000:]
