import copy
import json
import os
import random
import shutil
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
from crosslore_eval.settings import Settings  # noqa: E402
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

    def cut_short(self: Any, encoded: Any, wanted: Any, decoding: Any, **options: Any) -> Iterator[Any]:
        yield from whole(self, encoded, list(wanted)[:batches], decoding, **options)
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

    def counted(self: Any, encoded: Any, batches: Any, decoding: Any, **options: Any) -> Iterator[Any]:
        asked.extend(batches)
        yield from whole(self, encoded, batches, decoding, **options)

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

    def stopped(self: Any, *args: Any, **options: Any) -> Iterator[Any]:
        yield next(iter(whole(self, *args, **options)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engines.TransformersEngine, "answers", stopped)
        with pytest.raises(KeyboardInterrupt, match="Run it again without --overwrite: it goes on where it was"):
            run(out, overwrite=True, **changes)
    assert out.read_bytes() == before
    run(out, **changes)
    assert out.read_bytes() == run(tmp_path / "other.jsonl", **changes).read_bytes() != before


def test_overwrite_takes_no_row_of_an_unfinished_run_with_other_settings(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            run(tmp_path / "out.jsonl", decoding=Decoding(max_new_tokens=3))
    whole = run(tmp_path / "whole.jsonl")
    assert run(tmp_path / "out.jsonl", overwrite=True).read_bytes() == whole.read_bytes()


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.9}, "--top-p needs sampling, got 0.9 with the greedy --temperature 0. Give a temperature"),
        ({"top_k": 40}, "--top-k needs sampling, got 40 .* or leave --top-k out"),
    ],
)
def test_an_option_of_sampling_without_a_temperature_is_refused(
    settings: Settings, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvalError, match=message):
        replace(settings, decoding=Decoding(max_new_tokens=1, **options))
    replace(settings, decoding=Decoding(max_new_tokens=1, temperature=0.7, **options))


@pytest.mark.parametrize(
    "same",
    [
        {"device": None},
        {"dtype": "float32"},
        {"instruction": "Describe it."},
        {"decoding": Decoding(max_new_tokens=8, seed=5)},
    ],
)
def test_options_that_mean_the_same_go_on(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: dict[str, Any]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    whole = run(tmp_path / "whole.jsonl")
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(Stopped):
            run(tmp_path / "out.jsonl", **same)
    assert run(tmp_path / "out.jsonl").read_bytes() == whole.read_bytes()
    age = whole.stat().st_mtime_ns
    assert run(whole, **same).stat().st_mtime_ns == age


def test_the_seed_of_samples_never_mixes(run: Callable[..., Path], tmp_path: Path) -> None:
    out = run(tmp_path / "out.jsonl", decoding=Decoding(max_new_tokens=8, temperature=1.0))
    with pytest.raises(EvalError, match="settings.decoding.seed was 0, now 1"):
        run(out, decoding=Decoding(max_new_tokens=8, temperature=1.0, seed=1))


def test_a_wrong_name_is_refused_before_anything_is_loaded(settings: Settings) -> None:
    with pytest.raises(EvalError, match="unknown template 'alpac'. Did you mean 'alpaca'.* Known: model, alpaca"):
        replace(settings, template="alpac")
    with pytest.raises(EvalError, match="unknown engine 'vlm'. Did you mean 'vllm'"):
        replace(settings, engine="vlm")


def test_a_missing_chat_template_is_found_before_the_model_is_loaded(
    run: Callable[..., Path], tmp_path: Path, model_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, bare = tmp_path / "model", copy.deepcopy(tokenizer)
    shutil.copytree(model_folder, folder)
    for file in folder.glob("chat_template*"):
        file.unlink()
    bare.chat_template = None
    bare.save_pretrained(folder)
    monkeypatch.setattr(engines, "load_model", lambda *args, **options: pytest.fail("the model was loaded"))
    with pytest.raises(EvalError, match="--template model needs a tokenizer with a chat template"):
        run(tmp_path / "out.jsonl", model=str(folder))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_model_that_cannot_be_loaded_leaves_everything_as_it_was(
    run: Callable[..., Path], tmp_path: Path, model_folder: Path, overwrite: bool
) -> None:
    torn, folder = tmp_path / "torn", tmp_path / "outputs"
    shutil.copytree(model_folder, torn)
    weights = next(torn.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    folder.mkdir()
    if overwrite:
        run(folder / "out.jsonl")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(EvalError, match="cannot load"):
        run(folder / "out.jsonl", model=str(torn), overwrite=overwrite)
    with pytest.raises(EvalError, match="--max-new-tokens must be below the model's context"):
        run(folder / "out.jsonl", decoding=Decoding(max_new_tokens=512), overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


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


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("kind", ["first", "overwrite"])
def test_a_process_killed_at_each_of_its_writes_ends_with_the_same_files(
    kind: str, model_folder: Path, e2e_folder: Path, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("killed_at_each_write.py")
    command = [sys.executable, str(script), str(model_folder), str(e2e_folder), str(tmp_path / "runs"), kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, check=True, text=True, env=environment, timeout=500)
    found = json.loads(done.stdout)
    points = found["points"]
    manifest, first_row = "replace out.jsonl.manifest.json.part", "half of a write to out.jsonl.partial"
    between = points[points.index(manifest) : len(points) - points[::-1].index(first_row)]
    assert "open out.jsonl.partial" in between and between.count(first_row) == 3  # from the manifest to the last row
    assert found["wrong"] == {}
