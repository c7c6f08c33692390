"""The start-up hook costs every interpreter start: it must be small, and this test must be able to see if it is not."""

import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
# Milliseconds that the hook may add to the start of an interpreter.
LIMIT_MS = 1.0
MEASURE = """
import sys, time
sys.path.insert(0, {folder!r})
modules = set(sys.modules)
start = time.perf_counter()
import {module}
elapsed = time.perf_counter() - start
loaded = {{m.split(".")[0] for m in set(sys.modules) - modules}}
print(elapsed * 1000, len(loaded & {{"torch", "llamafactory", "transformers", "crosslore"}}))
"""


def cost(folder: Path, module: str) -> tuple[float, int]:
    """Return the median milliseconds of importing the hook in fresh interpreters, and how many heavy modules came."""
    code = MEASURE.format(folder=str(folder), module=module)
    lines = [
        subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(7)
    ]
    values = [line.split() for line in lines]
    return statistics.median(float(ms) for ms, _ in values), max(int(heavy) for _, heavy in values)


def test_the_hook_costs_under_a_millisecond_and_loads_nothing(tmp_path: Path) -> None:
    cost(SOURCE, "_crosslore_hook")  # writes the byte code, as an installation does
    milliseconds, heavy = cost(SOURCE, "_crosslore_hook")
    assert heavy == 0
    assert milliseconds < LIMIT_MS
    # The same measurement sees a hook that is slow, and one that loads our package.
    text = (SOURCE / "_crosslore_hook.py").read_text(encoding="utf-8")
    (tmp_path / "slow_hook.py").write_text(text + "\nimport time\ntime.sleep(0.002)\n", encoding="utf-8")
    (tmp_path / "crosslore").mkdir()
    (tmp_path / "crosslore" / "__init__.py").touch()
    (tmp_path / "heavy_hook.py").write_text(text + "\nimport crosslore\n", encoding="utf-8")
    assert cost(tmp_path, "slow_hook")[0] > LIMIT_MS
    assert cost(tmp_path, "heavy_hook")[1] > 0


def test_a_fresh_interpreter_of_this_environment_has_the_hook_and_nothing_heavy() -> None:
    code = (
        "import sys; assert '_crosslore_hook' in sys.modules; "
        "assert not {'torch', 'llamafactory', 'crosslore'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_registering_twice_changes_nothing() -> None:
    import _crosslore_hook

    before = list(sys.meta_path)
    _crosslore_hook.register()
    assert sys.meta_path == before


def test_a_broken_installation_is_reported_and_leaves_llamafactory_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from types import ModuleType

    import _crosslore_hook

    monkeypatch.setitem(sys.modules, "crosslore.integrations.llamafactory.hooks", None)
    _crosslore_hook.after_import(ModuleType("llamafactory.launcher"))
    assert "other types are not affected" in capsys.readouterr().err


def test_the_wheel_carries_the_hook_files(tmp_path: Path) -> None:
    build = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    (path,) = build.WheelBuilder(str(SOURCE.parent)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(path).namelist())
    assert {"_crosslore_hook.py", "crosslore_llamafactory.pth", "crosslore_llamafactory.start"} <= names
    assert {"crosslore/py.typed", "crosslore/step.py", "crosslore_eval/__init__.py"} <= names
