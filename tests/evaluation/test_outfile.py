"""`--out`: what cannot be written is said before a model is loaded."""

import os
from pathlib import Path

import pytest

from crosslore_eval.errors import EvalError
from crosslore_eval.outfile import check_out, only_writer


def test_a_file_in_folders_that_are_not_there_yet_is_allowed_and_nothing_made(tmp_path: Path) -> None:
    check_out(tmp_path / "a" / "b" / "out.jsonl")
    check_out(tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out.jsonl", tmp_path / "file" / "deep" / "out.jsonl"):
        with pytest.raises(
            EvalError, match=f"--out must be a file that can be written, got {out}: .*file is no folder"
        ):
            check_out(out)


@pytest.mark.parametrize("out", ["", os.devnull])
def test_what_is_no_file_is_refused(tmp_path: Path, out: str) -> None:
    with pytest.raises(EvalError, match="--out must be a file, got the (folder|device or pipe) .* Give the name of a"):
        check_out(tmp_path / out)


def test_a_name_that_the_system_does_not_allow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="--out must be a file that can be written, got .*: File name too long"):
        check_out(tmp_path / ("x" * 300))


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(EvalError, match=f"no permission to write in {tmp_path}. Choose another --out"):
        check_out(tmp_path / "deep" / "out.jsonl")


@pytest.mark.parametrize("name", ["file/out.jsonl", "x" * 252])  # the second: with ".lock" it is too long
def test_what_fails_only_when_written_names_the_option_too(tmp_path: Path, name: str) -> None:
    pytest.importorskip("fcntl")
    (tmp_path / "file").write_text("x")
    out = tmp_path / name
    with pytest.raises(EvalError, match=f"--out must be a file that can be written, got {out}: "), only_writer(out):
        pass
