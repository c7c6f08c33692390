"""Every message that docs/troubleshooting.md quotes is in the code, and every error of the code is on the page."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTES = [quote.strip() for _, quote in re.findall(r"^\| (`+)(.+?)\1 \|", PAGE, re.M)]
GAP = "\0"  # what stands for an inserted value
# Nobody meets these through public names, or they carry another error's text.
INTERNAL = {
    "src/crosslore/projectors/cross_head.py": "cross-head sharing needs side",
    "src/crosslore/telemetry.py": "module \0 has no attribute",
    "evaluation/crosslore_eval/tasks/mawps.py": "not arithmetic: ",
}


def template(node: ast.expr) -> str:
    """Return a text with gaps for what is inserted at run time."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%[sdrf]", GAP, node.value) if isinstance(node.value, str) else GAP
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return GAP


@cache
def texts() -> list[str]:
    """Return every text of the code, the Makefile's too, without what is inserted."""
    found = [(ROOT / "Makefile").read_text(encoding="utf-8")]
    for folder in ("src", "evaluation", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            found += [template(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)]
    return list(dict.fromkeys(text.replace(GAP, "") for text in found))


def fits(quote: str, text: str) -> bool:
    """Return whether a quote is part of a text; … stands for anything, also for nothing."""
    at = 0
    for piece in quote.split("…"):
        found = text.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return True


def explains(quote: str, text: str) -> bool:
    """Return whether a quote is of this text and of no other: by a long piece, or by all that the text has."""
    whole = quote.replace("…", "").strip(" .:") == text.strip(" .:")
    return whole or (max(map(len, quote.split("…"))) >= 12 and fits(quote, text))


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quoted_message_is_in_the_code(quote: str) -> None:
    assert len(re.sub(r"[…\s]", "", quote)) >= 7, "too short to find by"
    assert any(fits(quote, text) for text in texts())


def test_no_message_is_quoted_twice() -> None:
    assert len(set(QUOTES)) == len(QUOTES) > 150


def errors() -> list[tuple[str, str]]:
    """Return file and text of everything that is raised with a text of its own, and of warnings."""
    found = []
    for folder in ("src", "evaluation"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                call = node.exc if isinstance(node, ast.Raise) else node
                warns = (
                    isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "warning"
                )
                listed = isinstance(call, ast.Call) and ast.unparse(call.func) == "unknown_name"  # "unknown … Known: …"
                if isinstance(call, ast.Call) and call.args and not listed and (isinstance(node, ast.Raise) or warns):
                    text = template(call.args[0])
                    if len(re.findall(r"[A-Za-z]{2,}", text)) >= 2:
                        found.append((path.relative_to(ROOT).as_posix(), text))
    return sorted(set(found))


def test_every_error_of_the_code_is_on_the_page() -> None:
    """Texts of two words and more. A new error gets a line: its stable words, its cause, the fix."""
    met = [(path, text) for path, text in errors() if INTERNAL.get(path, GAP * 9) not in text]
    missing = [
        (Path(path).name, text.replace(GAP, "…"))
        for path, text in met
        if not any(explains(quote, text.replace(GAP, "")) for quote in QUOTES)
    ]
    assert not missing, "\n".join(f"{name}: {text}" for name, text in missing)
    assert len(errors()) > 180


def test_a_vague_quote_explains_nothing() -> None:
    text = "rank must be in [1, ] for a  x  matrix, got . Lower it."
    assert explains("rank must be in [1, …] for a … x … matrix", text)
    assert fits("must be …, got …", text) and not explains("must be …, got …", text)
    assert not fits("rank must be …, got … or", text)
