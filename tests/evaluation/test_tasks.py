import gzip
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crosslore_eval.errors import EvalError
from crosslore_eval.tasks import TASKS, find_task
from crosslore_eval.tasks.loading import load_rows

ROWS = {
    "gsm8k": ("gsm8k/test.jsonl", {"question": "q", "answer": "2 <<1+1=2>>\n#### 2"}),
    "mawps": ("mawps/test.jsonl", {"original_text": "q", "equation": "x=1+1", "ans": 2.0}),
    "cnn_dm": ("cnn_dm/test.jsonl", {"article": "a", "highlights": "h"}),
    "xsum": ("xsum/test.jsonl", {"document": "d", "summary": "s"}),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where there is no data, with no folder named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CROSSLORE_DATA_DIR", raising=False)


def write_row(folder: Path, name: str) -> Path:
    file, fields = ROWS[name]
    path = folder / file
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(fields) + "\n", encoding="utf-8")
    return path


def test_the_five_tasks_of_the_paper_and_two_bundled_ones() -> None:
    assert {"gsm8k", "mawps", "e2e", "cnn_dm", "xsum", "restaurants", "arithmetic"} <= set(TASKS)
    for name, task in TASKS.items():
        assert task.name == name
        assert task.version >= 1 and task.max_new_tokens >= 1 and task.protocols
        assert task.split(None).name == f"{name}_test"


def test_a_wrong_task_gets_the_near_name() -> None:
    with pytest.raises(EvalError, match="unknown task 'gsm8'. Did you mean 'gsm8k'?"):
        find_task("gsm8")


def test_a_wrong_split_lists_those_there_are() -> None:
    with pytest.raises(EvalError, match="unknown split of mawps 'dev'.* Known: train, valid, test"):
        find_task("mawps").split("dev")


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_come_from_a_local_folder(name: str, packed: bool, tmp_path: Path, caplog: Any) -> None:
    path = write_row(tmp_path / "data", name)
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    task = find_task(name)
    (example,) = task.examples(load_rows(task, task.split(None), folder=tmp_path / "data"))
    assert example.references == {"gsm8k": ("2 <<1+1=2>>\n#### 2",), "mawps": ("2.0",), "cnn_dm": ("h",),
                                  "xsum": ("s",)}[name]  # fmt: skip
    assert example.instruction
    assert "scores on them cannot be compared with published ones" in caplog.text


def test_e2e_references_of_one_input_are_one_example(e2e_folder: Path) -> None:
    task = find_task("e2e")
    examples = task.examples(load_rows(task, task.split(None), folder=e2e_folder))
    assert [len(example.references) for example in examples] == [2, 3, 1, 2, 3]


def test_the_folder_of_the_variable_is_looked_at_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_row(tmp_path / "there", "xsum")
    monkeypatch.setenv("CROSSLORE_DATA_DIR", str(tmp_path / "there"))
    task = find_task("xsum")
    assert len(load_rows(task, task.split(None), folder=None)) == 1


@pytest.mark.parametrize(("made", "wrong"), [(False, "does not exist"), (True, "has neither"), (None, "is no folder")])
@pytest.mark.parametrize("option", ["--data", "CROSSLORE_DATA_DIR"])
def test_a_wrong_folder_is_an_error_at_once(
    option: str, made: bool | None, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crosslore_eval.tasks.loading.read_hub", None)  # calling it would be another error
    folder = tmp_path / "folder"
    write_row(tmp_path / "data", "xsum")  # where it must not go on to look
    if made:
        folder.mkdir()
    elif made is None:
        folder.write_text("a file")
    if option == "CROSSLORE_DATA_DIR":
        monkeypatch.setenv(option, str(folder))
    task = find_task("xsum")
    with pytest.raises(EvalError) as error:
        load_rows(task, task.split(None), folder=folder if option == "--data" else None)
    text = str(error.value)
    assert text.startswith(f"{option} must be a folder with xsum/test.jsonl (or .gz; rows with the fields document,")
    assert f"or with xsum_test.jsonl (from scripts/prepare_data.py), got {folder}, which {wrong}. " in text


def test_the_bundled_sets_are_found_whatever_the_variable_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "others").mkdir()
    monkeypatch.setenv("CROSSLORE_DATA_DIR", str(tmp_path / "others"))
    task = find_task("arithmetic")
    with pytest.raises(EvalError, match="arithmetic is bundled with this project as data/arithmetic_test.json"):
        load_rows(task, task.split(None), folder=None)
    (tmp_path / "data").mkdir()
    row = {"instruction": "i", "input": "q", "output": "#### 2"}
    (tmp_path / "data" / "arithmetic_test.json").write_text(json.dumps([row]))
    assert len(load_rows(task, task.split(None), folder=None)) == 1


