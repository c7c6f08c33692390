"""Batched generation with transformers: left-padded, longest prompts first, with the key-value cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen."""

    # the most tokens of an answer
    max_new_tokens: int
    # 0 is greedy: always the most probable token
    temperature: float = 0.0
    # sample from the smallest set of tokens with this probability
    top_p: float = 1.0
    # sample from this many tokens; 0 is all
    top_k: int = 0
    # of the draws; each batch has its own, derived from it and its first prompt
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote after one prompt."""

    # position of the prompt
    index: int
    # without special tokens, untrimmed
    text: str
    # tokens, the end of the answer included
    tokens: int
    # "stop": the model ended it; "length": it was cut at the most tokens
    finish: str


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the model's, and the tokenizer's own, which training may move."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return list(dict.fromkeys(token for token in [*ends, tokenizer.eos_token_id] if token is not None))


def generation_config(model: Any, tokenizer: Any, decoding: Decoding) -> GenerationConfig:
    """Return exactly these settings, whatever the model's own generation config asks for."""
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    sampling = decoding.temperature > 0
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens, do_sample=sampling, num_beams=1, repetition_penalty=1.0,
        no_repeat_ngram_size=0, temperature=decoding.temperature if sampling else 1.0,
        top_p=decoding.top_p if sampling else 1.0, top_k=decoding.top_k if sampling else 50,
        eos_token_id=ends or None, pad_token_id=pad, use_cache=True,
    )  # fmt: skip


def batches_of(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return positions in batches of `size`, longest first: a batch that does not fit in memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]


def generate_batches(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Sequence[int]],
    batches: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[list[Answer]]:
    """Yield the answers of each batch.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        encoded: prompts as tokens.
        batches: positions in `encoded`.
        decoding: how tokens are chosen. A batch's answers do not depend on the batches before it.
        on_step: called after each step with the tokens that it added to answers; their sum is that of `Answer.tokens`.
    """
    config = generation_config(model, tokenizer, decoding)
    ends = set(config.eos_token_id or [])
    for batch in batches:
        torch.manual_seed((decoding.seed * 1_000_003 + batch[0]) % 2**63)
        with _no_other_settings(model):
            steps = None if on_step is None else _Steps(ends, on_step)
            rows = _generate(model, [encoded[index] for index in batch], config, steps)
        yield [_answer(tokenizer, index, row, ends) for index, row in zip(batch, rows, strict=True)]


class _Steps:
    """What transformers calls a streamer: it is given the new tokens of each step, which it counts."""

    def __init__(self, ends: set[int], on_step: Callable[[int], None]) -> None:
        self.ends, self.on_step = ends, on_step
        self.is_open: list[bool] = []

    def put(self, tokens: torch.Tensor) -> None:
        if tokens.dim() > 1:  # the prompts, before the first step
            self.is_open = [True] * len(tokens)
            return
        self.on_step(sum(self.is_open))
        pairs = zip(self.is_open, tokens.tolist(), strict=True)
        self.is_open = [is_open and token not in self.ends for is_open, token in pairs]

    def end(self) -> None:
        """Nothing is held back until here."""


@contextmanager
def _no_other_settings(model: Any) -> Iterator[None]:
    """Take the model's own generation config away: transformers fills in from it whatever ours does not set."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _answer(tokenizer: Any, index: int, tokens: list[int], ends: set[int]) -> Answer:
    end = next((position for position, token in enumerate(tokens) if token in ends), None)
    kept = tokens if end is None else tokens[:end]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    count = len(tokens) if end is None else end + 1
    return Answer(index=index, text=str(text), tokens=count, finish="length" if end is None else "stop")


@torch.inference_mode()
def _generate(
    model: Any, batch: Sequence[Sequence[int]], config: GenerationConfig, steps: _Steps | None
) -> list[list[int]]:
    """Return the new tokens of one batch of prompts, padded on the left; one at a time when it is one."""
    width = max(map(len, batch))
    ids = torch.tensor([[config.pad_token_id] * (width - len(tokens)) + list(tokens) for tokens in batch])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in batch])
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config, streamer=steps
    )
    new: list[list[int]] = output[:, width:].tolist()
    return new
