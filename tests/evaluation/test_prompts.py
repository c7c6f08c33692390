from typing import Any

import pytest

pytest.importorskip("transformers", reason='needs transformers: pip install "crosslore[eval]"')

from crosslore_eval.errors import EvalError  # noqa: E402
from crosslore_eval.prompts import (  # noqa: E402
    MODEL_TEMPLATE,
    TEMPLATES,
    content_of,
    cut,
    prompt_writer,
    stops_of,
    write_prompts,
)
from crosslore_eval.tasks.base import Example  # noqa: E402

ROWS = [
    ("Add.", "2 + 3"),
    ("Describe the restaurant from its attributes.", "name[The Quiet Heron], food[Thai], area[old town]"),
    ("Say hello.", ""),
    ("", "only an input"),
    ("Two lines\nof text with {braces}, {content} and {bos}.", "x  "),
]


def llamafactory_tokens(template: str, row: tuple[str, str], tokenizer: Any) -> list[int]:
    """Return the prompt tokens that LLaMA-Factory trains on for an alpaca row."""
    pytest.importorskip("llamafactory", reason='needs llamafactory: pip install "crosslore[llamafactory]"')
    from llamafactory.data.converter import AlpacaDatasetConverter
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.data.template import TEMPLATES as THEIRS
    from llamafactory.hparams import DataArguments

    example = {"instruction": row[0], "input": row[1], "output": "yes"}
    converter = AlpacaDatasetConverter(DatasetAttr("file", dataset_name="rows"), DataArguments())
    converted = converter(example)
    messages = converted["_prompt"] + converted["_response"]
    prompt, _ = THEIRS[template].encode_oneturn(tokenizer, messages, system=converted["_system"])
    return list(prompt)


@pytest.fixture(params=["byte-level", "prepend", "metaspace always", "metaspace first"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    """Tokenizers that treat the beginning of a text in different ways; LLaMA2's is of the second kind."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    if request.param == "byte-level":
        return tokenizer
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if request.param == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=request.param.split()[1])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special)
    backend.train_from_iterator([f"{a} {b} Human Assistant INST Response Instruction" for a, b in ROWS] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("row", ROWS)
def test_prompt_equals_what_llamafactory_trains_on(template: str, row: tuple[str, str], any_tokenizer: Any) -> None:
    tokens = prompt_writer(template, any_tokenizer).encode(content_of(*row))
    assert tokens == llamafactory_tokens(template, row, any_tokenizer)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_default_uses_the_template_that_training_left_in_the_tokenizer(template: str, any_tokenizer: Any) -> None:
    import copy

    expected = llamafactory_tokens(template, ROWS[1], any_tokenizer)
    from llamafactory.data.template import TEMPLATES as THEIRS

    trained = copy.deepcopy(any_tokenizer)
    trained.chat_template = None  # as base models have none
    THEIRS[template].fix_jinja_template(trained)  # what training calls
    assert prompt_writer(MODEL_TEMPLATE, trained).encode(content_of(*ROWS[1])) == expected


def test_an_unknown_chat_template_is_used_as_it_is(tokenizer: Any) -> None:
    import copy

    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}Q: {{ m['content'] }} A:{% endfor %}"
    assert prompt_writer(MODEL_TEMPLATE, own)("two words") == "Q: two words A:"
    assert own.decode(prompt_writer(MODEL_TEMPLATE, own).encode("two words")) == "Q: two words A:"


def test_prompt_does_not_depend_on_what_the_content_looks_like(tokenizer: Any) -> None:
    assert prompt_writer("empty", tokenizer)("{content} {bos} {eos}") == "{content} {bos} {eos}"


def test_a_tokenizer_without_chat_template_asks_for_a_name() -> None:
    class Bare:
        chat_template = None

    with pytest.raises(EvalError, match=r"--template alpaca \| chatml"):
        prompt_writer(MODEL_TEMPLATE, Bare())


def test_a_wrong_template_gets_the_near_name(tokenizer: Any) -> None:
    with pytest.raises(EvalError, match="unknown template 'alpacca'. Did you mean 'alpaca'?"):
        prompt_writer("alpacca", tokenizer)


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("  one line \n two", ("\n",), "one line"),
        ("\n\nafter empty lines\nmore", ("\n",), "after empty lines"),
        ("no stop", ("\n",), "no stop"),
        ("a ### b \n c", ("\n", "###"), "a"),
        ("", ("\n",), ""),
        ("keep\nall", (), "keep\nall"),
    ],
)
def test_answers_end_before_the_first_stop_inside_them(text: str, stops: tuple[str, ...], kept: str) -> None:
    assert cut(text, stops) == kept


def test_templates_without_an_end_token_stop_at_the_next_turn() -> None:
    assert cut("fine\n\n### Instruction:\nnext", stops_of("alpaca")) == "fine"
    assert stops_of(MODEL_TEMPLATE) == ()


def test_long_inputs_lose_their_end_and_keep_what_the_template_writes(tokenizer: Any) -> None:
    words = " ".join(f"word{i}" for i in range(200))
    row = Example(instruction="Shorten.", input=words, references=("x",))
    short = Example(instruction="Shorten.", input="few words", references=("x",))
    found = write_prompts(tokenizer, [row, short], template="chatml", limit=100)
    assert found.shortened == 1
    assert 90 <= len(found.tokens[0]) <= 100
    assert found.texts[0].endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert found.texts[0].startswith("<|im_start|>user\nShorten.\nword0 word1")
    assert "few words" in found.texts[1]


def test_a_prompt_that_never_fits_names_its_example(tokenizer: Any) -> None:
    rows = [Example(instruction="a b c d e f g h", input="x", references=("x",))] * 2
    with pytest.raises(EvalError, match="the prompt of example 1 has [0-9]+ tokens without its input, 3 fit"):
        write_prompts(tokenizer, rows, template="empty", limit=3)
