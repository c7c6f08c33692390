import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason='needs transformers: pip install "crosslore[eval]"')

from crosslore_eval import engines, predict  # noqa: E402
from crosslore_eval.engines import TransformersEngine  # noqa: E402
from crosslore_eval.errors import EvalError  # noqa: E402
from crosslore_eval.generate import Decoding  # noqa: E402
from crosslore_eval.inputs import read_outputs  # noqa: E402
from crosslore_eval.manifest import manifest_path, partial_path  # noqa: E402
from crosslore_eval.predict import Settings  # noqa: E402
from crosslore_eval.tasks import find_task  # noqa: E402
from crosslore_eval.tasks.base import Example  # noqa: E402

TASK = find_task("gsm8k")


@pytest.fixture
def settings(model_folder: Path) -> Settings:
    return Settings(model=str(model_folder), decoding=Decoding(max_new_tokens=8), batch_size=3, device="cpu")


@pytest.fixture
def run(examples: list[Example], settings: Settings) -> Callable[..., Path]:
    def predict_into(out: Path, *, overwrite: bool = False, **changes: Any) -> Path:
        return predict.predict(TASK, examples, replace(settings, **changes), out, overwrite=overwrite)

    return predict_into


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_row_for_each_example_in_their_order(
    run: Callable[..., Path], examples: list[Example], tmp_path: Path
) -> None:
    out = run(tmp_path / "deep" / "out.jsonl")
    rows = rows_of(out)
    assert [row["index"] for row in rows] == list(range(len(examples)))
    assert [row["input"] for row in rows] == [example.input for example in examples]
    assert list(rows[0]) == ["index", "prompt_sha256", "input", "prediction", "references", "tokens", "finish"]
    assert len({row["prompt_sha256"] for row in rows}) == len(examples)
    outputs = read_outputs(out)
    assert outputs.references == [list(example.references) for example in examples]
    assert not partial_path(out).exists()
    assert not out.with_name("out.jsonl.lock").exists()


def test_manifest_says_what_the_file_was_made_from(
    run: Callable[..., Path], tmp_path: Path, model_folder: Path
) -> None:
    held = json.loads(manifest_path(run(tmp_path / "out.jsonl")).read_text(encoding="utf-8"))
    assert (held["task"], held["task_version"], held["examples"]) == ("gsm8k", 1, 8)
    assert len(held["model_sha256"]) == 64 and held["model"] == str(model_folder)
    assert held["settings"]["decoding"]["max_new_tokens"] == 8
    assert held["settings"]["template"] == "model"
    assert {"torch", "transformers", "crosslore_eval"} <= set(held["versions"])
    assert held["summary"]["device"] == "cpu" and held["summary"]["dtype"] == "float32"
    assert held["summary"]["new_tokens"] > 0


class Stopped(Exception):
    """Stands for a process that ends between two batches."""


def stop_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TransformersEngine.answers

    def cut_short(self: Any, encoded: Any, wanted: Any, decoding: Any) -> Iterator[Any]:
        yield from whole(self, encoded, list(wanted)[:batches], decoding)
        raise Stopped

    monkeypatch.setattr(engines.TransformersEngine, "answers", cut_short)


@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("torn", [b"", b'{"index": 5, "predic', b'{"index": 99}\n', b"\x00\xff\n"])
def test_an_interrupted_run_goes_on_and_writes_the_same_file(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int, torn: bytes
) -> None:
    whole = run(tmp_path / "whole.jsonl", decoding=Decoding(max_new_tokens=8, temperature=1.0))
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        stop_after(done, patch)
        with pytest.raises(Stopped):
            run(out, decoding=Decoding(max_new_tokens=8, temperature=1.0))
    assert not out.exists()
    with partial_path(out).open("ab") as file:
        file.write(torn)
    run(out, decoding=Decoding(max_new_tokens=8, temperature=1.0))
    assert out.read_bytes() == whole.read_bytes()


