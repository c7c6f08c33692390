import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pycocoevalcap", reason='needs the evaluation packages: pip install "crosslore[eval]"')

from crosslore_eval import cli  # noqa: E402
from crosslore_eval.report import p_text  # noqa: E402


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, without data and without Java, which starts slowly."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CROSSLORE_DATA_DIR", raising=False)
    monkeypatch.setattr("crosslore_eval.metrics.coco.java_runs", lambda: False)


def run(*words: Any) -> int:
    return cli.main([str(word) for word in words])


def write_system(name: str, *, task: str | None, right: int = 3) -> Path:
    """Outputs of 6 examples, the first `right` of them as their references, and a manifest of `task`."""
    path = Path(f"{name}.jsonl")
    rows = [
        {"prediction": f"Number {i} serves {'Thai' if i < right else 'no'} food.",
         "references": [f"Number {i} serves Thai food."]}
        for i in range(6)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if task is not None:
        path.with_name(f"{path.name}.manifest.json").write_text(json.dumps({"task": task}))
    return path


def test_outputs_of_another_task_are_refused(capsys: Any) -> None:
    a, b = write_system("a", task="xsum"), write_system("b", task="restaurants")
    for words in (["score", "e2e", "--predictions", b], ["compare", "xsum", a, b], ["compare", "e2e", b, a]):
        assert run(*words) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.count("\n") == 1
        asked = words[1]
        assert (
            f"b.jsonl must hold outputs of the task {asked}, got those of restaurants (so says b.jsonl.man" in shown.err
        )
        assert f"Give restaurants as the task, or outputs of {asked}; if the manifest belongs to another" in shown.err


def test_a_manifest_that_says_no_task_stops_nothing(capsys: Any) -> None:
    path = write_system("a", task=None)
    for text in ("{}", "[]", "broken", '{"task": "e2e"}'):
        Path("a.jsonl.manifest.json").write_text(text)
        assert run("score", "e2e", "--predictions", path) == 0


def test_a_comparison_names_files_and_signatures(capsys: Any) -> None:
    a, b = write_system("a", task="e2e"), write_system("b", task=None, right=6)
    assert run("compare", "e2e", a, b, "--json", "--samples", 200) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["systems"] == {"a": "a.jsonl", "b": "b.jsonl"}
    assert found["bootstrap"] == {"samples": 200, "seed": 12345, "smallest_p_value": 1 / 201}
    computed = {name: score for name, score in found["scores"].items() if "signature" in score}
    assert set(computed) == {"BLEU", "NIST", "ROUGE_L", "CIDEr"}
    assert run("score", "e2e", "--predictions", a, "--json") == 0
    alone = json.loads(capsys.readouterr().out)["scores"]
    assert all(score["signature"] == alone[name]["signature"] for name, score in computed.items())
    assert shown.err.count("METEOR was not computed, for it needs Java; ROUGE_L and CIDEr are on nltk's tokens") == 1

    assert run("compare", "e2e", a, b, "--samples", 200) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "e2e, protocol e2e-official, 6 examples, A a.jsonl, B b.jsonl"
    assert lines[1] == "score\tA\tB\tB - A\t95 % interval\tp\tsignature"
    for line in lines[2:]:
        name, *_, signature = line.split("\t")
        assert signature == (computed[name]["signature"] if name in computed else "not computed, see the warning")


def test_systems_whose_tokens_differ_are_not_compared(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    # Java that goes missing between A and B; the tokens of both are nltk's here, only the signatures tell.
    monkeypatch.setattr("crosslore_eval.metrics.coco.ptb_tokenise", lambda texts: list(texts))
    monkeypatch.setattr("crosslore_eval.protocols._meteor", lambda corpus: _missing_meteor())
    runs = iter([True, False])
    monkeypatch.setattr("crosslore_eval.metrics.coco.java_runs", lambda: next(runs))
    assert run("compare", "e2e", write_system("a", task=None), write_system("b", task=None)) == 2
    text = capsys.readouterr().err
    assert "ROUGE_L of A and B must be computed in the same way, got ROUGE_L|" in text
    assert "|tok:ptb|" in text and "|tok:nltk-treebank-" in text and "where Java runs for both, or for neither" in text


def _missing_meteor() -> Any:
    from crosslore_eval.protocols import Missing

    return Missing(name="METEOR", reason="left out")


@pytest.mark.parametrize(
    ("p_value", "samples", "shown"),
    [
        (1 / 1001, 1000, "< 0.001"),
        (1 / 100_001, 100_000, "< 1e-05"),
        (3 / 100_001, 100_000, "3.0e-05"),
        (2 / 1001, 1000, "0.0020"),
        (1.0, 1000, "1.0000"),
    ],
)
def test_a_p_value_is_never_shown_as_0(p_value: float, samples: int, shown: str) -> None:
    assert p_text(p_value, samples) == shown


def test_references_that_are_numbers_are_read_as_they_are(capsys: Any) -> None:
    Path("out.txt").write_text("#### 3\n#### 1250\n#### 7\n#### 8\n")
    references = {
        "refs.txt": "3\n1,250\n7.0\n#### 9\n",
        "refs.jsonl": '{"answer": 3}\n{"answer": "$1,250."}\n{"answer": 7.0}\n{"answer": "work\\n#### 9"}\n',
        "refs.csv": 'answer\n3\n"1,250"\n7.\n#### 9\n',
    }
    for name, text in references.items():
        Path(name).write_text(text)
        for task in ("gsm8k", "mawps", "arithmetic"):
            assert run("score", task, "--predictions", "out.txt", "--references", name, "--json") == 0
            assert json.loads(capsys.readouterr().out)["scores"]["accuracy_strict"]["value"] == 75.0


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("refs.txt", "3\n\nseven\n", "refs.txt, line 3"),
        ("refs.txt", "\n\n3\nseven", "refs.txt, line 4"),
        ("refs.jsonl", '{"answer": 3}\n\n{"answer": "seven"}\n', "refs.jsonl, line 3"),
        ("refs.json", '[{"answer": 3}, {"answer": "seven"}]', "refs.json, row 2"),
        ("refs.csv", "answer\n3\nseven\n", "refs.csv, line 3"),
    ],
)
def test_a_reference_that_is_no_number_is_named(name: str, text: str, place: str, capsys: Any) -> None:
    Path("out.txt").write_text("#### 3\n#### 7\n")
    Path(name).write_text(text)
    assert run("score", "gsm8k", "--predictions", "out.txt", "--references", name) == 2
    shown = capsys.readouterr().err
    assert f"error: {place}: a reference must be a number (1250 or 1,250) or a solution that ends in `####" in shown
    assert "got 'seven'. Correct it" in shown


