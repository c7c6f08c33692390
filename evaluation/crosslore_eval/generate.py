"""Batched greedy generation with transformers, from prompts written exactly as LLaMA-Factory writes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

# LLaMA-Factory 0.9.5, data/template.py, template "chatml": no system turn unless the row has one. A tokenizer's own
# chat template may insert a default one (SmolLM2's does), so the prompt is written here and compared in a test.
_CHATML_USER = "<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def chatml_prompt(instruction: str, *, input_text: str = "") -> str:
    """Return the text that precedes the answer when LLaMA-Factory trains an alpaca row with `template: chatml`.

    Args:
        instruction: the row's `instruction`.
        input_text: the row's `input`; a line of its own after the instruction when not empty.
    """
    content = "\n".join(part for part in (instruction, input_text) if part)
    return _CHATML_USER.format(content=content)


def pick_device() -> torch.device:
    """Return the CUDA device when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(folder: str | Path, *, device: torch.device | None = None) -> tuple[Any, Any]:
    """Return the model in evaluation mode and its tokenizer; `Any` because transformers' classes are dynamic.

    Args:
        folder: a folder that transformers can load, for example LLaMA-Factory's `output_dir` after full training.
        device: where to put the model (default: `pick_device()`); bf16 on a GPU, fp32 on a CPU.

    Raises:
        FileNotFoundError: if `folder` holds no model.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"model folder must hold config.json, got {folder}. Check the path, or train first.")
    device = device or pick_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)


def greedy_config(model: Any, tokenizer: Any, *, max_new_tokens: int) -> GenerationConfig:
    """Return settings for plain greedy decoding, whatever sampling the model's own generation config asks for."""
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    return GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
        temperature=1.0, top_p=1.0, top_k=50, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    label: str = "generating",
    show_progress: bool = True,
) -> list[str]:
    """Return the greedy continuation of each prompt, in the order of `prompts`, without special tokens.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; prompts are encoded as they are, with no special tokens added.
        prompts: full prompt texts, for example from `chatml_prompt`.
        max_new_tokens: the most tokens per answer; it ends earlier at the end-of-sequence token.
        batch_size: prompts per batch; longest first, so a batch that does not fit fails at once.
        label: what the progress bar says.
        show_progress: whether there is a progress bar (on stderr).
    """
    config = greedy_config(model, tokenizer, max_new_tokens=max_new_tokens)
    encoded = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]), reverse=True)
    answers = [""] * len(encoded)
    with tqdm(total=len(order), desc=label, unit="row", disable=not show_progress) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            texts = _generate_batch(model, tokenizer, [encoded[row] for row in rows], config)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
            bar.update(len(rows))
    return answers


@torch.inference_mode()
def _generate_batch(model: Any, tokenizer: Any, batch: list[list[int]], config: GenerationConfig) -> list[str]:
    """Return the continuations of one batch of token lists, padded on the left."""
    width = max(map(len, batch))
    ids = torch.tensor([[config.pad_token_id] * (width - len(tokens)) + tokens for tokens in batch])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in batch])
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
    )
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [str(text).strip() for text in texts]
