"""The runner of the reproduction: what it runs, what it skips, what an interrupt costs."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import reproduce
from reproduction import needs, outcome, selection
from reproduction.cells import Experiment
from reproduction.experiments import experiments
from reproduction.memory_need import memory_lines
from reproduction.processes import FolderBusy, only_one
from reproduction.results import read_results

from crosslore_eval.errors import EvalError

DRIVER = Path(__file__).with_name("reproduce_with_stand_ins.py")
ONLY = "method=lora,crosslore,dataset=mawps"


def command(folder: Path, *more: str) -> list[str]:
    """A smoke run of four cells whose training and evaluation are stand-ins."""
    places = ["--out", str(folder / "results"), "--work", str(folder / "work")]
    return [sys.executable, str(DRIVER), "table1", "--profile", "smoke", "--only", ONLY, *places, *more]


def ended(folder: Path) -> dict[str, dict]:
    paths = sorted((folder / "results").glob("table1/*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def run(arguments: Sequence[str], **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, **variables}, timeout=300)


def test_cells_are_run_once_and_again_only_for_other_settings(tmp_path: Path) -> None:
    first = run(command(tmp_path))
    assert first.returncode == 0, first.stderr
    assert "4 ok, 0 out of memory, 0 failed; 0 were there" in first.stderr
    times = {name: result["finished"] for name, result in ended(tmp_path).items()}
    assert len(times) == 4
    for suffix in ("md", "csv", "tex"):
        assert (tmp_path / "results" / "report-smoke" / f"table1.{suffix}").is_file()
    assert "function test" in (tmp_path / "results" / "report-smoke.html").read_text(encoding="utf-8")
    again = run(command(tmp_path))
    assert "0 ok, 0 out of memory, 0 failed; 4 were there" in again.stderr
    path = next((tmp_path / "results" / "table1").glob("*lora*r4*"))
    path.write_text(path.read_text(encoding="utf-8").replace('"config_hash": "', '"config_hash": "0'), encoding="utf-8")
    third = run(command(tmp_path))
    assert "1 ok, 0 out of memory, 0 failed; 3 were there" in third.stderr


@pytest.mark.parametrize(
    ("words", "status", "attempts"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "oom", 1),
        ("ValueError: no", "failed", 2),
    ],
)
def test_a_cell_that_ends_badly_is_a_row_and_the_others_go_on(
    words: str, status: str, attempts: int, tmp_path: Path
) -> None:
    found = run(command(tmp_path), STAND_IN_FAILS="crosslore", STAND_IN_WORDS=words)
    results = ended(tmp_path)
    assert found.returncode == (1 if status == "failed" else 0)
    assert {name.split("--")[1]: result["status"] for name, result in results.items()} == {
        "crosslore": status,
        "lora": "ok",
    }
    bad = next(result for result in results.values() if result["status"] != "ok")
    assert words.split(":")[0] in bad["reason"]
    logs = list((tmp_path / "work").glob("cells/table1/*crosslore*r4*/train.log"))
    assert logs[0].read_text(encoding="utf-8").count(words) == attempts
    mended = run(command(tmp_path))  # a failed cell is tried again, one without memory is a result
    assert mended.returncode == 0
    assert [result["status"] for result in ended(tmp_path).values()].count("ok") == (4 if status == "failed" else 2)


def test_five_kills_at_random_times_leave_the_report_of_a_run_without_any(tmp_path: Path) -> None:
    calm = tmp_path / "calm"
    assert run(command(calm), STAND_IN_SECONDS="0").returncode == 0
    rough, dice = tmp_path / "rough", random.Random(0)
    for _ in range(5):
        before = set(ended(rough))
        process = subprocess.Popen(
            command(rough), start_new_session=True, env={**os.environ, "STAND_IN_SECONDS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(dice.uniform(1.0, 9.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert before <= set(ended(rough))
        for result in ended(rough).values():
            assert result["status"] == "ok"
    assert run(command(rough), STAND_IN_SECONDS="0").returncode == 0
    for suffix in ("md", "csv", "tex"):
        texts = [
            (place / "results" / "report-smoke" / f"table1.{suffix}").read_text("utf-8") for place in (calm, rough)
        ]
        assert texts[0] == texts[1]


def test_children_die_with_a_killed_run(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path), env={**os.environ, "STAND_IN_SECONDS": "60"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (found := list((tmp_path / "work").glob("cells/table1/*/stand-in.pid"))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    child = int(found[0].read_text(encoding="ascii"))
    process.kill()
    process.wait()
    while Path(f"/proc/{child}").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_interrupt_ends_in_order_and_says_how_to_go_on(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # of a background job: ignored
    process = subprocess.Popen(
        command(tmp_path), env={**os.environ, "STAND_IN_SECONDS": "60"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "work").glob("cells/table1/*/stand-in.pid")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "The same command goes on from there" in errors
    assert "Traceback" not in errors


def test_a_probe_tells_the_hours(tmp_path: Path) -> None:
    found = run(command(tmp_path, "--probe"))
    assert found.returncode == 0
    assert re.search(r"4 cells to run, about \d+ min \(by a probe of a few steps\)", found.stderr)
    failing = run(command(tmp_path / "other", "--probe"), STAND_IN_FAILS="crosslore", STAND_IN_WORDS="ValueError: no")
    assert "probe: training ended with exit code 1: ValueError: no" in failing.stderr
    assert "by the profile's figures" in failing.stderr


def test_a_folder_is_for_one_run_at_a_time(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(FolderBusy, match="another run works in"), only_one(tmp_path):
        pass


def test_a_cell_of_the_same_settings_is_taken_over(tmp_path: Path) -> None:
    target = ["table1", "ablation-residual", "--profile", "smoke", "--only", "method=crosslore,dataset=mawps,rank=4"]
    places = ["--out", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    found = run([sys.executable, str(DRIVER), *target, *places], STAND_IN_SECONDS="0")
    assert "2 ok, 0 out of memory, 0 failed; 0 were there, 1 taken over" in found.stderr
    first, second = read_results(tmp_path / "results")
    assert {first.reused_from, second.reused_from} == {None, (first if second.reused_from else second).experiment.table}


# Selection


def cells() -> list[Experiment]:
    return experiments("table1", profile="smoke")


def test_a_selection_takes_fields_and_alternatives() -> None:
    chosen = selection.select(cells(), "method=crosslore,lora,rank=4")
    assert {cell.method for cell in chosen} == {"crosslore", "lora"} and {cell.rank for cell in chosen} == {4}
    assert selection.select(cells(), "crosslore,dataset=gsm8k") == [
        cell for cell in cells() if (cell.method, cell.dataset) == ("crosslore", "gsm8k")
    ]
    assert selection.select(cells(), "") == cells()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methd=lora", "unknown field of --only 'methd'. Did you mean 'method'"),
        ("method=lorra", "unknown method in --only 'lorra'. Did you mean 'lora'"),
        ("nothing", "'nothing' is of no field"),
    ],
)
def test_a_wrong_selection_is_named(text: str, message: str) -> None:
    with pytest.raises((EvalError, ValueError), match=message):
        selection.select(cells(), text)


def test_tuning_is_run_for_what_needs_it_only() -> None:
    both = [*experiments("tuning", profile="small"), *experiments("table1", profile="small")]
    chosen = selection.needed(selection.select(both, "method=crosslore,rank=32"), ["tuning", "table1"])
    tuning = [cell for cell in chosen if cell.table == "tuning"]
    assert {(cell.method, cell.dataset) for cell in tuning} == {("crosslore", "gsm8k"), ("crosslore", "mawps")}
    assert all(cell.rank == 32 for cell in chosen if cell.table != "tuning")


# What is missing


def test_what_is_missing_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = reproduce.main(["table1", "--model", str(tmp_path / "none"), "--work", str(tmp_path / "work")])
    assert code == 2
    text = capsys.readouterr().err
    assert "is not there. Give a folder: --model llama2-7b=DIR" in text
    assert "Traceback" not in text


def test_memory_is_estimated_before_anything_is_started() -> None:
    (line,) = memory_lines(selection.select(experiments("table1", profile="paper"), "method=crosslore,full"))
    assert re.match(r"llama2-7b: at most \d+\.\d GiB of GPU memory \(full\), estimated for 512 tokens; more than", line)
    assert "full" in line.partition("more than")[2] and "crosslore" not in line
    assert memory_lines(cells()) == []


def test_a_lone_model_for_several_is_refused() -> None:
    all_cells = experiments("all", profile="paper")
    with pytest.raises(needs.NotReady, match="--model some could be one of .*llama2-7b.*Write --model NAME=DIR"):
        needs.models_of("paper", ["some"], all_cells)
    with pytest.raises(needs.NotReady, match="'llama9' is no model of these cells"):
        needs.models_of("paper", ["llama9=some"], all_cells)


def test_paths_of_a_machine_are_not_in_a_result() -> None:
    assert outcome.without_folder("/somewhere/else/model") == "model"
    assert outcome.without_folder("models/SmolLM2-135M-Instruct") == "models/SmolLM2-135M-Instruct"


@pytest.mark.slow
def test_real_cells_run_end_to_end(tmp_path: Path) -> None:
    """LLaMA-Factory and crosslore-eval themselves, for an adapter and for CrossLore."""
    places = ["--out", str(tmp_path / "results"), "--work", str(tmp_path / "work"), "--jobs", "2", "--threads", "1"]
    program = str(Path(reproduce.__file__))
    only = "method=lora,crosslore,dataset=mawps,rank=4"
    found = run([sys.executable, program, "table1", "--profile", "smoke", "--only", only, *places])
    assert found.returncode == 0, found.stderr[-3000:]
    for result in read_results(tmp_path / "results"):
        assert result.status == "ok" and result.hours is not None and result.hours > 0
        assert 0.0 <= (result.scores["accuracy_flexible"].value or 0.0) <= 100.0
        assert result.train["steps"] == 3 and result.peak is not None
