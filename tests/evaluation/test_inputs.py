import json
import logging
from pathlib import Path
from typing import Any

import pytest

from crosslore_eval.alignment import align
from crosslore_eval.errors import EvalError
from crosslore_eval.inputs import REFERENCE_FIELDS, Outputs, References, grouped, read_outputs, read_references
from crosslore_eval.tasks import find_task

E2E, GSM8K = find_task("e2e"), find_task("gsm8k")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def outputs_of(*texts: str) -> Outputs:
    return Outputs(path=Path("out.txt"), predictions=list(texts))


def references_of(*texts: list[str], inputs: list[str] | None = None) -> References:
    return References(source="refs.txt", texts=list(texts), inputs=inputs)


def outputs_for(**predictions: str) -> Outputs:
    return Outputs(path=Path("out.jsonl"), predictions=list(predictions.values()), inputs=list(predictions))


# Outputs


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\ntwo", ["one", "two"]),
        ("one\r\ntwo\r\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),
        ("one\n\nthree\n", ["one", "", "three"]),
        ("\nsecond\n", ["", "second"]),
        ("last is empty\n\n", ["last is empty", ""]),
        ("a\u2028b\x0cc\x85d\n2\n", ["a\u2028b\x0cc\x85d", "2"]),  # none of these ends a line
        ("old\rmac\n", ["old\rmac"]),
        ("caf\u00e9 \u996d\u5e97 \U0001f35c\n", ["caf\u00e9 \u996d\u5e97 \U0001f35c"]),
    ],
)
def test_text_outputs_are_one_a_line(tmp_path: Path, content: str | bytes, expected: list[str]) -> None:
    assert read_outputs(write(tmp_path / "out.txt", content)).predictions == expected


@pytest.mark.parametrize("content", ["", "\n", " \n\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["out.txt", "out.jsonl"])
def test_a_blank_file_is_refused(tmp_path: Path, name: str, content: str | bytes) -> None:
    with pytest.raises(EvalError, match="is empty: expected one output a line"):
        read_outputs(write(tmp_path / name, content))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="missing.txt: No such file"):
        read_outputs(tmp_path / "missing.txt")
    with pytest.raises(EvalError, match="Is a directory"):
        read_outputs(tmp_path)


def test_bytes_that_are_not_utf8_name_their_line(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="out.txt, line 2: expected UTF-8 text, got the byte 0xe9"):
        read_outputs(write(tmp_path / "out.txt", b"fine\ncaf\xe9\n"))


def test_our_jsonl_brings_references_and_inputs(tmp_path: Path) -> None:
    rows = [
        {"index": 0, "input": "a", "prediction": "x\ny", "references": ["r", "s"]},
        {"index": 1, "input": "b", "prediction": "", "references": ["t"]},
    ]
    found = read_outputs(jsonl(tmp_path / "out.jsonl", rows))
    assert found.predictions == ["x\ny", ""]
    assert found.references == [["r", "s"], ["t"]]
    assert found.inputs == ["a", "b"]


def test_llamafactory_predictions_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": "user\nq\nassistant\n", "predict": "#### 3", "label": "#### 4"}]
    found = read_outputs(jsonl(tmp_path / "generated_predictions.jsonl", rows))
    assert (found.predictions, found.references) == (["#### 3"], [["#### 4"]])


def test_structured_rows_are_recognised_whatever_the_file_is_called(tmp_path: Path) -> None:
    found = read_outputs(jsonl(tmp_path / "outputs", [{"prediction": "x", "answer": 5}]))
    assert (found.predictions, found.references) == (["x"], [["5"]])


def test_text_outputs_may_look_like_json_in_a_text_file(tmp_path: Path) -> None:
    assert read_outputs(write(tmp_path / "out.txt", '{"a": 1}\n')).predictions == ['{"a": 1}']


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"line 2: expected a field `prediction` \(or LLaMA-Factory's `predict`\), got text"),
        ({"prediction": None}, "line 2: `prediction` must be text, got None"),
        ({"prediction": 5}, "line 2: `prediction` must be text, got 5"),
        ({"prediction": "x"}, "line 2: expected references as in the other rows, got none"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = jsonl(tmp_path / "out.jsonl", [{"prediction": "fine", "references": ["x"]}, row])
    with pytest.raises(EvalError, match=message):
        read_outputs(path)


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '"text"', '{"prediction": "x"'])
def test_a_broken_line_of_jsonl_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(EvalError, match="out.jsonl, line 1: expected"):
        read_outputs(write(tmp_path / "out.jsonl", line + "\n"))


def test_a_partial_file_of_predict_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    rows = [{"index": 3, "prediction": "x"}, {"index": 0, "prediction": "y"}]
    with pytest.raises(EvalError, match="expected the row with index 0, got 3. If .* run that command again"):
        read_outputs(jsonl(tmp_path / "out.jsonl.partial", rows))


