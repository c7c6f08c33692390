"""What docs/evaluation.md says about adding a task, done word for word in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the task of the docs in it."""
    root = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "evaluation", root / "evaluation", ignore=ignored)
    shutil.copytree(ROOT / "tests" / "evaluation", root / "tests" / "evaluation", ignore=ignored)
    for file in ("pyproject.toml", "docs/evaluation.md"):
        (root / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, root / file)
    (new,) = re.findall(r"```python\n# (evaluation/crosslore_eval/tasks/\w+\.py)\n(.*?)```", DOCS, flags=re.DOTALL)
    (root / new[0]).write_text(new[1])
    (change,) = re.findall(
        r"```diff\n# (evaluation/crosslore_eval/tasks/__init__\.py)\n(.*?)```", DOCS, flags=re.DOTALL
    )
    file = root / change[0]
    lines = change[1].splitlines()
    for before, line in zip(lines, lines[1:], strict=False):
        if line.startswith("+"):
            text = file.read_text()
            assert text.count(f"{before[1:]}\n") == 1, before
            file.write_text(text.replace(f"{before[1:]}\n", f"{before[1:]}\n{line[1:]}\n"))
    return root


def run(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copy / "evaluation")}
    environment.pop("CROSSLORE_DATA_DIR", None)
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=copy, env=environment, capture_output=True, check=False, text=True
    )


def test_the_new_task_is_listed_and_asks_for_its_data(copy: Path) -> None:
    listed = run(copy, "crosslore_eval", "tasks")
    assert "headlines: articles to headlines (version 1)" in listed.stdout, listed.stderr
    (copy / "out.txt").write_text("a title\n")
    done = run(copy, "crosslore_eval", "score", "headlines", "--predictions", "out.txt")
    assert done.returncode == 2
    assert "Give CROSSLORE_DATA_DIR=DIR or --data DIR with headlines/test.jsonl" in done.stderr
    assert "fields text, title" in done.stderr
    (copy / "headlines").mkdir()
    (copy / "headlines" / "test.jsonl").write_text('{"text": "an article", "title": "a title"}\n')
    done = run(copy, "crosslore_eval", "score", "headlines", "--predictions", "out.txt", "--data", ".")
    assert "headlines, protocol rouge-score, 1 example" in done.stdout, done.stderr


def test_the_linters_and_the_tests_of_tasks_are_content_with_it(copy: Path) -> None:
    if shutil.which("ruff", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("needs ruff")
    for words in (["check"], ["format", "--check"]):
        done = run(copy, "ruff", *words, "evaluation")
        assert done.returncode == 0, done.stdout
    done = run(copy, "pytest", "-q", "-p", "no:cacheprovider", "tests/evaluation/test_tasks.py")
    assert done.returncode == 0, done.stdout
