import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("rich", reason='needs rich: pip install "crosslore[llamafactory]"')
pytest.importorskip("yaml", reason='needs pyyaml: pip install "crosslore[llamafactory]"')

HISTORY = [{"step": 5, "loss": 2.5, "lr": 1e-4}, {"step": 10, "loss": 0.75}, {"step": 10, "train_runtime": 12.0}]


@pytest.fixture
def demo(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("demo")


@pytest.fixture
def training(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("demo_training")


@pytest.fixture
def report(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("demo_report")


def write_state(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY, "global_step": 10}))


def write_inputs(folder: Path) -> Path:
    """Write a model folder without weights, held-out rows, and a configuration that names them."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "data").mkdir()
    described = {"instruction": "Describe.", "input": "name[The Otter]", "output": "The Otter is a pub in town."}
    solved = {"instruction": "Solve.", "input": "2 + 3?", "output": "2 + 3 = 5.\n#### 5"}
    (folder / "data" / "restaurants_test.json").write_text(json.dumps([described, described]))
    (folder / "data" / "arithmetic_test.json").write_text(json.dumps([solved, solved]))
    config = folder / "config.yaml"
    config.write_text(
        f"model_name_or_path: {folder / 'model'}\ndataset_dir: {folder / 'data'}\nfinetuning_type: crosslore\nrank: 4\n"
    )
    return config


def evaluation(bleu: float, accuracy: float, seconds: float) -> dict[str, Any]:
    rows = [{"input": "p [x]", "prediction": f"text {bleu}", "references": ["r"]}]
    return {
        "scores": {
            "restaurants": {"metric": "BLEU", "value": bleu, "signature": "s", "rows": 2},
            "arithmetic": {"metric": "accuracy_strict", "value": accuracy, "signature": "s", "rows": 2},
        },
        "predictions": {"restaurants": rows, "arithmetic": rows},
        "seconds": seconds,
        "peak_rss_gib": 1.5,
    }


@pytest.fixture
def summary() -> dict[str, Any]:
    cost = {"seconds": 200.0, "peak_rss_gib": 3.25}
    parts = {"before": evaluation(0.12531, 0.0, 60.0), "after": evaluation(0.405, 50.0, 30.0), "training": cost}
    return {"method": "crosslore", "losses": [[5, 2.5], [10, 0.75]], **parts}


def test_an_empty_folder_is_trained_afresh(training: ModuleType, tmp_path: Path) -> None:
    plan = training.plan_training(tmp_path / "train")
    assert plan.checkpoint is None and not plan.clear_folder


def test_a_finished_run_is_announced_and_kept_beside_the_new_one(training: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    for model in ("first", "second"):
        write_state(folder)
        write_state(folder / "checkpoint-10")
        (folder / "model").write_text(model)
        plan = training.plan_training(folder)
        assert f"finished run, which moves to {tmp_path / 'train.previous'}" in plan.message
        assert plan.checkpoint is None and plan.clear_folder
        training.put_aside(folder)
        assert not folder.exists() and (tmp_path / "train.previous" / "model").read_text() == model


def test_an_unfinished_run_is_not_kept(training: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    training.put_aside(tmp_path / "train")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_continues_from_its_last_complete_checkpoint(training: ModuleType, tmp_path: Path) -> None:
    for step in (20, 100):
        write_state(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-120").mkdir()  # killed while it was written
    plan = training.plan_training(tmp_path)
    assert plan.checkpoint == tmp_path / "checkpoint-100" and not plan.clear_folder


def test_an_interrupted_run_without_a_checkpoint_starts_again(training: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "trainer_log.jsonl").write_text("")
    plan = training.plan_training(tmp_path)
    assert "without a checkpoint" in plan.message and plan.clear_folder


def test_the_command_names_the_checkpoint_to_continue(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llamafactory-cli").write_text("")
    monkeypatch.setattr(training.sys, "executable", str(tmp_path / "python"))
    write_state(tmp_path / "train" / "checkpoint-20")
    plan = training.plan_training(tmp_path / "train")
    command = training.training_command(tmp_path / "a.yaml", tmp_path / "train", plan)
    assert command[1:4] == ["train", str(tmp_path / "a.yaml"), f"output_dir={tmp_path / 'train'}"]
    assert command[4:] == ["overwrite_output_dir=false", f"resume_from_checkpoint={plan.checkpoint}"]


def test_missing_llamafactory_says_the_install_line(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(training.DemoError, match=r'pip install "crosslore\[llamafactory,eval\]"'):
        training.training_command(tmp_path / "a.yaml", tmp_path, training.Plan(message=""))


def test_output_of_a_command_is_shown_and_logged(
    training: ModuleType, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    program = "import sys; print('to stdout', flush=True); print('to stderr', file=sys.stderr); sys.exit(3)"
    assert training.run_logged([sys.executable, "-c", program], tmp_path / "train.log") == 3
    assert (tmp_path / "train.log").read_bytes() == b"to stdout\nto stderr\n"
    assert b"to stdout\nto stderr\n" in capfdbinary.readouterr().out


def test_failed_training_says_the_exit_code_and_the_log(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "training_command", lambda *_: ["llamafactory-cli"])
    monkeypatch.setattr(training, "run_logged", lambda *_: 7)
    with pytest.raises(training.DemoError, match=r"exit code 7\..*train\.log"):
        training.train(tmp_path / "a.yaml", tmp_path / "train")


@pytest.mark.parametrize("source", ["trainer_state.json", "trainer_log.jsonl"])
def test_losses_come_from_either_log(report: ModuleType, tmp_path: Path, source: str) -> None:
    if source == "trainer_state.json":
        write_state(tmp_path)
    else:
        lines = [{"current_steps": 5, "loss": 2.5}, {"current_steps": 10, "loss": 0.75}, {"current_steps": 10}]
        (tmp_path / source).write_text("\n".join(map(json.dumps, lines)))
    assert report.read_losses(tmp_path) == [(5, 2.5), (10, 0.75)]


def test_loss_curve_is_a_png(report: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='needs pip install "crosslore[llamafactory]"')
    report.draw_losses([(5, 2.5), (10, 0.75)], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_table_shows_before_training_and_after(report: ModuleType, summary: dict[str, Any]) -> None:
    assert report.table_rows(summary) == [
        ["", "restaurants: BLEU", "arithmetic: accuracy_strict", "seconds", "peak GiB"],
        ["before", "0.1253", "0", "60", "1.50"],
        ["training (loss 2.500 -> 0.750)", "-", "-", "200", "3.25"],
        ["after", "0.405", "50", "30", "1.50"],
    ]


def test_report_prints_the_table_an_example_and_what_to_try_next(
    report: ModuleType, summary: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.print_report(summary, tmp_path)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("0.405", "p [x]", "text 0.12531", "text 0.405", "loss.png", "Try next"))
    assert "llamafactory-cli train yaml_configs/crosslore_demo.yaml rank=64" in shown


def test_an_evaluation_is_computed_once_per_key(demo: ModuleType, tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, Any]:
        calls.append(1)
        return {"scores": len(calls)}

    file = tmp_path / "before.json"
    for key, scores in (({"rows": 2}, 1), ({"rows": 2}, 1), ({"rows": 3}, 2)):
        assert demo.evaluate_cached(file, key, compute)["scores"] == scores
    file.write_text("{ cut off")
    assert demo.evaluate_cached(file, {"rows": 3}, compute)["scores"] == 3


def test_key_changes_with_model_data_and_rows(demo: ModuleType, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    data, model = tmp_path / "data", tmp_path / "model"
    keys = [demo.evaluation_key(demo.model_key(model), data, 1), demo.evaluation_key(demo.model_key(model), data, 2)]
    (data / "restaurants_test_references.jsonl").write_text("")
    keys.append(demo.evaluation_key(demo.model_key(model), data, 2))
    (model / "crosslore_model.json").write_text("{}")
    keys.append(demo.evaluation_key(demo.model_key(model), data, 2))
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == 4


def test_the_whole_demo_writes_its_summary(
    demo: ModuleType, training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("crosslore_eval", "transformers", "sacrebleu", "llamafactory"):
        pytest.importorskip(name, reason='needs pip install "crosslore[llamafactory,eval]"')
    config, folder = write_inputs(tmp_path), tmp_path / "saves"
    scored = iter([evaluation(1.0, 0.0, 1.0), evaluation(2.0, 50.0, 1.0)])
    monkeypatch.setattr(demo, "evaluate", lambda *_, **__: next(scored))

    def run(command: list[str], log: Path) -> int:
        write_state(folder / "train")
        return 0

    monkeypatch.setattr(training, "run_logged", run)
    monkeypatch.setattr(training, "training_command", lambda *_: ["llamafactory-cli", "train"])
    assert demo.main(["--config", str(config), "--output-dir", str(folder), "--rows", "2"]) == 0
    summary = json.loads((folder / "demo.json").read_text())
    assert summary["status"] == "ok" and summary["config"]["rank"] == 4
    assert summary["before"]["scores"]["restaurants"]["value"] == 1.0
    assert summary["after"]["scores"]["arithmetic"]["value"] == 50.0
    assert summary["losses"] == [[5, 2.5], [10, 0.75]]
    assert summary["training"]["peak_rss_gib"] >= 0 and "torch" in summary["versions"]
    assert "predictions" not in summary["before"]
    assert (folder / "loss.png").is_file() and (folder / "before.json").is_file()


@pytest.mark.parametrize(
    ("remove", "advice"),
    [
        ("model/config.json", "python scripts/get_model.py"),
        ("data/arithmetic_test.json", "python scripts/make_bundled_data.py"),
        ("config.yaml", "which is not there"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_makes_it(
    demo: ModuleType,
    tmp_path: Path,
    remove: str,
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "require_packages", lambda: None)
    config = write_inputs(tmp_path)
    (tmp_path / remove).unlink()
    assert demo.main(["--config", str(config), "--output-dir", str(tmp_path / "saves")]) == 1
    message = capsys.readouterr().err
    assert Path(remove).parent.name in message and advice in message


def test_more_rows_than_there_are_is_an_error(demo: ModuleType, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with pytest.raises(demo.DemoError, match=r"--rows must be in \[1, 2\] for restaurants_test.json, got 3"):
        demo.check_rows(tmp_path / "data", 3)


def test_skip_training_without_a_trained_model_is_an_error(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "require_packages", lambda: None)
    config = write_inputs(tmp_path)
    assert demo.main(["--config", str(config), "--output-dir", str(tmp_path / "saves"), "--skip-training"]) == 1
    assert "--skip-training needs a finished run" in capsys.readouterr().err


def test_missing_packages_say_the_install_line(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "sacrebleu" else object())
    with pytest.raises(demo.DemoError, match=r'sacrebleu\. Install with: pip install "crosslore\[llamafactory,eval\]"'):
        demo.require_packages()


def test_the_shipped_configuration_is_what_the_demo_reads(demo: ModuleType) -> None:
    import yaml

    config = yaml.safe_load(demo.DEFAULT_CONFIG.read_text(encoding="utf-8"))
    assert config["finetuning_type"] == "crosslore" and config["template"] == "chatml"
    assert {"rank", "alpha", "residual_ratio", "warmup_k"} <= set(config)
    assert "bf16" not in config and isinstance(config["learning_rate"], float)
    assert demo.REPO_ROOT / config["output_dir"] == demo.DEFAULT_OUTPUT / "train"
    assert config["dataset"].split(",") == [f"crosslore_{task}" for task in demo.TASKS]
