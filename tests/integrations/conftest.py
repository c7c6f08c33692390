"""A tiny random Llama with a byte tokenizer, and a few rows of text written for these tests."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytest.importorskip("llamafactory", reason="llamafactory is not installed (extra llamafactory)")

BIN = Path(sys.executable).parent


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(fast), pad_token_id=fast.pad_token_id, eos_token_id=fast.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_data")
    rows = [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(1, n)))} for n in range(2, 34)
    ]
    pairs = [{"instruction": f"Say {n}.", "input": "", "chosen": f"{n}", "rejected": "no"} for n in range(8)]
    texts = [{"text": f"The number {n} is followed by {n + 1}."} for n in range(32)]
    info = {
        "count": {"file_name": "count.json"},
        "pairs": {"file_name": "pairs.json", "ranking": True,
                  "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}},
        "texts": {"file_name": "texts.json", "columns": {"prompt": "text"}},
    }  # fmt: skip
    for name, value in {"count": rows, "pairs": pairs, "texts": texts, "dataset_info": info}.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.fixture
def config(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> dict:
    """A valid configuration; tests change single keys."""
    return {
        "model_name_or_path": str(tiny_model), "stage": "sft", "do_train": True, "finetuning_type": "crosslore",
        "rank": 4, "alpha": 8.0, "residual_ratio": 0.05, "warmup_k": 2, "crosslore_refresh_every": 3,
        "dataset": "count", "dataset_dir": str(tiny_data), "template": "chatml", "cutoff_len": 64,
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_steps": 8,
        "logging_steps": 1, "save_steps": 4, "report_to": "none", "use_cpu": True, "overwrite_cache": True,
    }  # fmt: skip


@pytest.fixture(scope="session")
def without_startup_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose Python reads no start-up file of ours: packages come through PYTHONPATH alone."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    torchrun = folder / "bin" / "torchrun"
    torchrun.write_text(f'#!/bin/sh\nexec {python} -m torch.distributed.run "$@"\n', encoding="utf-8")
    torchrun.chmod(0o755)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2] / "src"), *packages]),
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": str(python),
    }
    code = "import sys, crosslore, llamafactory; sys.exit('_crosslore_hook' in sys.modules)"
    assert run(python, "-c", code, **environment).returncode == 0
    return environment


def write_yaml(folder: Path, config: dict, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a command of this environment on one thread; the venv's tools come first on PATH."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **environment}
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=env)


def losses(output_dir: Path) -> list[str]:
    """The losses as they are logged, to the last printed digit."""
    lines = (output_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    by_step = {row["current_steps"]: str(row["loss"]) for row in map(json.loads, lines) if "loss" in row}
    return [by_step[step] for step in sorted(by_step)]
