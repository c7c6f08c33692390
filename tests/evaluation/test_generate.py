from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "crosslore[eval]"')

from crosslore_eval.generate import chatml_prompt, generate, greedy_config, load_model  # noqa: E402

ROWS = [
    ("Add.", "2 + 3"),
    ("Describe the restaurant from its attributes.", "name[The Quiet Heron], food[Thai], area[old town]"),
    ("Say hello.", ""),
    ("", "only an input"),
    ("Two lines\nof text with {braces} and <|im_start|>.", "x"),
    ("Count the letters of a rather long word, then spell it.", "floccinaucinihilipilification"),
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on the rows themselves, with SmolLM2's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator([text for row in ROWS for text in row], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.4,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [chatml_prompt(instruction, input_text=text) for instruction, text in ROWS]


@pytest.mark.parametrize("row", ROWS)
def test_prompt_equals_what_llamafactory_trains_on(row: tuple[str, str], tokenizer: Any) -> None:
    llamafactory = pytest.importorskip(
        "llamafactory", reason='needs llamafactory: pip install "crosslore[llamafactory]"'
    )
    from llamafactory.data.converter import AlpacaDatasetConverter
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import DataArguments

    assert llamafactory is not None
    example = {"instruction": row[0], "input": row[1], "output": "yes"}
    converter = AlpacaDatasetConverter(DatasetAttr("file", dataset_name="rows"), DataArguments())
    converted = converter(example)
    messages = converted["_prompt"] + converted["_response"]
    trained, _ = TEMPLATES["chatml"].encode_oneturn(tokenizer, messages, system=converted["_system"])
    prompt = chatml_prompt(row[0], input_text=row[1])
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == trained


@pytest.mark.parametrize("batch_size", [2, 4, 6])
def test_batched_answers_equal_answers_one_by_one(
    model: Any, tokenizer: Any, prompts: list[str], batch_size: int
) -> None:
    single = [generate(model, tokenizer, [p], max_new_tokens=12, show_progress=False)[0] for p in prompts]
    together = generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size, show_progress=False)
    assert together == single
    assert len(set(single)) > 1  # the test can fail: answers depend on the prompt


def test_generation_stops_at_the_end_of_the_turn(model: Any, tokenizer: Any, prompts: list[str]) -> None:
    config = greedy_config(model, tokenizer, max_new_tokens=12)
    encoded = tokenizer(prompts[0], add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**encoded, generation_config=config)[0, encoded["input_ids"].shape[1] :].tolist()
    stop = output[3]  # as if this token ended a turn
    kept = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [kept, stop]
    try:
        short = generate(model, tokenizer, prompts[:1], max_new_tokens=12, show_progress=False)[0]
    finally:
        model.generation_config.eos_token_id = kept
    expected = output[: output.index(stop) + 1]
    assert short == tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def test_sampling_settings_of_the_model_do_not_reach_greedy_decoding(model: Any, tokenizer: Any) -> None:
    before = generate(model, tokenizer, ["abc"], max_new_tokens=12, show_progress=False)
    kept = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, eos_token_id=kept.eos_token_id
    )
    try:
        assert generate(model, tokenizer, ["abc"], max_new_tokens=12, show_progress=False) == before
    finally:
        model.generation_config = kept


def test_a_model_without_padding_token_pads_with_the_end_of_sequence(model: Any, tokenizer: Any) -> None:
    class NoPadding:
        eos_token_id = tokenizer.eos_token_id
        pad_token_id = None

    assert greedy_config(model, NoPadding(), max_new_tokens=1).pad_token_id == tokenizer.eos_token_id


def test_progress_bar_counts_rows(model: Any, tokenizer: Any, prompts: list[str], capsys: Any) -> None:
    generate(model, tokenizer, prompts, max_new_tokens=1, label="held-out")
    shown = capsys.readouterr().err
    assert "held-out" in shown and f"{len(prompts)}/{len(prompts)}" in shown


def test_saved_model_loads_in_evaluation_mode(model: Any, tokenizer: Any, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, device=torch.device("cpu"))
    assert not loaded.training
    assert loaded.dtype == torch.float32


def test_a_folder_without_a_model_is_named(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="must hold config.json"):
        load_model(tmp_path)