# References


@pytest.mark.parametrize(
    ("content", "count", "expected"),
    [
        ("a\nb\n", 2, [["a"], ["b"]]),
        ("a\nb\n\nc\n", 2, [["a", "b"], ["c"]]),
        ("a\nb\n\nc\n\n", 2, [["a", "b"], ["c"]]),
        ("\n\na\r\n\r\nb\r\n", 2, [["a"], ["b"]]),
        (b"\xef\xbb\xbfa\n \nb", 2, [["a"], ["b"]]),  # a line of spaces is empty
        ("a\n\nb\n \n", 2, [["a"], ["b"]]),
        ("a\nb\nc\n", 1, [["a", "b", "c"]]),  # one output: all of them are its references
        ("a\n", 1, [["a"]]),
        ("\n".join(f"r{i}" for i in range(45)) + "\n\nx\n", 2, [[f"r{i}" for i in range(45)], ["x"]]),
    ],
)
def test_text_references(tmp_path: Path, content: str | bytes, count: int, expected: list[list[str]]) -> None:
    assert read_references(write(tmp_path / "refs.txt", content), task=E2E, count=count).texts == expected


def test_an_example_without_references_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "refs.txt", "a\n\n\nb\n")
    with pytest.raises(EvalError, match="refs.txt, line 3: example 2 has no reference"):
        read_references(path, task=E2E, count=2)


def test_blank_references_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="refs.txt is empty"):
        read_references(write(tmp_path / "refs.txt", "\n"), task=E2E, count=1)


def test_the_csv_of_the_e2e_challenge_is_grouped_by_input(tmp_path: Path) -> None:
    path = write(tmp_path / "refs.csv", "mr,ref\nname[A],one\nname[B],two\nname[A],three\n")
    found = read_references(path, task=E2E, count=2)
    assert (found.texts, found.inputs) == ([["one", "three"], ["two"]], ["name[A]", "name[B]"])


def test_questions_that_repeat_stay_separate(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "#### 1"}, {"question": "q", "answer": "#### 1"}]
    assert len(read_references(jsonl(tmp_path / "refs.jsonl", rows), task=GSM8K, count=2).texts) == 2


def test_a_row_without_reference_names_what_was_looked_for(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "refs.jsonl", [{"question": "q"}])
    with pytest.raises(EvalError, match="line 1: expected a reference: `references` .* one of answer, ans"):
        read_references(path, task=GSM8K, count=1)


@pytest.mark.parametrize("name", REFERENCE_FIELDS)
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_csv_and_jsonl_references_take_each_of_the_fields(tmp_path: Path, ending: str, name: str) -> None:
    rows = [{"id": 1, name: "one, two"}, {"id": 2, name: "3"}]
    csv = f'id,{name}\n1,"one, two"\n2,3\n'
    path = write(tmp_path / "refs.csv", csv) if ending == "csv" else jsonl(tmp_path / "refs.jsonl", rows)
    found = read_references(path, task=E2E, count=2)
    assert found.texts == [["one, two"], ["3"]]
    assert found.places == [f"{path}, line {line}" for line in ((2, 3) if ending == "csv" else (1, 2))]


def test_a_csv_cell_of_references_may_be_a_list(tmp_path: Path) -> None:
    content = 'references\n"[""a"", ""b""]"\n[one] of them\n'
    assert read_references(write(tmp_path / "r.csv", content), task=E2E, count=2).texts == [
        ["a", "b"],
        ["[one] of them"],
    ]


def test_a_csv_without_such_a_column_names_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(
        EvalError, match="r.csv, line 2: expected a reference: .* one of answer, ans.*; got title, text"
    ):
        read_references(write(tmp_path / "r.csv", "title,text\na,b\n"), task=E2E, count=1)
    with pytest.raises(EvalError, match="r.csv holds no rows: expected one for each example"):
        read_references(write(tmp_path / "r.csv", "answer\n"), task=E2E, count=1)


def test_csv_outputs_may_have_llamafactorys_column(tmp_path: Path) -> None:
    found = read_outputs(write(tmp_path / "o.csv", "predict,label\nx,y\n"))
    assert (found.predictions, found.references) == (["x"], [["y"]])


def test_every_field_of_references_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| jsonl, json, csv |"))
    assert all(f"`{name}`" in row for name in REFERENCE_FIELDS)


def test_a_broken_row_has_one_line_number(tmp_path: Path) -> None:
    path = write(tmp_path / "o.jsonl", '{"prediction": "x"}\n{"prediction": x}\n')
    with pytest.raises(EvalError) as error:
        read_outputs(path)
    assert f"{path}, line 2: expected one JSON object a line, got: Expecting value (column 16). " in str(error.value)
    path = write(tmp_path / "o.json", '[{"prediction": "x"},\n {"prediction": x}]\n')
    with pytest.raises(EvalError) as error:
        read_outputs(path)
    assert f"{path}, line 2: expected a JSON array of objects, got: Expecting value (column 17). " in str(error.value)


