import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pycocoevalcap", reason='needs the evaluation packages: pip install "crosslore[eval]"')

from crosslore_eval import cli  # noqa: E402
from crosslore_eval.tasks import find_task  # noqa: E402

COMMANDS = ("predict", "score", "run", "compare", "tasks")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, without data and without Java, which starts slowly."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CROSSLORE_DATA_DIR", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)


@pytest.fixture
def gsm8k(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Outputs of systems A and B, and references, of 20 examples: A is right in 5, B in 15."""
    answers = [f"some work\n#### {number}" for number in range(20)]
    references = tmp_path / "refs.jsonl"
    references.write_text("".join(json.dumps({"question": "q", "answer": text}) + "\n" for text in answers))
    systems = []
    for name, right in (("a", 5), ("b", 15)):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prediction": f"#### {number if number < right else -1}"} for number in range(20)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        systems.append(path)
    return systems[0], systems[1], references


def run(*words: Any) -> int:
    return cli.main([str(word) for word in words])


def test_score_prints_one_json_object(gsm8k: Any, capsys: Any) -> None:
    a, _, references = gsm8k
    assert run("score", "gsm8k", "--predictions", a, "--references", references, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["task"], found["protocol"], found["n"]) == ("gsm8k", "accuracy", 20)
    assert list(found["scores"]) == ["accuracy_strict", "accuracy_flexible"]
    assert found["scores"]["accuracy_strict"]["value"] == 25.0
    assert found["scores"]["accuracy_strict"]["signature"].startswith("accuracy_strict|protocol:accuracy|read:####|")
    assert "bootstrap" not in found


def test_confidence_adds_intervals(gsm8k: Any, capsys: Any) -> None:
    a, _, references = gsm8k
    words = ["score", "gsm8k", "--predictions", a, "--references", references, "--json", "--confidence"]
    assert run(*words) == 0
    found = json.loads(capsys.readouterr().out)
    low, high = found["scores"]["accuracy_strict"]["confidence_95"]
    assert low < 25.0 < high
    assert found["bootstrap"] == {"samples": 1000, "seed": 12345}
    assert run(*words[:-1], "--confidence", "200") == 0
    assert json.loads(capsys.readouterr().out)["bootstrap"]["samples"] == 200


def test_the_table_in_a_pipe_has_whole_lines(gsm8k: Any, capsys: Any) -> None:
    a, _, references = gsm8k
    assert run("score", "gsm8k", "--predictions", a, "--references", references, "--confidence", 200) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "gsm8k, protocol accuracy, 20 examples"
    assert lines[1] == "score\tvalue\t95 % interval\tsignature"
    assert lines[2].split("\t")[:2] == ["accuracy_strict", "25.0000"]


def test_compare_finds_the_better_system(gsm8k: Any, capsys: Any) -> None:
    a, b, references = gsm8k
    assert run("compare", "gsm8k", a, b, "--references", references, "--json") == 0
    found = json.loads(capsys.readouterr().out)["scores"]["accuracy_strict"]
    assert (found["a"], found["b"], found["difference"]) == (25.0, 75.0, 50.0)
    assert found["confidence_95"][0] > 0 and found["p_value"] < 0.01
    assert run("compare", "gsm8k", a, b, "--references", references, "--samples", "200") == 0
    assert "+50.0000" in capsys.readouterr().out


def test_compare_needs_the_same_references(tmp_path: Path, capsys: Any) -> None:
    for name, answer in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"prediction": "x", "references": [f"#### {answer}"]}) + "\n"
        )
    assert run("compare", "gsm8k", "a.jsonl", "b.jsonl") == 2
    assert "must have the same references in the same order; example 1" in capsys.readouterr().err
    (tmp_path / "c.jsonl").write_text((tmp_path / "a.jsonl").read_text() * 2)
    assert run("compare", "gsm8k", "a.jsonl", "c.jsonl") == 2
    assert "got 1 output in A and 2 in B" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "answer", "strict", "flexible"),
    [
        ("####\n42", 42, 0, 100),  # on its line, as the official reading has it
        ("####\n2 apples and 3 more\n#### 5", 5, 100, 100),
        ("#### \n\n1. First add 3 and 4.\nAnswer: 7", 7, 0, 100),
        ("#### 1\u00a0000", 1000, 100, 100),
    ],
)
def test_answers_are_read_from_the_output_as_it_is(
    output: str, answer: int, strict: float, flexible: float, tmp_path: Path, capsys: Any
) -> None:
    row = {"prediction": output, "references": [f"#### {answer}"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert run("score", "gsm8k", "--predictions", "a.jsonl", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["accuracy_strict"]["value"] == strict and scores["accuracy_flexible"]["value"] == flexible


@pytest.mark.parametrize("command", ["score", "compare"])
def test_pictures_are_written(command: str, gsm8k: Any, tmp_path: Path) -> None:
    a, b, references = gsm8k
    picture = tmp_path / "deep" / "scores.png"
    which = ["--predictions", a] if command == "score" else [a, b]
    assert run(command, "gsm8k", *which, "--references", references, "--plot", picture) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "gsm9k", "--predictions", "A"], "unknown task 'gsm9k'. Did you mean 'gsm8k'?"),
        (
            ["score", "gsm8k", "--predictions", "missing"],
            "the predictions must be a file that can be read, got missing",
        ),
        (["score", "gsm8k", "--predictions", "A", "--protocol", "papr"], "unknown protocol 'papr'"),
        (["score", "gsm8k", "--predictions", "A", "--references", "no"], "--references must be a file"),
        (["score", "gsm8k", "--predictions", "A", "--plot", "x.gif"], "--plot must end in one of .png, .svg, .pdf"),
        (["score", "gsm8k", "--predictions", "A", "--split", "dev"], "unknown split of gsm8k 'dev'"),
        (["predict", "e2e", "--model", "missing/x/y", "--out", "o"], "--model must be a folder or a name on the hub"),
        (["predict", "e2e", "--model", "M", "--out", "o", "--limit", "0"], "--limit must be in [1, 5] for e2e, got 0"),
        (["predict", "e2e", "--model", "M", "--out", "o", "--top-p", "2"], "--top-p must be in (0, 1], got 2.0"),
        (["predict", "e2e", "--model", "M", "--out", "A/o"], "--out must be a file that can be written, got"),
        (["run", "e2e", "--model", "M", "--out", "A/o"], "--out must be a file that can be written, got"),
        (["predict", "e2e", "--model", "M", "--out", "o", "--top-k", "5"], "--top-k needs sampling, got 5"),
        (["predict", "e2e", "--model", "M", "--out", "o", "--template", "chatlm"], "Did you mean 'chatml'?"),
        (["predict", "e2e", "--model", "M", "--out", "o", "--base-model", "M"], "--base-model is for the folder of a"),
        (["run", "e2e", "--model", "M", "--protocol", "papr"], "unknown protocol 'papr'. Did you mean 'paper'?"),
        (["run", "mawps", "--model", "M"], "mawps can only be read from local files"),
    ],
)
def test_unusable_input_exits_with_2_and_one_line(
    words: list[str], message: str, gsm8k: Any, e2e_folder: Path, model_folder: Path, capsys: Any
) -> None:
    files = {"A": str(gsm8k[0]), "B": str(gsm8k[1]), "M": str(model_folder), "A/o": f"{gsm8k[0]}/o.jsonl"}
    data = ["--data", str(e2e_folder)] if words[1] == "e2e" else []
    assert run(*[files.get(word, word) for word in words], *data) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "error: " in shown.err and message in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND. See: crosslore-eval --help"),
        (["nonsense"], "argument COMMAND: invalid choice: 'nonsense'"),
        (["score", "gsm8k"], "required: --predictions. See: crosslore-eval score --help"),
        (["score", "gsm8k", "--predictions", "A", "--confidence", "-1"], "samples in [200, 1000000], got -1"),
        (["score", "gsm8k", "--predictions", "A", "--confidence", "0"], "samples in [200, 1000000], got 0"),
        (["score", "gsm8k", "--predictions", "A", "--confidence", "1"], "samples in [200, 1000000], got 1"),
        (["score", "gsm8k", "--predictions", "A", "--confidence", "100"], "samples in [200, 1000000], got 100. The"),
        (["run", "gsm8k", "--model", "A", "--confidence", "0.95"], "got 0.95. The intervals' level is always 95 %"),
        (["compare", "gsm8k", "A", "B", "--samples", "0"], "argument --samples: must be a number of bootstrap samples"),
        (["predict", "e2e", "--model", "x"], "required: --out. See: crosslore-eval predict --help"),
        (
            ["run", "e2e", "--model", "x", "--limit", "y"],
            "argument --limit: invalid int value: 'y'. See: crosslore-eval run",
        ),
        (
            ["run", "e2e", "--model", "x", "--templates", "y"],
            "unrecognized arguments: --templates y. See: crosslore-eval",
        ),
    ],
)
def test_wrong_usage_exits_with_2_and_one_line(words: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("command", ["predict", "run"])
def test_help_names_the_values_of_options(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run(command, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "model is the model's own chat template" in text and "llama2 and llama3 (model)" in text
    assert "--base-model DIR a LoRA adapter's base" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        run(command, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert command == "tasks" or f"crosslore-eval {command} " in text.split("examples:")[1]


def test_an_interrupt_exits_with_130_and_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, e2e_folder: Path, capsys: Any
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    words = ["predict", "e2e", "--model", model_folder, "--data", e2e_folder, "--out", "o.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr("crosslore_eval.predict.load_engine", interrupted)
        assert run(*words) == 130
    shown = capsys.readouterr().err
    assert "\ninterrupted.\n" in shown  # nothing is under way yet
    monkeypatch.setattr("crosslore_eval.engines.TransformersEngine.answers", interrupted)
    assert run(*words) == 130
    assert "\ninterrupted. Run it again: it goes on where it was.\n" in capsys.readouterr().err


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, gsm8k: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    (gsm8k[2].parent / "out.txt").write_text("x\n")
    (gsm8k[2].parent / "ref.txt").write_text("x\n")
    assert run("score", "xsum", "--predictions", "out.txt", "--references", "ref.txt") == 2
    assert 'rouge_score is not installed. Install with: pip install "crosslore[eval]"' in capsys.readouterr().err


def test_tasks_lists_protocols_and_data(capsys: Any) -> None:
    assert run("tasks") == 0
    text = capsys.readouterr().out
    assert "--protocol e2e-official" in text and "--split test, the default: gsm8k/test.jsonl (1319 rows)" in text
    assert run("tasks", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["e2e"]["protocols"]) == ["e2e-official", "paper"]
    assert found["mawps"]["hub"] is None
    assert found["e2e"]["splits"]["dev"] == {"file": "e2e/devset.csv", "rows": 4672}
    assert found["e2e"]["default_split"] == "test"
    for name, task in found.items():  # what is listed is what --split takes
        assert all(find_task(name).split(split).file == listed["file"] for split, listed in task["splits"].items())


def test_scores_without_java_are_those_that_need_none(e2e_folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out.txt").write_text("".join(f"Number {number} serves Thai food.\n" for number in range(1, 6)))
    assert run("score", "e2e", "--predictions", "out.txt", "--data", e2e_folder, "--json") == 0
    shown = capsys.readouterr()
    scores = json.loads(shown.out)["scores"]
    assert scores["METEOR"]["value"] is None and "needs Java" in scores["METEOR"]["error"]
    assert all(scores[name]["value"] > 0 for name in ("BLEU", "NIST", "ROUGE_L", "CIDEr"))
    assert shown.err.count("METEOR was not computed") == shown.err.count("warning: ") == 1
    assert "ROUGE_L and CIDEr are on nltk's tokens, for the PTB tokeniser needs Java too" in shown.err
    assert run("score", "e2e", "--predictions", "out.txt", "--data", e2e_folder) == 0
    shown = capsys.readouterr()
    assert "METEOR\t-\tnot computed, see the warning" in shown.out
    assert (shown.out + shown.err).count("Install a Java runtime") == 1


def test_run_predicts_and_scores(model_folder: Path, e2e_folder: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["run", "e2e", "--model", model_folder, "--data", e2e_folder, "--max-new-tokens", 5, "--limit", 3]
    assert run(*words, "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["n"] == 3
    (written,) = (tmp_path / "saves" / "eval").glob("*--e2e.jsonl")
    assert str(written.relative_to(tmp_path)) in shown.err
    assert model_folder.name in written.name
    scored = run("score", "e2e", "--predictions", written, "--json")
    assert scored == 0
    assert json.loads(capsys.readouterr().out) == json.loads(shown.out)


def test_the_installed_command_works_from_anywhere(tmp_path: Path) -> None:
    found = Path(sys.executable).with_name("crosslore-eval")
    if not found.is_file():
        pytest.skip("the package is not installed")
    done = subprocess.run(
        [found, "tasks", "--json"], cwd=tmp_path, capture_output=True, check=True, text=True, env={**os.environ}
    )
    assert "gsm8k" in json.loads(done.stdout)
    version = subprocess.run([found, "--version"], capture_output=True, check=True, text=True)
    assert version.stdout.startswith("crosslore-eval ")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    for options in (["tasks"], ["tasks", "--json"]):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "crosslore_eval", *options]
        found = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
        os.close(writer)
        assert (found.returncode, found.stderr) == (141, "")


def test_without_the_extra_every_command_says_what_to_install() -> None:
    lines = ("sys.modules['numpy'] = None", "from crosslore_eval.__main__ import main", "sys.exit(main(['--help']))")
    words = [sys.executable, "-c", "; ".join(("import sys", *lines))]
    found = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == 'error: numpy is not installed. Install with: pip install "crosslore[eval]"\n'
