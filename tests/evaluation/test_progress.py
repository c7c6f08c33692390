"""The progress bar."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason='needs transformers: pip install "crosslore[eval]"')

from crosslore_eval import progress  # noqa: E402
from crosslore_eval.generate import Decoding, batches_of, generate_batches  # noqa: E402
from crosslore_eval.predict import predict  # noqa: E402
from crosslore_eval.prompts import write_prompts  # noqa: E402
from crosslore_eval.settings import Settings  # noqa: E402
from crosslore_eval.tasks import find_task  # noqa: E402
from crosslore_eval.tasks.base import Example  # noqa: E402


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_counting_steps_changes_no_answer_and_counts_their_tokens(
    model: Any, tokenizer: Any, examples: list[Example], size: int, temperature: float
) -> None:
    encoded = write_prompts(tokenizer, examples, template="chatml").tokens
    batches = batches_of([len(tokens) for tokens in encoded], size)
    decoding, steps = Decoding(max_new_tokens=64, temperature=temperature), []
    counted = list(generate_batches(model, tokenizer, encoded, batches, decoding, on_step=steps.append))
    assert counted == list(generate_batches(model, tokenizer, encoded, batches, decoding))
    answers = [answer for rows in counted for answer in rows]
    assert sum(steps) == sum(answer.tokens for answer in answers)
    assert {answer.finish for answer in answers} == {"stop", "length"}  # rows end before their batch


def shown(text: str) -> list[tuple[int, int]]:
    """Return rows and tokens of each state of the bar."""
    return [(int(rows), int(tokens)) for rows, tokens in re.findall(r"(\d+)/8 \[[^\r]*?(\d+) tokens, ", text)]


def answer_all(model: Path, examples: list[Example], out: Path) -> None:
    settings = Settings(model=str(model), decoding=Decoding(max_new_tokens=8), batch_size=8, device="cpu")
    predict(find_task("gsm8k"), examples, settings, out)


def test_tokens_move_within_a_batch(
    model_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(progress, "FILE_SECONDS", 0.0)
    answer_all(model_folder, examples, tmp_path / "out.jsonl")
    text = capsys.readouterr().err
    states = shown(text)
    within = [tokens for rows, tokens in states if rows == 0]
    assert len(set(within)) == 8 and within == sorted(within)
    assert states[-1] == (8, within[-1])
    assert "batch at 3/8" in text and "tokens/s" in text


def test_a_file_is_not_filled_with_the_states_of_the_bar(
    model_folder: Path, examples: list[Example], tmp_path: Path, capsys: Any
) -> None:
    answer_all(model_folder, examples, tmp_path / "out.jsonl")
    text = capsys.readouterr().err
    assert text.count("generating:") <= 4 and shown(text)[-1][0] == 8


def test_the_speed_of_rows_is_the_mean_one(
    examples: list[Example], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A batch's rows come at once: the moment between the last redraw and them is not what they took."""
    from crosslore_eval.generate import Answer

    class Slow:
        def answers(self, encoded: Any, batches: Any, decoding: Any, *, on_step: Any) -> Any:
            for batch in batches:
                for _ in range(10):
                    time.sleep(0.02)
                    on_step(len(batch))
                yield [Answer(index=index, text="", tokens=10, finish="length") for index in batch]

    monkeypatch.setattr(progress, "FILE_SECONDS", 0.0)
    settings = Settings(model="m", decoding=Decoding(max_new_tokens=10))
    slow: Any = Slow()
    list(progress.with_progress(slow, [[1]] * 4, batches=[[0, 1], [2, 3]], settings=settings))
    speeds = [float(speed) for speed in re.findall(r"([\d.]+)row/s", capsys.readouterr().err)]
    assert speeds and max(speeds) < 11  # 2 rows in 0.2 s
