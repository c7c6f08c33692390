"""The embedded model, real rows, and the gradients that they give: what `subspace_error` and `time_split` share."""

import csv
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import MODEL, ROOT, Options
from torch import Tensor, nn

# E2E as LLaMA-Factory's alpaca rows, as its own csv file, and the rows that this repository brings along.
PREPARED, ORIGINAL = "e2e_train.jsonl", "e2e/trainset.csv"
BUNDLED = ROOT / "data" / "restaurants_train.json"
MAX_TOKENS = 256


def load_model(options: Options) -> nn.Module:
    """Return SmolLM2-135M-Instruct in training mode; a random one of two small layers for tiny runs.

    Raises:
        FileNotFoundError: if the model is not there.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    if options.profile == "tiny":
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(num_hidden_layers=2, vocab_size=256, tie_word_embeddings=True, **sizes)
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    else:
        check_model()
        model = AutoModelForCausalLM.from_pretrained(MODEL)
    return model.to(options.device, options.torch_dtype).train()


def check_model() -> None:
    """Raise FileNotFoundError if the embedded model is not there."""
    if not (MODEL / "config.json").is_file():
        raise FileNotFoundError(f"{MODEL} is not there. Run: make model")


def find_rows(options: Options) -> tuple[str, list[dict[str, str]]]:
    """Return a name of the data and its rows: --data, CROSSLORE_DATA_DIR, data/prepared, else the bundled ones.

    Raises:
        FileNotFoundError: if a folder was named and has no e2e rows.
    """
    named = options.data or (Path(os.environ["CROSSLORE_DATA_DIR"]) if os.environ.get("CROSSLORE_DATA_DIR") else None)
    for folder in (named,) if named else (ROOT / "data" / "prepared",):
        if (folder / PREPARED).is_file():
            lines = (folder / PREPARED).read_text(encoding="utf-8").splitlines()
            return "e2e", [json.loads(line) for line in lines]
        if (folder / ORIGINAL).is_file():
            from crosslore_eval.tasks.e2e import RESTAURANTS_INSTRUCTION

            with (folder / ORIGINAL).open(encoding="utf-8-sig", newline="") as file:
                rows = [{"input": row["mr"], "output": row["ref"]} for row in csv.DictReader(file)]
            return "e2e", [{"instruction": RESTAURANTS_INSTRUCTION, **row} for row in rows]
        if named:
            raise FileNotFoundError(f"{folder} has neither {PREPARED} nor {ORIGINAL}. Give a folder with one of them.")
    return "bundled restaurants", json.loads(BUNDLED.read_text(encoding="utf-8"))


def batches(options: Options, *, count: int, size: int) -> tuple[str, Iterator[dict[str, Tensor]]]:
    """Return the name of the data and so many batches of shuffled rows, padded, prompts without labels."""
    if options.profile == "tiny":
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(256, (count, size, 16), generator=generator).to(options.device)
        return "random tokens", ({"input_ids": rows, "labels": rows} for rows in tokens)
    check_model()
    from transformers import AutoTokenizer

    name, rows = find_rows(options)
    random.Random(0).shuffle(rows)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    groups = (rows[i * size : (i + 1) * size] for i in range(count))
    return name, (encoded(group, tokenizer, options.device) for group in groups)


def encoded(rows: list[dict[str, str]], tokenizer: Any, device: str) -> dict[str, Tensor]:  # Any: untyped package
    """Return one batch: the chat template's tokens, labels on the answer only."""
    pairs = []
    for row in rows:
        prompt = [{"role": "user", "content": "\n".join(filter(None, (row["instruction"], row["input"])))}]
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        start = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["output"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        pairs.append(((start + answer)[:MAX_TOKENS], ([-100] * len(start) + answer)[:MAX_TOKENS]))
    longest = max(len(tokens) for tokens, _ in pairs)
    fill = {"input_ids": tokenizer.pad_token_id, "labels": -100, "attention_mask": 0}
    columns = {
        "input_ids": [tokens for tokens, _ in pairs],
        "labels": [labels for _, labels in pairs],
        "attention_mask": [[1] * len(tokens) for tokens, _ in pairs],
    }
    padded = {key: [row + [fill[key]] * (longest - len(row)) for row in rows] for key, rows in columns.items()}
    return {key: torch.tensor(rows, device=device) for key, rows in padded.items()}


def random_batch(options: Options) -> dict[str, Tensor]:
    """Return one row of 128 random tokens, 16 for tiny runs."""
    length, vocabulary = options.pick(full=(128, 40000), quick=(128, 40000), tiny=(16, 256))
    tokens = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(options.device)
    return {"input_ids": tokens, "labels": tokens}
