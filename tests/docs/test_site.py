"""The site builds strictly: every link, every anchor, every name of the API reference."""

import html
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docs.blocks import ROOT

pytest.importorskip("mkdocs", reason='mkdocs is not installed: pip install "crosslore[docs]"')
pytest.importorskip("material", reason='mkdocs-material is not installed: pip install "crosslore[docs]"')
pytest.importorskip("mkdocstrings", reason='mkdocstrings is not installed: pip install "crosslore[docs]"')

REFERENCE = sorted((ROOT / "docs" / "api").glob("*.md"))
NAMES = [name for page in REFERENCE for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.M)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder], cwd=ROOT, capture_output=True,
        text=True, timeout=120, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr, done.stderr[-3000:]
    return folder


def page_of(site: Path, name: str) -> str:
    """The page of the reference on which a name is."""
    source = next(p for p in REFERENCE if f"::: {name}\n" in p.read_text(encoding="utf-8") + "\n")
    return (site / "api" / source.stem / "index.html").read_text(encoding="utf-8")


def test_pages_are_there_and_links_out_of_docs_are_rewritten(site: Path) -> None:
    for source in (ROOT / "docs").rglob("*.md"):
        inside = source.relative_to(ROOT / "docs").with_suffix("")
        page = site / (inside.parent if inside.name == "index" else inside) / "index.html"
        for link in re.findall(r'(?:href|src)="([^"]+)"', page.read_text(encoding="utf-8")):
            target = html.unescape(link).partition("#")[0]
            if re.match(r"[a-z]+:|//|$", target):
                continue
            found = (page.parent / target).resolve()
            assert found.is_relative_to(site) and found.exists(), f"{inside}: {link}"
    assert not list(site.rglob("*.py"))


def test_pictures_of_the_results_are_copied(site: Path) -> None:
    for picture in ("results/ablation/ablation.png", "results/benchmarks/step_time.png"):
        assert (site / picture).read_bytes() == (ROOT / picture).read_bytes()


def test_no_page_asks_another_server(site: Path) -> None:
    """No fonts, scripts or styles from elsewhere: it works without a network."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img)[^>]+src="(?:https?:)?//', text), page
        assert not re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="(?:https?:)?//', text), page


def resolved(name: str) -> object:
    module, found = name, None
    while found is None:
        module = module.rpartition(".")[0]
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            assert module, name
    for part in name.removeprefix(f"{module}.").split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_shows_arguments_errors_and_descriptions(name: str, site: Path) -> None:
    """What the docstring says about arguments, results and errors is in the page's tables."""
    try:
        found = importlib.import_module(name)
    except ModuleNotFoundError:
        found = resolved(name)
    text = page_of(site, name)
    assert f'id="{name}"' in text or f'id="{getattr(found, "__module__", "")}.{name.rpartition(".")[2]}"' in text
    doc = inspect.getdoc(found) or ""
    assert doc, f"{name} has no docstring"
    first = re.split(r"[`\n\"'<>&]", doc)[0].strip()
    assert first in html.unescape(text), f"{name}: {first!r} is not on its page"
    shown = {"Args:": "Parameters:", "Raises:": "Raises:", "Returns:": "Returns:"}
    for section, title in shown.items():
        if re.search(rf"^{section}$", doc, re.M):
            assert title in text, f"{name}: {title}"
    if inspect.isfunction(found):
        for argument in inspect.signature(found).parameters.values():
            assert argument.annotation is not inspect.Parameter.empty and f">{argument.name}<" in text, argument


def test_every_public_name_is_in_the_reference() -> None:
    import crosslore
    import crosslore.estimate

    assert {f"crosslore.{name}" for name in crosslore.__all__} - {"crosslore.__version__", "crosslore.PRESETS"} <= set(
        NAMES
    )
    assert "crosslore.integrations.transformers.trainer_optimizer" in NAMES


def test_fields_of_the_configuration_are_described(site: Path) -> None:
    """By the comments above them."""
    text = html.unescape(page_of(site, "crosslore.LowRankConfig"))
    for words in ("Number of basis vectors r; >= 1", "Steps between two fits of the basis", "Seed of heads, sketches"):
        assert words in text
