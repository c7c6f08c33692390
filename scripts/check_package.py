"""Build wheel and sdist into dist/ and check what is in them, that one gives the other, and that the wheel works.

python scripts/check_package.py        # needs hatchling (extra dev), no network
"""

import argparse
import email
import email.message
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = ("demo", "e2e", "gsm8k", "mawps")
# What the wheel must hold beside every module: read at run time, by type checkers, at the start of Python.
WANTED = (
    "_crosslore_hook.py",
    "crosslore_llamafactory.pth",
    "crosslore_llamafactory.start",
    "crosslore/py.typed",
    "crosslore/estimate/models.json",
    *(f"crosslore/templates/crosslore_{name}.yaml" for name in TEMPLATES),
)
# What may lie at the wheel's root.
ROOTS = {"crosslore", "crosslore_eval", *(name for name in WANTED if "/" not in name)}
# What the sdist must hold for its tests and documentation, and what it must not.
SOURCES = ("pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "README.md", "CHANGELOG.md", "mkdocs.yml")
SOURCE_FOLDERS = ("benchmarks", "data", "docs", "evaluation", "examples", "scripts", "src", "tests", "yaml_configs")
MAX_WHEEL_MB, MAX_SDIST_MB = 1, 4
CLASSIFIERS = ("Typing :: Typed", "Programming Language :: Python :: 3.11", "Operating System :: POSIX :: Linux")
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s]+)\)")


def build(root: Path, out: Path, *targets: str) -> list[Path]:
    """Return the files that the installed hatchling makes of a source folder; all targets if none is named."""
    options = [word for target in targets for word in ("--target", target)]
    words = [sys.executable, "-m", "hatchling", "build", "--directory", str(out.resolve()), *options]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"building failed (exit {done.returncode}):\n{done.stderr or done.stdout}")
    return sorted(out.iterdir())


def modules(root: Path) -> set[str]:
    """Return the wheel's names of the modules in the source."""
    return {
        path.relative_to(root / folder).as_posix()
        for folder in ("src", "evaluation")
        for path in (root / folder).rglob("*.py")
    }


def wheel_problems(wheel: Path) -> list[str]:
    """Return what is missing in a wheel, what should not be there, and what its metadata lack."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        information = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(information))
    folder = information.partition("/")[0]
    found = [
        f"missing in the wheel: {name}"
        for name in sorted({*WANTED, *modules(ROOT), f"{folder}/licenses/LICENSE"} - names)
    ]
    found += [f"not of the wheel: {name}" for name in sorted(names) if name.partition("/")[0] not in {*ROOTS, folder}]
    return found + too_large(wheel, MAX_WHEEL_MB) + metadata_problems(metadata)


def metadata_problems(metadata: email.message.Message) -> list[str]:
    """Return what differs from pyproject.toml, and links of the description that lead nowhere from an index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {
        "Name": project["name"],
        "Version": project["version"],
        "Requires-Python": project["requires-python"],
        "License-Expression": "Apache-2.0",
        "Description-Content-Type": "text/markdown",
    }
    found = [f"{key} must be {value}, got {metadata[key]}" for key, value in wanted.items() if metadata[key] != value]
    urls = metadata.get_all("Project-URL", [])
    found += [
        f"no address of {name}" for name in project["urls"] if not any(url.startswith(f"{name}, ") for url in urls)
    ]
    found += [f"no classifier {name}" for name in CLASSIFIERS if name not in metadata.get_all("Classifier", [])]
    always = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    if always != project["dependencies"]:
        found.append(f"without extras it must need {project['dependencies']}, got {always}")
    description = str(metadata.get_payload())
    if "# CrossLore" not in description:
        found.append("README.md is not the description")
    return found + [f"a link that leads nowhere from an index: {target}" for target in LINK.findall(description)]


def sdist_problems(sdist: Path) -> list[str]:
    """Return what is missing in a source distribution, and what should not be there."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tops = {name.partition("/")[0] for name in names}
    found = [f"missing in the sdist: {name}" for name in sorted({*SOURCES, *SOURCE_FOLDERS} - tops)]
    allowed = {*SOURCES, *SOURCE_FOLDERS, "CITATION.cff", "CONTRIBUTING.md", "PKG-INFO", ".gitignore"}
    found += [f"not of the sdist: {name}" for name in sorted(tops - allowed)]
    return found + too_large(sdist, MAX_SDIST_MB)


def too_large(file: Path, limit_mb: float) -> list[str]:
    """Return a message if a file is over its limit: something got in that nobody meant."""
    size_mb = file.stat().st_size / 1e6
    return [f"{file.name} must have at most {limit_mb} MB, got {size_mb:.1f}"] if size_mb > limit_mb else []


def rebuilt(sdist: Path, folder: Path) -> Path:
    """Return the wheel that comes out of a source distribution."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build(next(folder.iterdir()), folder / "wheel", "wheel")[0]


def installed(wheel: Path, folder: Path) -> None:
    """Install a wheel, and nothing else, into a folder."""
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*words, "--target", str(folder), str(wheel)], check=True)


def run_installed(folder: Path, *words: str, cwd: Path) -> str:
    """Return what Python prints with an installed wheel before everything else; raises if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, *words], env=environment, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with exit code {done.returncode}:\n{done.stderr}")
    return done.stdout


def use_problems(wheel: Path, folder: Path) -> list[str]:
    """Return what does not work with an installed wheel: the import, and `crosslore init`."""
    installed(wheel, folder / "site")
    place = run_installed(folder / "site", "-c", "import crosslore; print(crosslore.__file__)", cwd=folder).strip()
    found = [] if Path(place).is_relative_to(folder) else [f"imported from {place}, not from the wheel"]
    printed = run_installed(folder / "site", "-m", "crosslore.cli", "init", "configs", cwd=folder).split()
    wanted = [f"configs/crosslore_{name}.yaml" for name in TEMPLATES]
    return found + ([] if printed == wanted else [f"crosslore init must write {wanted}, got {printed}"])


def main() -> int:
    """Print what is wrong, or the two files; return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="DIR", help="where to build (dist)")
    out: Path = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        sdist, wheel = sorted(build(ROOT, place / "built"), key=lambda path: path.suffix)
        found = wheel_problems(wheel) + sdist_problems(sdist)
        if rebuilt(sdist, place / "again").read_bytes() != wheel.read_bytes():
            found.append("the sdist gives another wheel")
        found += use_problems(wheel, place)
        out.mkdir(parents=True, exist_ok=True)
        for file in (wheel, sdist):
            (out / file.name).write_bytes(file.read_bytes())
    files = [f"{out / file.name}, {(out / file.name).stat().st_size / 1e6:.2f} MB" for file in (wheel, sdist)]
    print("\n".join(found or [*files, "package: contents, metadata, build from the sdist and import are right"]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