def test_prepared_rows_are_used_as_training_used_them(tmp_path: Path) -> None:
    row = {"instruction": "Other words.", "input": "q", "output": "2\n#### 2", "answer": "#### 2"}
    (tmp_path / "gsm8k_test.jsonl").write_text(json.dumps(row) + "\n")
    task = find_task("gsm8k")
    (example,) = task.examples(load_rows(task, task.split(None), folder=tmp_path))
    assert (example.instruction, example.input, example.references) == ("Other words.", "q", ("#### 2",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "q"}\n', "test.jsonl, line 1: field `answer` is missing; fields found: question"),
        ('{"question": "q", "answer": "no mark"}\n', "line 1: the last line of `answer` must be `#### number`"),
        ("{broken\n", "line 1: expected one JSON object a line"),
        ("", "expected 1319 rows of gsm8k_test, got 0"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = write_row(tmp_path, "gsm8k")
    path.write_text(content)
    task = find_task("gsm8k")
    with pytest.raises(EvalError, match=re.escape(message)):
        load_rows(task, task.split(None), folder=tmp_path)


def test_a_folder_without_the_file_says_what_it_must_hold(tmp_path: Path) -> None:
    task = find_task("e2e")
    with pytest.raises(EvalError, match="--data must be a folder with e2e/testset_w_refs.csv .* with e2e_test.jsonl"):
        load_rows(task, task.split(None), folder=tmp_path)


def test_hub_rows_get_the_names_that_files_have(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    asked: list[Any] = []

    def load(path: str, config: str | None, *, revision: str | None, split: str) -> Any:
        asked.append((path, config, revision, split))
        return [{"meaning_representation": "name[A]", "human_reference": "A is a place."}] * 2

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = find_task("e2e")
    (example,) = task.examples(load_rows(task, task.split(None), folder=None))
    assert example.references == ("A is a place.", "A is a place.")
    assert asked == [("tuetschek/e2e_nlg", None, "refs/convert/parquet", "test")]


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")

    def fail(*args: Any, **kwargs: Any) -> Any:
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise ConnectionError("no route.\nmany lines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    task = find_task("gsm8k")
    with pytest.raises(
        EvalError, match="cannot load openai/gsm8k .split test. from the Hugging Face hub: Conn"
    ) as error:
        load_rows(task, task.split(None), folder=None)
    text = str(error.value)
    assert "with CROSSLORE_DATA_DIR=DIR or --data DIR; it must hold gsm8k/train.jsonl, gsm8k/test.jsonl." in text
    assert ".." not in text and "\n" not in text and "no route. Is the hub reachable" in text
    assert "asking the hub for openai/gsm8k" in caplog.text and "Retrying" not in caplog.text


def test_mawps_is_on_no_hub_and_says_so() -> None:
    task = find_task("mawps")
    with pytest.raises(EvalError, match=r"mawps can only be read from local files.*\(1898 / 237 / 238 rows\)") as error:
        load_rows(task, task.split(None), folder=None)
    assert "Give CROSSLORE_DATA_DIR=DIR or --data DIR with mawps/train.jsonl" in str(error.value)


def test_prompts_are_those_of_training_data() -> None:
    prepare = pytest.importorskip("crosslore_eval.tasks.gsm8k")
    row = prepare.gsm8k_row({"question": "q", "answer": "1 <<0+1=1>> apple\n#### 1"})
    (example,) = find_task("gsm8k").examples([row])
    assert (example.instruction, example.input) == (row["instruction"], row["input"])
    assert row["output"] == "1  apple\n#### 1"


def test_a_new_task_is_a_file_and_a_registry_line() -> None:
    # What docs/evaluation.md tells: the fields below are all that a task needs.
    from crosslore_eval.protocols import ROUGE_SCORE
    from crosslore_eval.tasks.base import Split, Task, text_of

    task = Task(
        name="headlines", version=1, summary="articles to headlines", fields={"text": "text", "title": "title"},
        convert=lambda fields: {"instruction": "Write a headline.", "input": text_of(fields, "text"),
                                "output": text_of(fields, "title")},
        reference="output", protocols=(ROUGE_SCORE,), max_new_tokens=32,
        splits=(Split(name="headlines_test", file="headlines/test.jsonl", hub_split="test", rows=1),),
    )  # fmt: skip
    (example,) = task.examples([task.convert({"text": "a", "title": "b"})])
    assert example.references == ("b",)
    assert SimpleNamespace(**vars(task)).stop == ()
