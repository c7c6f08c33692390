"""`crosslore doctor` and `crosslore init`: a line for each part, its fix, an exit code; nothing is replaced."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crosslore import doctor
from crosslore.cli import main


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
