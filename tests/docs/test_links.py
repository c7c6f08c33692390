"""Links of the pages at the root and in docs/ lead to files and headings that exist, as GitHub reads them."""

import re
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
from tests.docs.blocks import PAGES, ROOT

FILES = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")


@cache
def prose(path: Path) -> str:
    """A page's text without code."""
    text = re.sub(r"^(\s*)(`{3,}).*?^\s*\2\s*$", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", lambda code: re.sub(r"[\[\]()]", "", code.group()), text)


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")


@cache
def anchors(path: Path) -> frozenset[str]:
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(path), re.M):
        name = slug(heading)
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return frozenset(found)


def links() -> list[tuple[Path, str]]:
    return [(path, target) for path in FILES for target in LINK.findall(prose(path))]


def broken(path: Path, target: str) -> str:
    """Return what is wrong with a link, nothing if it is right."""
    if re.match(r"[a-z]+:", target):
        return ""
    place, _, anchor = target.partition("#")
    file = (path.parent / unquote(place)).resolve() if place else path
    if not file.is_relative_to(ROOT) or not file.exists():
        return "no such file"
    if anchor and (file.suffix != ".md" or anchor not in anchors(file)):
        return "no such heading"
    return ""


@pytest.mark.parametrize("path", [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in FILES])
def test_links_lead_somewhere(path: Path) -> None:
    wrong = [f"{target}: {why}" for page, target in links() if page == path and (why := broken(page, target))]
    assert not wrong, wrong


def test_links_are_found_and_wrong_ones_are_noticed(tmp_path: Path) -> None:
    assert len(links()) > 100
    assert slug("`e2e-official`: comparable with other papers") == "e2e-official-comparable-with-other-papers"
    readme = ROOT / "README.md"
    assert broken(readme, "docs/none.md") == broken(readme, "../x.md") == "no such file"
    assert broken(readme, "docs/methods.md#none") == "no such heading" and not broken(
        readme, "docs/methods.md#layerwise"
    )


def test_pictures_have_a_description() -> None:
    for path in FILES:
        assert not re.search(r"!\[\s*\]\(", prose(path)), path