def test_a_finished_batch_is_not_generated_again(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            run(tmp_path / "out.jsonl")
    asked = []
    whole = TransformersEngine.answers

    def counted(self: Any, encoded: Any, batches: Any, decoding: Any) -> Iterator[Any]:
        asked.extend(batches)
        yield from whole(self, encoded, batches, decoding)

    monkeypatch.setattr(engines.TransformersEngine, "answers", counted)
    run(tmp_path / "out.jsonl")
    assert len(asked) == 1


def test_a_finished_file_is_kept_and_overwrite_starts_anew(
    run: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = run(tmp_path / "out.jsonl")
    before, age = out.read_bytes(), out.stat().st_mtime_ns
    run(out)
    assert out.stat().st_mtime_ns == age
    assert "finished already: nothing generated" in caplog.text
    run(out, overwrite=True)
    assert out.stat().st_mtime_ns > age
    assert out.read_bytes() == before


def test_an_interrupted_overwrite_keeps_the_old_file_and_goes_on_without_the_option(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(tmp_path / "out.jsonl")
    before, whole = out.read_bytes(), engines.TransformersEngine.answers
    changes = {"decoding": Decoding(max_new_tokens=3)}

    def stopped(self: Any, *args: Any) -> Iterator[Any]:
        yield next(iter(whole(self, *args)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engines.TransformersEngine, "answers", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(out, overwrite=True, **changes)
    assert out.read_bytes() == before
    run(out, **changes)
    assert out.read_bytes() == run(tmp_path / "other.jsonl", **changes).read_bytes() != before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"template": "chatml"}, 'settings.template was "model", now "chatml"'),
        ({"decoding": Decoding(max_new_tokens=9)}, r"settings.decoding.max_new_tokens was \d+, now 9"),
        ({"instruction": "Other."}, "examples_sha256"),
    ],
)
def test_other_settings_never_mix_with_a_file(
    run: Callable[..., Path], tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    out = run(tmp_path / "out.jsonl")
    with pytest.raises(EvalError, match=f"was made with other settings: .*{named}.*--overwrite"):
        run(out, **change)


def test_another_model_never_mixes_with_a_file(
    run: Callable[..., Path], tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    out = run(tmp_path / "out.jsonl")
    other = tmp_path / "other"
    tokenizer.save_pretrained(other)
    changed = type(model)(model.config)
    changed.save_pretrained(other)
    with pytest.raises(EvalError, match="model_sha256"):
        run(out, model=str(other))


def test_the_same_model_elsewhere_goes_on(run: Callable[..., Path], tmp_path: Path, model_folder: Path) -> None:
    import shutil

    out = run(tmp_path / "out.jsonl")
    shutil.copytree(model_folder, tmp_path / "moved")
    assert run(out, model=str(tmp_path / "moved")) == out


def test_a_file_without_manifest_is_not_touched(run: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("somebody's file\n")
    with pytest.raises(EvalError, match="is there without a readable manifest"):
        run(out)
    assert out.read_text() == "somebody's file\n"


def test_another_device_or_dtype_never_mixes_with_a_file(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(Stopped):
            run(tmp_path / "out.jsonl")
    monkeypatch.setattr(engines, "pick_dtype", lambda name, device: "torch.bfloat16")  # as where there is a GPU
    with pytest.raises(EvalError, match='computed_in was "cpu, float32", now "cpu, bfloat16"'):
        run(tmp_path / "out.jsonl")


def test_a_partial_file_without_manifest_is_named(run: Callable[..., Path], tmp_path: Path) -> None:
    partial_path(tmp_path / "out.jsonl").write_text("somebody's\n")
    with pytest.raises(EvalError, match="out.jsonl.partial is there without a readable manifest"):
        run(tmp_path / "out.jsonl")


def test_two_processes_cannot_write_one_file(run: Callable[..., Path], tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / "out.jsonl.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(EvalError, match="another process is writing"):
            run(tmp_path / "out.jsonl")


def test_long_prompts_are_cut_and_counted(run: Callable[..., Path], tmp_path: Path, caplog: Any) -> None:
    out = run(tmp_path / "out.jsonl", max_prompt_tokens=50)
    held = json.loads(manifest_path(out).read_text(encoding="utf-8"))
    assert held["summary"]["prompts_shortened"] > 0
    assert "too long: the end of their input is cut" in caplog.text


def test_more_new_tokens_than_the_context_are_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="--max-new-tokens must be below the model's context of 512 tokens, got 512"):
        run(tmp_path / "out.jsonl", decoding=Decoding(max_new_tokens=512))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be >= 1, got 0"),
        ({"max_prompt_tokens": 0}, "--max-prompt-tokens must be >= 1, got 0"),
        ({"decoding": Decoding(max_new_tokens=0)}, "--max-new-tokens must be >= 1, got 0"),
        ({"decoding": Decoding(max_new_tokens=1, temperature=-1.0)}, r"--temperature must be 0 \(greedy\) or in"),
        ({"decoding": Decoding(max_new_tokens=1, temperature=1e-40)}, "--temperature must be"),
        ({"decoding": Decoding(max_new_tokens=1, temperature=float("inf"))}, "--temperature must be"),
        ({"decoding": Decoding(max_new_tokens=1, top_p=0.0)}, r"--top-p must be in \(0, 1\], got 0.0"),
        ({"decoding": Decoding(max_new_tokens=1, top_k=-1)}, "--top-k must be >= 0"),
        ({"decoding": Decoding(max_new_tokens=1, temperature=float("nan"))}, "--temperature must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Settings, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EvalError, match=message):
        replace(settings, **changes)


def test_a_folder_as_output_is_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="--out must be a file, got the folder"):
        run(tmp_path)


def test_progress_shows_rows_and_tokens_per_second(run: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    run(tmp_path / "out.jsonl")
    shown = capsys.readouterr().err
    assert "8/8" in shown and "tokens/s" in shown


def test_memory_that_is_not_enough_says_what_to_do(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def too_much(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("crosslore_eval.generate._generate", too_much)
    with pytest.raises(EvalError, match="too little memory for 3 prompts at once. Give a smaller --batch-size"):
        run(tmp_path / "out.jsonl")


def command_of(model: Path, data: Path, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "crosslore_eval", "predict", "e2e", "--model", str(model), "--data", str(data),
        "--out", str(out), "--batch-size", "1", "--max-new-tokens", "300", "--device", "cpu",
    ]  # fmt: skip


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_killed_at_random_points_ends_with_the_same_file(
    model_folder: Path, e2e_folder: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        command_of(model_folder, e2e_folder, whole), check=True, capture_output=True, env=environment, timeout=300
    )
    seed = random.randrange(10**6)
    chance, killed = random.Random(seed), 0
    for _ in range(3):
        process = subprocess.Popen(
            command_of(model_folder, e2e_folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=environment,
        )  # fmt: skip
        wanted = chance.randrange(1, 4)  # rows, then a moment: inside a batch, or while one is written
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            held = partial_path(out).read_bytes().count(b"\n") if partial_path(out).is_file() else 0
            if held >= wanted:
                break
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)
        killed += process.poll() is None
        process.kill()
        process.wait()
    subprocess.run(
        command_of(model_folder, e2e_folder, out), check=True, capture_output=True, env=environment, timeout=300
    )
    assert out.read_bytes() == whole.read_bytes(), f"seed {seed}"
    assert killed > 0, "no run was killed before it ended"