# Alignment


def test_fewer_outputs_name_the_first_example_without_one() -> None:
    with pytest.raises(
        EvalError,
        match=r"out.txt has 1 output, refs.txt has 2 examples: example 2, 'name\[B\]', is the first without an",
    ) as error:
        align(outputs_of("x"), references_of(["r"], ["s"], inputs=["name[A]", "name[B]"]), task=GSM8K)
    assert "Complete the outputs, or give the references of these outputs with --references FILE" in str(error.value)


def test_more_outputs_name_the_first_beyond() -> None:
    with pytest.raises(
        EvalError, match="out.txt has 3 outputs, refs.txt has 2 examples: output 3, 'z', is the first"
    ) as error:
        align(outputs_of("x", "y", "z"), references_of(["r"], ["s"]), task=GSM8K)
    assert "If outputs have line breaks inside, write jsonl with a field `prediction`" in str(error.value)
    with pytest.raises(EvalError, match=r"has 1 example \(2 references\): output 2"):
        align(outputs_of("x", "y", "z"), references_of(["r", "s"]), task=E2E)


def test_empty_outputs_keep_their_place_and_trailing_empty_lines_go(caplog: pytest.LogCaptureFixture) -> None:
    found, _ = align(outputs_of("", "y", "", ""), references_of(["r"], ["s"], ["t"]), task=GSM8K)
    assert found == ["", "y", ""]
    assert "1 empty line at the end left out" in caplog.text


def test_an_empty_last_output_is_an_output() -> None:
    assert align(outputs_of("x", ""), references_of(["r"], ["s"]), task=GSM8K)[0] == ["x", ""]


def test_one_output_for_each_reference_keeps_the_first_of_each(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found, texts = align(outputs_of("x", "x", "y"), references_of(["r", "s"], ["t"]), task=E2E)
    assert (found, texts) == (["x", "y"], [["r", "s"], ["t"]])
    assert "the first of each of 2 examples is scored" in caplog.text and "differ" not in caplog.text
    caplog.clear()
    align(outputs_of("x", "other", "y"), references_of(["r", "s"], ["t"]), task=E2E)
    assert "in 1 of 2 examples these outputs differ" in caplog.text


def test_grouping_keeps_the_order_of_first_appearance() -> None:
    found = grouped("refs", [["1"], ["2"], ["3"], ["4", "5"]], ["b", "a", "b", "a"], task=E2E)
    assert (found.texts, found.inputs, found.rows) == ([["1", "3"], ["2", "4", "5"]], ["b", "a"], [[0, 2], [1, 3]])
    assert grouped("refs", [["1"], ["2"]], ["a", "a"], task=GSM8K).texts == [["1"], ["2"]]


def test_rows_of_one_input_that_are_apart_find_their_outputs(caplog: pytest.LogCaptureFixture) -> None:
    references = grouped("refs", [["r"], ["s"], ["t"], ["u"]], ["a", "b", "a", "b"], task=E2E)
    found, texts = align(outputs_of("x", "y", "x", "y"), references, task=E2E)
    assert (found, texts) == (["x", "y"], [["r", "t"], ["s", "u"]])
    assert "differ" not in caplog.text


def test_outputs_in_another_order_than_the_references_are_refused() -> None:
    references = references_of(["#### 1"], ["#### 2"], inputs=["q1", "q2"])
    with pytest.raises(EvalError, match="example 1 of out.jsonl answers 'q2', that of refs.txt is 'q1'"):
        align(outputs_for(q2="#### 2", q1="#### 1"), references, task=GSM8K)
    assert align(outputs_for(q1="#### 1", q2="#### 2"), references, task=GSM8K)[0] == ["#### 1", "#### 2"]


def test_one_output_for_many_questions_is_not_one_example(tmp_path: Path) -> None:
    path = write(tmp_path / "refs.txt", "#### 1\n#### 2\n#### 3\n")
    references = read_references(path, task=GSM8K, count=1)
    with pytest.raises(EvalError, match="has 1 output, .* has 3 examples: example 2"):
        align(outputs_of("#### 1"), references, task=GSM8K)


def test_a_single_reference_may_be_text(tmp_path: Path) -> None:
    assert read_outputs(jsonl(tmp_path / "o.jsonl", [{"prediction": "x", "references": "r"}])).references == [["r"]]


@pytest.mark.parametrize("row", ['{"prediction": "x", "n": ' + "9" * 5000 + "}", '{"prediction": ' + "[" * 100_000])
def test_numbers_and_nesting_without_end_are_an_error_with_a_line(tmp_path: Path, row: str) -> None:
    with pytest.raises(EvalError, match="line 1: expected one JSON object a line"):
        read_outputs(write(tmp_path / "o.jsonl", row + "\n"))
