"""A byte-level tokenizer and a Llama of two layers with random weights, shared by the tests of generation."""

from pathlib import Path
from typing import Any

import pytest

from crosslore_eval.tasks.base import Example

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
INPUTS = [
    "name[The Quiet Heron], food[Thai], area[old town]",
    "2 + 3",
    "",
    "Two lines\nof text with {braces} and {content}.",
    "a rather long word, spelled: floccinaucinihilipilification",
    "name[Crêperie l'Été], priceRange[£20-25]",
    "x",
    "name[The Lucky Badger], eatType[pub], near[Clock Tower], familyFriendly[no]",
]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on the inputs themselves, with SmolLM2's special tokens and one more."""
    transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "crosslore[eval]"')
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator(INPUTS, trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|bos|>"
    )
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    made.chat_template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return made


@pytest.fixture(scope="session")
def model(tokenizer: Any) -> Any:
    """A model whose greedy answers differ from prompt to prompt."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.4,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_folder(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def examples() -> list[Example]:
    """As many examples as there are inputs, with a reference each."""
    return [
        Example(instruction="Describe it.", input=text, references=(f"reference {i}",)) for i, text in enumerate(INPUTS)
    ]


@pytest.fixture
def e2e_folder(tmp_path: Path) -> Path:
    """A data folder whose E2E test split has five inputs with one to three references."""
    rows = [
        (f"name[Number {number}], food[Thai]", f"Number {number} serves Thai food, version {version}.")
        for number in range(1, 6)
        for version in range(1 + number % 3)
    ]
    folder = tmp_path / "data"
    (folder / "e2e").mkdir(parents=True)
    lines = ["mr,ref", *(f'"{mr}","{ref}"' for mr, ref in rows)]
    (folder / "e2e" / "testset_w_refs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
