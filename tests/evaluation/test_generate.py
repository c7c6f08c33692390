from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "crosslore[eval]"')

from crosslore_eval.generate import (  # noqa: E402
    Answer,
    Decoding,
    batches_of,
    end_tokens,
    generate_batches,
    generation_config,
)
from crosslore_eval.prompts import write_prompts  # noqa: E402
from crosslore_eval.tasks.base import Example  # noqa: E402


def answer_all(model: Any, tokenizer: Any, encoded: list[list[int]], size: int, **decoding: Any) -> list[Answer]:
    batches = batches_of([len(tokens) for tokens in encoded], size)
    settings = Decoding(**{"max_new_tokens": 12, **decoding})
    found = [answer for rows in generate_batches(model, tokenizer, encoded, batches, settings) for answer in rows]
    return sorted(found, key=lambda answer: answer.index)


@pytest.fixture
def encoded(tokenizer: Any, examples: list[Example]) -> list[list[int]]:
    return write_prompts(tokenizer, examples, template="chatml").tokens


@pytest.mark.parametrize("size", [2, 3, 8])
def test_batched_answers_equal_answers_one_by_one(
    model: Any, tokenizer: Any, encoded: list[list[int]], size: int
) -> None:
    single = answer_all(model, tokenizer, encoded, 1)
    assert answer_all(model, tokenizer, encoded, size) == single
    assert len({answer.text for answer in single}) > 1  # the test can fail: answers depend on the prompt


def test_batches_hold_every_position_once_longest_first() -> None:
    assert batches_of([3, 9, 9, 1, 5], 2) == [[1, 2], [4, 0], [3]]


def test_generation_stops_at_any_end_token_of_model_or_tokenizer(
    model: Any, tokenizer: Any, encoded: list[list[int]]
) -> None:
    config = generation_config(model, tokenizer, Decoding(max_new_tokens=12))
    with torch.inference_mode():
        output = model.generate(input_ids=torch.tensor(encoded[:1]), generation_config=config)[0].tolist()
    new = output[len(encoded[0]) :]
    kept = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [kept, new[3]]  # as if this token ended a turn
    try:
        assert end_tokens(model, tokenizer) == [kept, new[3]]
        answer = answer_all(model, tokenizer, encoded[:1], 1)[0]
    finally:
        model.generation_config.eos_token_id = kept
    end = new.index(new[3])
    expected = tokenizer.decode(new[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert answer == Answer(index=0, text=expected, tokens=end + 1, finish="stop")


def test_an_answer_of_the_most_tokens_is_marked(model: Any, tokenizer: Any, encoded: list[list[int]]) -> None:
    whole = answer_all(model, tokenizer, encoded, 4, max_new_tokens=40)
    cut = answer_all(model, tokenizer, encoded, 4, max_new_tokens=2)
    assert [answer.tokens for answer in cut] == [min(2, answer.tokens) for answer in whole]
    finishes = ["stop" if answer.finish == "stop" and answer.tokens <= 2 else "length" for answer in whole]
    assert [answer.finish for answer in cut] == finishes and "length" in finishes


def test_sampling_settings_of_the_model_do_not_reach_greedy_decoding(
    model: Any, tokenizer: Any, encoded: list[list[int]]
) -> None:
    before = answer_all(model, tokenizer, encoded, 8)
    kept = model.generation_config
    assert before[0].tokens > 1
    common = answer_tokens(tokenizer, before)
    for own in (
        {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
        {"suppress_tokens": common}, {"begin_suppress_tokens": common}, {"min_new_tokens": 12}, {"max_time": 1e-6},
        {"stop_strings": ["e", "a"]}, {"forced_eos_token_id": 5}, {"encoder_repetition_penalty": 9.0},
        {"bad_words_ids": [[token] for token in common]}, {"return_dict_in_generate": True, "output_scores": True},
    ):  # fmt: skip
        model.generation_config = transformers.GenerationConfig(**own, eos_token_id=kept.eos_token_id)
        try:
            assert answer_all(model, tokenizer, encoded, 8) == before, own
        finally:
            model.generation_config = kept


def answer_tokens(tokenizer: Any, answers: list[Answer]) -> list[int]:
    """Return the tokens that the answers have."""
    return sorted(
        {token for answer in answers for token in tokenizer(answer.text, add_special_tokens=False)["input_ids"]}
    )


def test_samples_repeat_with_the_seed_and_change_with_it(model: Any, tokenizer: Any, encoded: list[list[int]]) -> None:
    first = answer_all(model, tokenizer, encoded, 4, temperature=1.0, seed=3)
    assert answer_all(model, tokenizer, encoded, 4, temperature=1.0, seed=3) == first
    assert answer_all(model, tokenizer, encoded, 4, temperature=1.0, seed=4) != first


def test_a_batch_samples_the_same_whether_or_not_others_came_before(
    model: Any, tokenizer: Any, encoded: list[list[int]]
) -> None:
    settings = Decoding(max_new_tokens=8, temperature=1.0)
    batches = batches_of([len(tokens) for tokens in encoded], 3)
    whole = list(generate_batches(model, tokenizer, encoded, batches, settings))
    assert list(generate_batches(model, tokenizer, encoded, batches[1:], settings)) == whole[1:]


@pytest.mark.parametrize("decoding", [{"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-9}])
def test_sampling_from_one_token_is_greedy(
    model: Any, tokenizer: Any, encoded: list[list[int]], decoding: dict[str, Any]
) -> None:
    greedy = [answer.text for answer in answer_all(model, tokenizer, encoded, 4)]
    assert [answer.text for answer in answer_all(model, tokenizer, encoded, 4, **decoding)] == greedy


def test_a_tokenizer_without_padding_token_pads_with_the_end_of_sequence(model: Any, tokenizer: Any) -> None:
    class NoPadding:
        eos_token_id = tokenizer.eos_token_id
        pad_token_id = None

    config = generation_config(model, NoPadding(), Decoding(max_new_tokens=1))
    assert config.pad_token_id == tokenizer.eos_token_id


EMBEDDED = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"


@pytest.mark.slow
@pytest.mark.skipif(not EMBEDDED.is_dir(), reason="needs the embedded model: make model")
def test_a_pretrained_model_answers_50_prompts_alike_in_batches_of_16_and_one_by_one() -> None:
    from crosslore_eval.models import load_model
    from crosslore_eval.tasks import find_task
    from crosslore_eval.tasks.loading import load_rows

    task = find_task("restaurants")
    rows = load_rows(task, task.split(None), folder=EMBEDDED.parents[1] / "data")
    model, tokenizer = load_model(EMBEDDED, device=torch.device("cpu"))
    encoded = write_prompts(tokenizer, task.examples(rows)[:50], template="model").tokens
    single = answer_all(model, tokenizer, encoded, 1)
    assert answer_all(model, tokenizer, encoded, 16) == single
    assert len({answer.text for answer in single}) > 25
