"""The runner where something is wrong: folders, models, data, logs, stale choices, several GPUs, interrupts."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reproduce
from reproduction import cell_run, facts, needs, outcome, outputs, probe, runner, selection, tuning
from reproduction.cells import Experiment
from reproduction.experiments import experiments
from reproduction.processes import Processes
from reproduction.results import DataFile, Device, Result, Score, read_results, write_result
from reproduction.tuning import TuningError, grid_of

DRIVER = Path(__file__).with_name("reproduce_with_stand_ins.py")
SMOKE = ["table1", "--profile", "smoke", "--only", "method=lora,dataset=mawps,rank=4"]
FILES = {
    "train": DataFile(sha256="a", rows=3),
    "dev": DataFile(sha256="b", rows=2),
    "test": DataFile(sha256="c", rows=1),
}


def run(folder: Path, *more: str, script: Path = DRIVER, **variables: str) -> subprocess.CompletedProcess:
    words = [sys.executable, str(script), *(more or SMOKE)]
    words += [] if "--out" in more else ["--out", str(folder / "results")]
    words += [] if "--work" in more else ["--work", str(folder / "work")]
    environment = {**os.environ, "STAND_IN_SECONDS": "0", **variables}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)


def setup(folder: Path, model: str = "models/SmolLM2-135M-Instruct") -> cell_run.Setup:
    return cell_run.Setup(
        models={"smollm2-135m": model}, data=folder / "data", files={"mawps": FILES, "gsm8k": FILES, "e2e": FILES},
        work=folder / "work", results=folder / "results", threads=1, keep=False, processes=Processes(),
    )  # fmt: skip


def small(target: str = "table1", **fields: Any) -> list[Experiment]:
    wanted = {"method": "lora", "dataset": "mawps", **fields}
    return [c for c in experiments(target, profile="small") if all(getattr(c, n) == v for n, v in wanted.items())]


def write(place: cell_run.Setup, cell: Experiment, **changes: Any) -> None:
    """The result of a cell as it would have been written here, and what is changed about it."""
    fields: dict[str, Any] = {
        "experiment": cell.identity, "status": "ok", "config": cell_run.config_of(cell, place),
        "config_hash": cell_run.hash_of(cell, place), "commit": "abc", "packages": {},
        "data": cell_run.data_of(cell, place), "device": Device(name="CPU", kind="cpu", threads=1), "hours": 0.1,
        "scores": {"eval_loss": Score(value=1.0)}, "finished": "2026-01-01",
    }  # fmt: skip
    write_result(place.results, Result(**{**fields, **changes}))


# Before anything starts


@pytest.mark.parametrize("option", ["--out", "--work"])
def test_a_folder_that_cannot_be_written_to_is_said_before_anything_runs(option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = run(tmp_path, *SMOKE, option, str(tmp_path / "file" / "below"))
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert (
        f"{option} must be a folder that can be written to, got" in found.stderr and "cells to run" not in found.stderr
    )


def test_a_model_without_tokenizer_or_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    cells = small()
    with pytest.raises(needs.NotReady, match="has no tokenizer and no weights. Give the folder of a whole model"):
        needs.check(cells, {"smollm2-135m": str(tmp_path)}, tmp_path)
    (tmp_path / "tokenizer.model").write_text("")
    (tmp_path / "pytorch_model.bin").write_text("")
    assert needs._model("smollm2-135m", {"smollm2-135m": str(tmp_path)}) is None


def test_missing_data_and_a_missing_model_are_said_together_with_the_option_to_give(tmp_path: Path) -> None:
    with pytest.raises(needs.NotReady) as error:
        needs.check(small(), {"smollm2-135m": "./nowhere"}, tmp_path)
    text = str(error.value)
    assert "./nowhere is not there" in text and text.count("is not there. Give the folder: --data DIR") == 3
    assert "--source" not in text
    with pytest.raises(needs.NotReady, match="mawps can only be read from local files.*Give --data DIR"):
        needs.check(small(), {"smollm2-135m": "./nowhere"}, None)


def test_a_model_folder_is_named_from_where_the_command_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert needs.models_of("small", ["mine"], small()) == {"smollm2-135m": str(tmp_path / "mine")}
    assert needs.models_of("small", ["owner/name"], small()) == {"smollm2-135m": "owner/name"}


def test_disk_is_counted_for_the_model_that_is_asked_for() -> None:
    need = {
        name: needs.of(experiments(table, profile="paper")[:1], [], {name: "owner/name"}, jobs=1).disk_gb
        for name, table in (("llama2-7b", "table1"), ("llama2-13b", "table6"))
    }
    assert need == {"llama2-7b": pytest.approx(54, abs=1), "llama2-13b": pytest.approx(104, abs=1)}


# What is chosen


def test_targets_without_cells_start_no_tuning() -> None:
    tuning = experiments("tuning", profile="small")
    assert selection.needed(tuning, ["tuning", "figure2a"]) == []
    assert selection.needed(tuning, ["tuning"]) == tuning


def test_a_selection_that_leaves_nothing_is_an_error() -> None:
    both = [*experiments("tuning", profile="small"), *experiments("table1", profile="small")]
    for text in ("method=full,rank=16", "method=lora,dataset=e2e"):
        with pytest.raises(ValueError, match=f"--only must leave a cell, '{text}' leaves none"):
            selection.select(both, text)


def test_a_dry_run_lists_cells_whose_learning_rate_is_not_chosen_yet(tmp_path: Path) -> None:
    place, (cell, *_) = setup(tmp_path), small()
    assert [found.name for found in runner.missing_of([cell], place)] == [cell.name]
    for run_of_grid in grid_of(cell):
        write(place, run_of_grid)
    (known,) = runner.missing_of([cell], place)
    assert "learning_rate" in known.settings


@pytest.mark.parametrize("change", [{"config_hash": "0" * 16}, {"data": {"train": FILES["train"]}}])
def test_a_rate_is_not_chosen_from_runs_of_other_settings_or_rows(change: dict[str, Any], tmp_path: Path) -> None:
    place, (cell, *_) = setup(tmp_path), small()
    runs = grid_of(cell)
    for one in runs:
        write(place, one)
    assert runner.ready([cell], place)[0].settings["learning_rate"] > 0
    write(place, runs[-1], **change)
    with pytest.raises(
        TuningError, match=f"{runs[-1].name}.json is of other settings or rows .* tuning --profile small"
    ):
        runner.ready([cell], place)


def test_results_of_another_model_are_said(tmp_path: Path) -> None:
    place, (cell, *_) = setup(tmp_path), small("tuning")
    write(place, cell)
    assert runner.of_other_models([cell], place) == []
    (line,) = runner.of_other_models([cell], setup(tmp_path, "/models/other"))
    assert "1 results that are there were trained from SmolLM2-135M-Instruct, now other is given" in line


def test_results_of_other_settings_are_said_when_tables_are_written(tmp_path: Path) -> None:
    place, (first, second, *_) = setup(tmp_path), small("tuning")
    write(place, first)
    write(place, second, config_hash="0" * 16)
    results = runner.all_results(place)
    (line,) = outputs.of_other_settings(results, place.results, profile="small", seeds=None)
    assert "1 results are of other settings than the profile's now, and stand in tables all the same" in line
    assert line.endswith(f": tuning/{second.name}. Run their targets again, or remove them.")
    fitting = [result for result in results if result.experiment == first.identity]
    assert outputs.of_other_settings(fitting, place.results, profile="small", seeds=None) == []


def test_seeds_that_were_asked_for_and_not_run_are_said(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    found = run(tmp_path, *SMOKE, "--seeds", "2", STAND_IN_FAILS="seed: 2", STAND_IN_WORDS="ValueError: no")
    table = tmp_path / "results" / "report-smoke" / "table1.md"
    assert "(n = 1, 1 failed)" in table.read_text(encoding="utf-8"), found.stderr
    next((tmp_path / "results" / "table1").glob("*--s2.json")).unlink()
    again = [*SMOKE[:3], "--only", "method=lora,dataset=mawps,rank=4,seed=1", "--seeds", "2"]
    assert run(tmp_path, *again).returncode == 0
    assert "(n = 1, 1 not run)" in table.read_text(encoding="utf-8")


# A cell


def failure(folder: Path, text: str, code: int = 1) -> outcome.CellFailed:
    (folder / "log").write_text(text, encoding="utf-8")
    return outcome.failure("training", code, folder / "log")


def test_memory_that_was_short_in_an_earlier_run_is_not_this_ones_reason(tmp_path: Path) -> None:
    text = "$ train\ntorch.OutOfMemoryError: CUDA out of memory\n$ train\nTraceback\n  File x\nValueError: no\n  more\n"
    found = failure(tmp_path, text)
    assert not found.oom and "exit code 1: ValueError: no (its log: " in str(found)
    assert failure(tmp_path, "$ train\nCUDA out of memory\n").oom
    assert "no output" in str(failure(tmp_path, "$ train\n"))


def test_a_training_without_its_measurement_fails_and_the_others_go_on(tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    text = DRIVER.read_text(encoding="utf-8").replace("Path(__file__).parents[2]", f"Path({str(DRIVER.parents[2])!r})")
    driver.write_text(
        text.replace("pathlib.Path(os.environ", 'if "lora" not in model.parent.name:\n    pathlib.Path(os.environ')
    )
    found = run(tmp_path, *SMOKE[:3], "--only", "method=lora,crosslore,dataset=mawps,rank=4", script=driver)
    assert found.returncode == 1 and "1 ok, 0 out of memory, 1 failed" in found.stderr, found.stderr
    assert "the training left no measurement" in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize("printed", ["", "warning: hello\n{}", "[1]", '{"scores": 3}'])
def test_an_evaluation_that_prints_no_scores_fails_its_cell_alone(printed: str, tmp_path: Path) -> None:
    place = setup(tmp_path)
    words = ["python", "-c", f"print({printed!r})"]
    (tmp_path / "work").mkdir()
    with pytest.raises(outcome.CellFailed, match="must be one JSON object with scores"):
        cell_run._scored(words, log=tmp_path / "log", printed=tmp_path / "out.json", folder=tmp_path, setup=place)


def trains(monkeypatch: pytest.MonkeyPatch, **measure: Any) -> list[Path]:
    """Make a training one that leaves a measurement; return the folders that it ran in."""
    found: list[Path] = []
    content = {"train_seconds": 3.6, "steps": 3, "peak": {}, "losses": [[1, 1.0]], **measure}

    def train(config: object, folder: Path, _: object) -> None:
        found.append(folder)
        (folder / "measure.json").write_text(json.dumps(content), encoding="utf-8")

    monkeypatch.setattr(cell_run, "train", train)
    return found


def test_a_number_that_is_none_fails_its_cell_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trains(monkeypatch, train_seconds=float("nan"), eval_loss=1.0)
    result = cell_run.run_cell(small("tuning")[0], setup(tmp_path))
    assert result.status == "failed" and "its numbers are no result" in result.reason


@pytest.mark.parametrize("loss", [None, float("nan")])
def test_a_run_for_tuning_that_diverged_is_a_result(
    loss: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, runs = setup(tmp_path), small("tuning")
    folders = trains(monkeypatch, eval_loss=loss)
    result = cell_run.run_cell(runs[0], place)
    assert result.status == "ok" and "diverged" in result.scores["eval_loss"].reason and len(folders) == 1
    assert cell_run.finished(runs[0], place) == result
    for run_, value in zip(runs[1:], (2.0, 1.5, 1.8), strict=True):
        write(place, run_, scores={"eval_loss": Score(value=value)})
    assert tuning.chosen_lr(place.results, small()[0]) == runs[2].settings["learning_rate"]


@pytest.mark.parametrize("status", ["oom", "failed"])
def test_a_run_for_tuning_without_memory_is_tried_again(status: Any, tmp_path: Path) -> None:
    """Memory does not depend on the learning rate, so it says nothing of it."""
    place, (first, *others) = setup(tmp_path), small("tuning")
    for run_ in others:
        write(place, run_)
    write(place, first, status=status, reason="short", hours=None, scores={})
    assert cell_run.finished(first, place) is None
    with pytest.raises(tuning.TuningError, match=f"has no loss of {first.name}. Run: python"):
        tuning.chosen_lr(place.results, small()[0])
    (cell,) = (replace(cell, settings={"learning_rate": 1e-4}) for cell in small("table1", rank=16))
    write(place, cell, status="oom", reason="short", hours=None, scores={})
    assert cell_run.finished(cell, place) is not None  # of a table it is a result


def test_cells_without_a_learning_rate_do_not_stop_the_others(tmp_path: Path) -> None:
    place = setup(tmp_path)
    for run_ in small("tuning", method="dora"):
        write(place, run_)
    cells = [*small(), *small(method="dora")]
    found, (line,) = runner.those_ready(cells, place)
    assert {cell.method for cell in found} == {"dora"} and all("learning_rate" in cell.settings for cell in found)
    assert line.startswith("left out, lora on mawps: the learning rate of ")
    with pytest.raises(tuning.TuningError, match="chosen from 4 tuning runs"):
        runner.those_ready(small(), place)


def test_a_rate_at_an_end_of_its_grid_is_said(tmp_path: Path) -> None:
    low, *others = (cell.settings["learning_rate"] for cell in small("tuning"))
    cells = [replace(cell, settings={"learning_rate": rate}) for cell in small() for rate in (low, others[0])]
    (line,) = runner.at_ends(cells)
    assert line.startswith(f"the learning rate of lora on mawps, {low:g}, is at an end of its grid")


def test_scoring_that_fails_starts_anew_and_keeps_what_the_training_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, (cell, _) = setup(tmp_path), small()
    cell, there = replace(cell, settings={"learning_rate": 1e-4}), []

    def scores(exp: Experiment, folder: Path, _: object) -> dict[str, Score]:
        there.append((folder / "predictions.jsonl.partial").exists())
        (folder / "predictions.jsonl.partial").write_text("{}")
        raise outcome.CellFailed("evaluation ended with exit code 2: of other versions", oom=False)

    folders = trains(monkeypatch)
    monkeypatch.setattr(cell_run, "_scores", scores)
    result = cell_run.run_cell(cell, place)
    assert there == [False, False] and len(folders) == 1
    assert result.status == "failed" and result.hours == pytest.approx(0.001)


def test_the_outputs_of_a_scored_cell_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, (cell, _) = setup(tmp_path), small()
    cell = replace(cell, settings={"learning_rate": 1e-4})

    def scores(exp: Experiment, folder: Path, _: object) -> dict[str, Score]:
        (folder / "predictions.jsonl").write_text("{}")
        return {"accuracy_flexible": Score(value=1.0)}

    trains(monkeypatch)
    monkeypatch.setattr(cell_run, "_scores", scores)
    assert cell_run.run_cell(cell, place).status == "ok"
    assert (place.work / "predictions" / "table1" / f"{cell.name}.jsonl").read_text() == "{}"
    assert not cell_run.folder_of(cell, place).exists()


def test_work_of_another_model_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell, _), folders = small(), trains(monkeypatch)
    cell = replace(cell, settings={"learning_rate": 1e-4})

    def scores(exp: Experiment, folder: Path, _: object) -> dict[str, Score]:
        raise KeyboardInterrupt

    monkeypatch.setattr(cell_run, "_scores", scores)
    for name, count in (("owner/one", 1), ("owner/one", 1), ("owner/other", 2)):
        with pytest.raises(KeyboardInterrupt):
            cell_run.run_cell(cell, setup(tmp_path, name))
        assert len(folders) == count


def test_results_of_several_commits_are_said(tmp_path: Path) -> None:
    place = setup(tmp_path)
    for index, run_ in enumerate(small("tuning")):
        write(place, run_, commit="abc" if index else "def")
    results = read_results(place.results)
    (line,) = outputs.of_several_commits(results, profile="small")
    assert line.startswith("results of tuning are of 2 commits of the code (") and "abc" in line and "def" in line
    assert outputs.of_several_commits(results, profile="paper") == []


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [(0, None, None), (1, None, None), (2, None, "0"), (2, "3,1", "3"), (4, "GPU-a,GPU-b", "GPU-a")],
)
def test_a_cell_sees_one_gpu(
    count: int, visible: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell_run.torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cell_run.one_gpu().get("CUDA_VISIBLE_DEVICES") == expected


def test_a_probe_knows_that_the_first_step_fits_all_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = [
        c for c in experiments("table1", profile="paper") if (c.method, c.dataset, c.rank) == ("galore", "gsm8k", 16)
    ]

    def train(config: object, folder: Path, _: object) -> None:  # as fast as the profile says
        seconds = probe.STEPS * 0.26 * 1.2 + 280.0
        (folder / "measure.json").write_text(json.dumps({"train_seconds": seconds, "steps": probe.STEPS}))

    monkeypatch.setattr(probe, "train", train)
    place = SimpleNamespace(work=tmp_path, models={"llama2-7b": "owner/name"}, data=tmp_path)
    assert probe.speed_factor([cell], place) == pytest.approx(1.0)  # type: ignore[arg-type]


def test_changes_of_what_scores_are_in_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(facts, "_git", lambda *words: asked.append(words) or "abc")
    assert facts.commit.__wrapped__() == "abc+changes"
    assert {"src", "scripts", "evaluation", "data"} <= set(asked[-1])


# Interrupts


def test_an_interrupt_of_the_waiting_thread_ends_its_process(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"

    def interrupt() -> None:
        while not (pid.is_file() and pid.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            Processes().run([sys.executable, "-c", code], log=tmp_path / "log", environment={}, folder=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not Path(f"/proc/{pid.read_text()}").exists()


def test_a_tiny_model_that_was_not_finished_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def make(fail: bool) -> Callable[[Path], Path]:
        def made(folder: Path) -> Path:
            calls.append(folder)
            folder.mkdir()
            (folder / "config.json").write_text("{}")
            if fail:
                raise KeyboardInterrupt
            return folder

        return made

    monkeypatch.setattr(reproduce, "make_tiny_model", make(True))
    with pytest.raises(KeyboardInterrupt):
        reproduce._with_tiny_models({"tiny-llama": "saves/none"}, tmp_path)
    assert not (tmp_path / "tiny-llama").exists()
    monkeypatch.setattr(reproduce, "make_tiny_model", make(False))
    assert reproduce._with_tiny_models({"tiny-llama": "saves/none"}, tmp_path) == {
        "tiny-llama": str(tmp_path / "tiny-llama")
    }
    assert (tmp_path / "tiny-llama" / "config.json").is_file() and len(calls) == 2
