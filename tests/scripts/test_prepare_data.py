"""GSM8K, MAWPS and E2E in LLaMA-Factory's format: rows, errors, and nothing written half-way."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from crosslore_eval.tasks.e2e import RESTAURANTS_INSTRUCTION
from crosslore_eval.tasks.gsm8k import ARITHMETIC_INSTRUCTION
from crosslore_eval.tasks.mawps import mawps_row

ROOT = Path(__file__).resolve().parents[2]
GSM8K = {"question": "Ann has 2 cats and 3 dogs. How many pets?", "answer": "2 + 3 = <<2+3=5>>5 pets.\n#### 5"}
MAWPS = {"id": 1, "original_text": "Ann has 7 pens , 2 break .", "segmented_text": "-", "equation": "x=7-2", "ans": 5.0}
E2E = 'mr,ref\r\n"name[Nook], food[Thai]","Nook has\r\n  Thai food."\r\nname[Nook],A  place.\r\n'
FILES = {
    "gsm8k/train.jsonl": json.dumps(GSM8K) + "\n",
    "gsm8k/test.jsonl": json.dumps(GSM8K) + "\n",
    "mawps/train.jsonl": json.dumps(MAWPS) + "\n",
    "mawps/valid.jsonl": json.dumps(MAWPS) + "\n",
    "mawps/test.jsonl": json.dumps(MAWPS) + "\n",
    "e2e/trainset.csv": E2E,
    "e2e/devset.csv": E2E,
    "e2e/testset_w_refs.csv": E2E,
}
NAMES = ["gsm8k_train", "gsm8k_test", "mawps_train", "mawps_valid", "mawps_test", "e2e_train", "e2e_dev", "e2e_test"]


@pytest.fixture
def script(load_script):
    return load_script("prepare_data")


@pytest.fixture
def tasks(script):
    """The script itself: what it takes from the package has the same names there."""
    return SimpleNamespace(
        TASKS=script.TASKS,
        mawps_row=mawps_row,
        ARITHMETIC_INSTRUCTION=ARITHMETIC_INSTRUCTION,
        RESTAURANTS_INSTRUCTION=RESTAURANTS_INSTRUCTION,
    )


@pytest.fixture
def source(tmp_path):
    """A local folder with a few rows of our own in every file."""
    for name, text in FILES.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return tmp_path / "source"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "made" / "prepared"


@pytest.fixture
def run(script, source, output):
    """A function that runs the script on the small folder, other row counts allowed, and returns the exit code."""

    def run_(*arguments):
        return script.main([*arguments, "--source", str(source), "--output", str(output), "--allow-other-rows"])

    return run_


def rows_of(output, name):
    return [json.loads(line) for line in (output / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def with_row_counts(tasks, monkeypatch, name, *, rows, sha256):
    splits = tuple(replace(split, rows=rows, sha256=sha256) for split in tasks.TASKS[name].splits)
    monkeypatch.setitem(tasks.TASKS, name, replace(tasks.TASKS[name], splits=splits))


def test_all_data_sets_are_written_with_the_names_of_the_training_files(run, output, capsys):
    assert run() == 0
    info = json.loads((output / "dataset_info.json").read_text())
    assert info == {name: {"file_name": f"{name}.jsonl"} for name in NAMES}
    assert sorted(path.name for path in output.iterdir()) == sorted(
        [f"{n}.jsonl" for n in NAMES] + ["dataset_info.json"]
    )
    for name in NAMES:
        assert {"instruction", "input", "output"} <= set(rows_of(output, name)[0])
    said = capsys.readouterr().out
    assert "e2e_train.jsonl  2 rows" in said
    assert f"llamafactory-cli train yaml_configs/crosslore_gsm8k.yaml dataset_dir={output}" in said


def test_gsm8k_solutions_lose_their_annotations_and_keep_the_answer_for_grading(run, output, tasks):
    assert run("gsm8k") == 0
    assert rows_of(output, "gsm8k_test") == [
        {
            "instruction": tasks.ARITHMETIC_INSTRUCTION,
            "input": GSM8K["question"],
            "output": "2 + 3 = 5 pets.\n#### 5",
            "answer": GSM8K["answer"],
        }
    ]


def test_keep_annotations_leaves_gsm8k_solutions_as_they_are(run, output):
    assert run("gsm8k", "--keep-annotations") == 0
    assert rows_of(output, "gsm8k_train")[0]["output"] == GSM8K["answer"]


@pytest.mark.parametrize(
    ("equation", "ans", "expected"),
    [
        ("x=7-2", 5.0, "7 - 2 = 5\n#### 5"),
        ("X=((22.0-14.0)/4.0)", 2.0, "(22 - 14) / 4 = 2\n#### 2"),
        ("X=7+5", "12", "7 + 5 = 12\n#### 12"),
        ("x=0.25+0.5", 0.75, "0.25 + 0.5 = 0.75\n#### 0.75"),
        ("x=10.0*1.05", 10.5, "10 * 1.05 = 10.5\n#### 10.5"),
        ("x=-60.0/5", "-12.0", "-60 / 5 = -12\n#### -12"),
        ("x=1/3", 0.3333333333333333, "1 / 3 = 0.3333\n#### 0.3333"),
        ("x=40/7", 5.0, "#### 5"),
        ("(6.0+x)*(x-6.0)=189.0", -15.0, "#### -15"),
        ("x=2**3", 8, "#### 8"),
        ("x=7//2", 3, "#### 3"),
        ("x=1/0", 1, "#### 1"),
        ("x=2(3)", 6, "#### 6"),
        ("x=07+1", 8, "#### 8"),
        ("x=" + "(" * 5000, 1200, "#### 1200"),
    ],
)
def test_mawps_solutions_show_the_equation_only_where_it_gives_the_answer(tasks, equation, ans, expected):
    row = tasks.mawps_row({**MAWPS, "equation": equation, "ans": ans})
    assert row["output"] == expected
    assert row["ans"] == float(ans)
    assert row["input"] == MAWPS["original_text"]


def test_line_breaks_and_spaces_in_e2e_references_become_one_space(run, output):
    assert run("e2e") == 0
    rows = rows_of(output, "e2e_dev")
    assert [row["input"] for row in rows] == ["name[Nook], food[Thai]", "name[Nook]"]
    assert [row["output"] for row in rows] == ["Nook has Thai food.", "A place."]


def test_a_byte_order_mark_and_empty_lines_do_no_harm(run, source, output):
    (source / "gsm8k/train.jsonl").write_bytes(b"\xef\xbb\xbf" + FILES["gsm8k/train.jsonl"].encode() + b"\r\n\n")
    (source / "e2e/devset.csv").write_bytes(b"\xef\xbb\xbf" + E2E.encode() + b"\r\n")
    assert run("gsm8k", "e2e") == 0
    assert len(rows_of(output, "gsm8k_train")) == 1
    assert len(rows_of(output, "e2e_dev")) == 2


def test_bundled_and_prepared_rows_ask_with_the_same_words(tasks, load_script):
    bundled = load_script("make_bundled_data")
    assert bundled.RESTAURANTS_INSTRUCTION == tasks.RESTAURANTS_INSTRUCTION
    assert bundled.ARITHMETIC_INSTRUCTION == tasks.ARITHMETIC_INSTRUCTION


def test_entries_of_other_data_sets_stay_in_dataset_info(run, output):
    output.mkdir(parents=True)
    mine = {"mine": {"file_name": "mine.json"}, "e2e_dev": {"file_name": "old.json"}}
    (output / "dataset_info.json").write_text(json.dumps(mine))
    assert run("e2e") == 0
    info = json.loads((output / "dataset_info.json").read_text())
    assert list(info) == ["mine", "e2e_dev", "e2e_train", "e2e_test"]
    assert info["mine"] == mine["mine"] and info["e2e_dev"] == {"file_name": "e2e_dev.jsonl"}


BAD_ROWS = [
    ("gsm8k/test.jsonl", 'x\n{"question": ', ["line 1", "one JSON object a line"]),
    ("gsm8k/test.jsonl", FILES["gsm8k/test.jsonl"] + "\n[1]\n", ["line 3", "JSON object", "[1]"]),
    ("gsm8k/test.jsonl", '{"question": "Why?"}', ["line 1", "`answer` is missing", "question"]),
    ("gsm8k/test.jsonl", '{"question": " ", "answer": "#### 1"}', ["line 1", "`question`", "not empty", "' '"]),
    ("gsm8k/test.jsonl", '{"question": "a", "answer": "five"}', ["line 1", "#### number", "'five'"]),
    ("gsm8k/test.jsonl", "", ["gsm8k/test.jsonl", "1319 rows", "got 0"]),
    ("mawps/test.jsonl", json.dumps({**MAWPS, "ans": "two"}), ["line 1", "`ans`", "must be a number", "'two'"]),
    ("mawps/test.jsonl", json.dumps({**MAWPS, "ans": float("nan")}), ["line 1", "`ans`", "nan"]),
    ("mawps/test.jsonl", json.dumps({**MAWPS, "ans": True}), ["line 1", "`ans`", "True"]),
    ("mawps/test.jsonl", json.dumps({**MAWPS, "ans": None}), ["line 1", "`ans`", "None"]),
    ("mawps/test.jsonl", json.dumps({**MAWPS, "equation": 3}), ["line 1", "`equation` must be text", "3"]),
    ("e2e/testset_w_refs.csv", "MR\r\nname[A]\r\n", ["line 1", "name the columns mr, ref", "MR"]),
    ("e2e/testset_w_refs.csv", E2E + "name[A]\r\n", ["line 5", "2 fields (mr, ref)", "got 1"]),
    ("e2e/testset_w_refs.csv", E2E + 'name[A],"never\r\nclosed\r\n', ["line 5", "quotation mark"]),
    ("e2e/testset_w_refs.csv", E2E + "Nook,A place.\r\n", ["line 5", "attribute[value]", "'Nook'"]),
    ("e2e/testset_w_refs.csv", E2E + "name[A], \r\n", ["line 5", "`ref`", "not empty"]),
]


@pytest.mark.parametrize(("file", "text", "expected"), BAD_ROWS)
def test_a_wrong_row_stops_everything_and_is_named(run, source, output, capsys, file, text, expected):
    (source / file).write_bytes(text.encode())
    assert run() == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and str(source / file) in message
    for part in expected:
        assert part in message, message
    assert not output.parent.exists()


def test_text_that_is_not_utf8_is_named_with_its_line(run, source, output, capsys):
    (source / "e2e/devset.csv").write_bytes(E2E.encode() + "name[A],A café.\r\n".encode("latin-1"))
    assert run("e2e") == 2
    message = capsys.readouterr().err
    assert "devset.csv, line 5" in message and "UTF-8" in message and "0xe9" in message
    assert not output.exists()


def test_a_missing_file_is_named_with_the_layout_that_is_expected(run, source, output, capsys):
    (source / "mawps/valid.jsonl").unlink()
    assert run() == 2
    message = capsys.readouterr().err
    assert str(source / "mawps/valid.jsonl") in message and "No such file" in message
    assert "--source must be a folder" in message and "e2e/testset_w_refs.csv" in message
    assert not output.exists()


def test_a_failure_leaves_an_earlier_result_as_it_was(run, source, output):
    assert run() == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    (source / "gsm8k/train.jsonl").write_text(json.dumps({**GSM8K, "question": "Another?"}))
    (source / "e2e/testset_w_refs.csv").write_text("mr,ref\nbroken\n")
    assert run() == 2
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_a_disk_that_fails_leaves_no_partial_file(run, script, output, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.os, "replace", fail)
    assert run("mawps") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(output.iterdir()) == []


def test_dataset_info_is_put_in_place_last(run, script, output, monkeypatch):
    order = []
    real = os.replace
    monkeypatch.setattr(script.os, "replace", lambda old, new: (order.append(Path(new).name), real(old, new)))
    assert run("gsm8k") == 0
    assert order == ["gsm8k_train.jsonl", "gsm8k_test.jsonl", "dataset_info.json"]


def test_an_output_that_cannot_be_a_folder_is_refused(script, source, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["mawps", "--source", str(source), "--output", str(tmp_path / "file"), "--allow-other-rows"]
    assert script.main(arguments) == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_dataset_info_is_named_and_nothing_is_written(run, output, text, capsys):
    output.mkdir(parents=True)
    (output / "dataset_info.json").write_text(text)
    assert run() == 2
    message = capsys.readouterr().err
    assert str(output / "dataset_info.json") in message and "ove it away" in message
    assert [path.name for path in output.iterdir()] == ["dataset_info.json"]


def test_other_row_counts_are_refused_unless_allowed(script, run, source, output, capsys):
    assert script.main(["gsm8k", "--source", str(source), "--output", str(output)]) == 2
    message = capsys.readouterr().err
    assert "expected 7473 rows, got 1" in message and "--allow-other-rows" in message
    assert not output.exists()
    assert run("gsm8k") == 0
    assert "warning: " in capsys.readouterr().err


def test_the_original_file_is_known_by_its_sha256(script, tasks, source, output, monkeypatch, capsys):
    sha256 = hashlib.sha256((source / "gsm8k/train.jsonl").read_bytes()).hexdigest()
    with_row_counts(tasks, monkeypatch, "gsm8k", rows=1, sha256=sha256)
    assert script.main(["gsm8k", "--source", str(source), "--output", str(output)]) == 0
    assert capsys.readouterr().err == ""


def test_other_bytes_with_the_right_row_count_give_a_warning(script, tasks, source, output, monkeypatch, capsys):
    with_row_counts(tasks, monkeypatch, "e2e", rows=2, sha256="0")
    assert script.main(["e2e", "--source", str(source), "--output", str(output)]) == 0
    assert "2 rows as expected, but not the original file" in capsys.readouterr().err


def test_an_unknown_data_set_lists_the_near_and_the_known_ones(run, output, capsys):
    assert run("gsm8") == 2
    message = capsys.readouterr().err
    assert "'gsm8'" in message and "Did you mean 'gsm8k'?" in message and "mawps, e2e" in message
    assert not output.exists()


def test_mawps_without_a_local_folder_says_which_files_it_needs(script, output, capsys):
    assert script.main(["mawps", "--output", str(output)]) == 2
    message = capsys.readouterr().err
    for part in (
        "mawps",
        "--source",
        "1898 / 237 / 238",
        "mawps/valid.jsonl",
        "original_text, equation, ans",
        "gsm8k e2e",
    ):
        assert part in message
    assert not output.exists()


@pytest.mark.parametrize("words", [["gsm8k", "e2e"], []], ids=["named", "all that can be had"])
def test_the_hub_is_asked_for_the_right_rows(script, tasks, output, monkeypatch, capsys, words):
    asked = []
    rows = {
        "openai/gsm8k": [GSM8K],
        "tuetschek/e2e_nlg": [{"meaning_representation": "name[Nook]", "human_reference": "A\nplace."}],
    }

    def load_dataset(path, config, *, revision, split):
        asked.append((path, config, revision, split))
        return rows[path]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name in ("gsm8k", "e2e"):
        with_row_counts(tasks, monkeypatch, name, rows=1, sha256="0")
    assert script.main([*words, "--output", str(output)]) == 0
    assert ("left out: mawps" in capsys.readouterr().err) == (not words)
    assert asked == [
        ("openai/gsm8k", "main", None, "train"),
        ("openai/gsm8k", "main", None, "test"),
        ("tuetschek/e2e_nlg", None, "refs/convert/parquet", "train"),
        ("tuetschek/e2e_nlg", None, "refs/convert/parquet", "validation"),
        ("tuetschek/e2e_nlg", None, "refs/convert/parquet", "test"),
    ]
    assert rows_of(output, "e2e_dev")[0]["output"] == "A place."


def test_a_hub_that_does_not_answer_is_one_clear_line(script, output, monkeypatch, capsys):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nmore lines")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert script.main(["gsm8k", "--output", str(output)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "openai/gsm8k" in message and "no route" in message and "--source DIR" in message


def test_a_missing_datasets_package_names_the_pip_line(script, output, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert script.main(["e2e", "--output", str(output)]) == 2
    assert 'pip install "crosslore[llamafactory]"' in capsys.readouterr().err


def test_the_script_runs_from_any_folder_and_ends_without_a_traceback(source, output, tmp_path):
    command = [sys.executable, str(ROOT / "scripts/prepare_data.py"), "--source", str(source), "--output", str(output)]
    refused = subprocess.run([*command, "e2e"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and refused.stderr.startswith("error: ")
    made = subprocess.run([*command, "e2e", "--allow-other-rows"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0 and "Next: llamafactory-cli" in made.stdout


def test_the_public_data_sets_have_the_published_row_counts(script, output, capsys):
    folder = os.environ.get("CROSSLORE_DATA_DIR")
    if not folder:
        pytest.skip("CROSSLORE_DATA_DIR is not set: needs the public data sets")
    assert script.main(["--source", folder, "--output", str(output)]) == 0
    assert capsys.readouterr().err == ""  # every file is the original one
    counts = dict(zip(NAMES, (7473, 1319, 1898, 237, 238, 42061, 4672, 4693), strict=True))
    for name, count in counts.items():
        rows = rows_of(output, name)
        assert len(rows) == count
        assert "e2e" not in name or all("\n" not in row["output"] for row in rows)
        assert all("<<" not in row["output"] for row in rows)
        if "e2e" not in name:
            assert all(row["output"].rsplit("\n", 1)[-1].startswith("#### ") for row in rows)
    for row in rows_of(output, "mawps_test"):
        assert abs(float(row["output"].split("#### ")[1]) - row["ans"]) < 0.001
    solved = [row for name in NAMES[2:5] for row in rows_of(output, name) if "=" in row["output"]]
    assert len(solved) == 2373 - 67


@pytest.mark.parametrize(("task", "alpha", "epochs"), [("gsm8k", 64, 1), ("mawps", 32, 3), ("e2e", 128, 1)])
def test_training_files_carry_the_papers_values_and_prepared_names(run, output, task, alpha, epochs):
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((ROOT / f"yaml_configs/crosslore_{task}.yaml").read_text(encoding="utf-8"))
    assert run(task) == 0
    assert config["dataset"] in json.loads((output / "dataset_info.json").read_text())
    assert (config["finetuning_type"], config["rank"], config["alpha"]) == ("crosslore", 128, alpha)
    assert (config["residual_ratio"], config["learning_rate"], config["num_train_epochs"]) == (0.012, 1e-6, epochs)
    assert config["lr_scheduler_type"] == "cosine" and config["optim"] == "adamw_8bit" and config["pure_bf16"] is True
    assert config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] == 1
