"""`crosslore doctor` and `crosslore init`: a line for each part, its fix, an exit code; nothing is replaced."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from crosslore import doctor
from crosslore.cli import main

ROOT = Path(__file__).resolve().parents[2]


def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine()}


def test_every_part_has_one_finding_and_what_is_not_ok_says_what_to_do() -> None:
    found = doctor.examine()
    assert [finding.name for finding in found] == list(doctor.CHECKS)
    assert all(bool(finding.fix) == (finding.level != "ok") for finding in found)
    assert findings()["torch"].text == torch.__version__


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [one["name"] for one in found] == list(doctor.CHECKS)
    assert code == int(any(one["level"] == "problem" for one in found))


def test_a_problem_is_exit_code_1_and_its_fix_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "TESTED", ("0.0.1",))
    monkeypatch.setattr(doctor, "_version", lambda package: "9.9" if package == "llamafactory" else None)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "9.9, not among the tested 0.0.1" in text and "pip install llamafactory==0.0.1" in text


def test_the_oldest_versions_are_those_that_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == f">={doctor._dotted(doctor.OLDEST_PYTHON)}"
    assert f"torch>={doctor._dotted(doctor.OLDEST_TORCH)}" in project["dependencies"]


def test_a_torch_that_is_too_old_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    assert doctor._torch().level == "problem" and "2.8 is the oldest" in doctor._torch().fix
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert "oldest" not in doctor._torch().fix


def test_a_check_that_breaks_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise OSError("no disk")

    monkeypatch.setitem(doctor.CHECKS, "disk", broken)
    assert findings()["disk"].level == "problem" and "OSError: no disk" in findings()["disk"].text


def test_a_java_that_does_not_start_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/false")
    assert findings()["Java"].level == "warning"


def test_the_hook_that_is_switched_off_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSLORE_LLAMAFACTORY", "0")
    monkeypatch.setattr(doctor, "_version", lambda package: "0.9.5")
    assert doctor._hook().level == "warning" and "Unset" in doctor._hook().fix


def test_a_bitsandbytes_that_does_not_load_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: "0.1")
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)  # importing it raises
    found = doctor._bitsandbytes()
    assert found.level == "problem" and "0.1 does not work on" in found.text and "Error" in found.text
    assert "pip install -U bitsandbytes" in found.fix and "adamw_torch" in found.fix


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    words = f"{sys.executable} -m crosslore.cli presets --json | head -c 10; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=300)
    assert found.returncode in (0, 141) and "error" not in found.stderr.lower() and found.stdout.startswith("{")


# crosslore init


def test_init_copies_the_configurations_and_replaces_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "configs"
    assert main(["init", str(folder)]) == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {f"crosslore_{task}.yaml" for task in ("demo", "e2e", "gsm8k", "mawps")}
    (folder / "crosslore_e2e.yaml").write_text("mine", encoding="utf-8")
    assert main(["init", str(folder)]) == 2
    assert "has crosslore_demo.yaml" in capsys.readouterr().err
    assert (folder / "crosslore_e2e.yaml").read_text(encoding="utf-8") == "mine"
    assert main(["init", str(folder / "crosslore_e2e.yaml")]) == 2


def test_init_writes_through_no_broken_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "elsewhere"
    (tmp_path / "crosslore_e2e.yaml").symlink_to(target)
    assert main(["init", str(tmp_path)]) == 2
    assert "has crosslore_e2e.yaml already" in capsys.readouterr().err and not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["crosslore_e2e.yaml"]


def test_init_leaves_nothing_of_a_copy_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("kept", encoding="utf-8")
    read = Path.read_bytes

    def full(path: Path) -> bytes:
        if path.name == "crosslore_gsm8k.yaml":
            raise OSError(28, "No space left on device")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", full)
    assert main(["init", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
