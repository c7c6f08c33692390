"""A tiny random Llama for the profile `smoke`: every part of a real one, and nothing learnt."""

import json
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
EMBEDDED_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
BUNDLED = ROOT / "data"
VOCABULARY = 512
# The template's marks; the first ends an answer.
SPECIAL_TOKENS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tiny_model(folder: Path, *, tokenizer: Path | None = EMBEDDED_MODEL) -> Path:
    """Write a Llama of 2 layers, width 64, 4 heads and 2 key-value heads with weights of a fixed seed.

    Args:
        folder: to write into; created if need be.
        tokenizer: model folder whose tokenizer is taken; where it is not there, or for None, one of 512 tokens is
            trained on the bundled data.

    Returns:
        `folder`.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if tokenizer is not None and (tokenizer / "tokenizer.json").is_file():
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    else:
        _train_tokenizer(folder)
    words = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, vocab_size=len(words), tie_word_embeddings=True,
        pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _train_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_bundled_texts(), trainer)
    end, start, _ = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
    fast.add_special_tokens({"additional_special_tokens": [start]})
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _bundled_texts() -> Iterator[str]:
    for path in sorted(BUNDLED.glob("*_train.json")):
        for row in json.loads(path.read_text(encoding="utf-8")):
            yield from (row["instruction"], row["input"], row["output"])