def test_a_reference_in_the_predictions_file_that_is_no_number_is_named(capsys: Any) -> None:
    Path("out.jsonl").write_text('{"prediction": "#### 3", "label": "3"}\n{"prediction": "x", "label": "1 or 2"}\n')
    assert run("score", "gsm8k", "--predictions", "out.jsonl") == 2
    assert "error: out.jsonl, line 2: a reference must be a number" in capsys.readouterr().err


def test_one_example_is_no_plural(capsys: Any) -> None:
    Path("out.jsonl").write_text('{"prediction": "#### 3", "label": "3"}\n')
    assert run("score", "gsm8k", "--predictions", "out.jsonl") == 0
    assert "gsm8k, protocol accuracy, 1 example\n" in capsys.readouterr().out


def test_a_file_as_the_model_is_not_said_to_be_absent(tmp_path: Path, capsys: Any) -> None:
    Path("model.safetensors").write_text("x")
    (tmp_path / "data" / "xsum").mkdir(parents=True)
    (tmp_path / "data" / "xsum" / "test.jsonl").write_text('{"document": "d", "summary": "s"}\n')
    assert run("predict", "xsum", "--model", "model.safetensors", "--out", "o.jsonl") == 2
    text = capsys.readouterr().err
    assert "--model must be a folder with a model, got the file model.safetensors. Give its folder, ." in text
    assert "not there" not in text
