"""What the Python blocks of the pages take for granted: a model, batches, rows, a tokenizer; all tiny."""

from typing import Any

import torch

WORDS = 64


def tiny_llama() -> Any:
    """Return a random decoder in whose linear layers rank 128 fits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64,
        )
    )  # fmt: skip


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2")


def namespace() -> dict[str, Any]:
    """Return the names that a page's first block finds."""
    import datasets
    from transformers import Trainer, TrainingArguments

    from crosslore.integrations.transformers import trainer_optimizer

    draws = torch.Generator().manual_seed(0)
    batches = [(torch.randint(WORDS, (2, 1), generator=draws) + torch.arange(16)) % WORDS for _ in range(4)]
    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch]
    texts = [{"text": " ".join(f"w{i}" for i in row["input_ids"].tolist())} for row in rows]
    args = TrainingArguments(output_dir="saves", max_steps=2, report_to="none", save_strategy="no")
    watched = trainer_optimizer(args, "crosslore", rank=16)
    trainer = Trainer(tiny_llama(), args, train_dataset=rows, optimizer_cls_and_kwargs=watched)
    return {
        "args": args, "trainer": trainer, "model": tiny_llama(), "__name__": "page", "torch": torch,
        "batches": batches, "rows": rows, "dataset": datasets.Dataset.from_list(texts), "tokenizer": tiny_tokenizer(),
    }  # fmt: skip
