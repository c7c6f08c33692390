"""Wheel and sdist: what is in them, that one gives the other, and that the wheel works by itself. No network."""

import email.message
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("hatchling", reason='needs hatchling: pip install "crosslore[dev]"')

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def package(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("check_package")


@pytest.fixture(scope="module")
def built(package: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and sdist."""
    sdist, wheel = sorted(package.build(ROOT, tmp_path_factory.mktemp("dist")), key=lambda path: path.suffix)
    return wheel, sdist


def test_nothing_is_missing_and_nothing_else_is_in_it(package: ModuleType, built: tuple[Path, Path]) -> None:
    assert package.wheel_problems(built[0]) == []
    assert package.sdist_problems(built[1]) == []


def test_the_sdist_gives_the_same_wheel(package: ModuleType, built: tuple[Path, Path], tmp_path: Path) -> None:
    assert package.rebuilt(built[1], tmp_path).read_bytes() == built[0].read_bytes()


def test_the_installed_wheel_is_imported_and_copies_its_configurations(
    package: ModuleType, built: tuple[Path, Path], tmp_path: Path
) -> None:
    assert package.use_problems(built[0], tmp_path) == []
    for name in package.TEMPLATES:
        copied = tmp_path / "configs" / f"crosslore_{name}.yaml"
        assert copied.read_bytes() == (ROOT / "yaml_configs" / copied.name).read_bytes()


def test_the_start_up_file_runs_from_the_wheel(package: ModuleType, built: tuple[Path, Path], tmp_path: Path) -> None:
    package.installed(built[0], tmp_path / "site")
    lines = (
        "import site, sys",
        f"site.addsitedir({str(tmp_path / 'site')!r})",
        "finder = next(one for one in sys.meta_path if type(one).__name__ == 'SeamFinder')",
        "print(sys.modules[type(finder).__module__].__file__)",
    )
    done = subprocess.run([sys.executable, "-S", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "site" / "_crosslore_hook.py")


def test_what_is_wrong_is_said(package: ModuleType, built: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = tmp_path / built[0].name
    with zipfile.ZipFile(built[0]) as whole, zipfile.ZipFile(damaged, "w") as part:
        for name in whole.namelist():
            if name != "crosslore/py.typed":
                part.writestr(name, whole.read(name).replace(b"Name: crosslore", b"Name: other"))
        part.writestr("tests/x.py", "")
    assert package.wheel_problems(damaged) == [
        "missing in the wheel: crosslore/py.typed", "not of the wheel: tests/x.py", "Name must be crosslore, got other",
    ]  # fmt: skip
    nothing = "\n".join(package.metadata_problems(email.message.Message()))
    assert "no address of Repository" in nothing and "Requires-Python must be >=3.11, got None" in nothing


def test_links_of_the_description_are_whole(load_script: Callable[[str], ModuleType]) -> None:
    whole = load_script("package_readme").with_whole_links
    assert whole("[a](docs/a.md#b), [c](https://c.org)", "https://r") == (
        "[a](https://r/blob/main/docs/a.md#b), [c](https://c.org)"
    )
    assert whole("![p](results/p.png) [d](#here)", "https://r") == "![p](https://r/raw/main/results/p.png) [d](#here)"


def test_a_build_that_fails_says_why(package: ModuleType, tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with pytest.raises(SystemExit, match="building failed"):
        package.build(tmp_path, tmp_path / "dist")


def test_contributing_names_the_oldest_and_the_newest_llamafactory() -> None:
    from crosslore.integrations.llamafactory.compat import TESTED

    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for word, release in (("oldest", TESTED[0]), ("newest", TESTED[-1])):
        assert f"| {word} | {release} |" in page
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert any(line.startswith("llamafactory") and TESTED[0] in line for line in extras["llamafactory"])
