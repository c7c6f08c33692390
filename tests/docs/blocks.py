"""The fenced blocks of README.md and docs/, and what the comment before each one says about it."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(\s*)(`{3,}|~{3,})\s*(\w*)\s*$")
MARK = re.compile(r"^\s*<!--\s*(not run|run by|printed)\s*(?::\s*(.*?))?\s*-->\s*$")
LANGUAGES = ("diff", "python", "sh", "text", "yaml")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    # of its first fence, from 1
    line: int
    language: str
    text: str
    # "not run", "run by", "printed" or "" and what stands behind the colon
    mark: str
    reason: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        """Whether the tests here run it."""
        return self.mark not in ("not run", "run by")


def blocks_of(text: str, page: str) -> list[Block]:
    """Return the blocks of a page in their order."""
    found, before, lines = [], "", text.splitlines()
    at = 0
    while at < len(lines):
        fence = FENCE.match(lines[at])
        if fence is None:
            before = lines[at] if lines[at].strip() else before
            at += 1
            continue
        start, closing = at, re.compile(rf"^\s*{fence.group(2)}\s*$")
        at += 1
        while at < len(lines) and not closing.match(lines[at]):
            at += 1
        mark = MARK.match(before)
        body = textwrap.dedent("\n".join(lines[start + 1 : at])) + "\n"
        kind, reason = (mark.group(1), mark.group(2) or "") if mark else ("", "")
        found.append(Block(page, start + 1, fence.group(3), body, kind, reason))
        before, at = "", at + 1
    return found


def all_blocks() -> list[Block]:
    """Return the blocks of all pages."""
    return [
        block for path in PAGES
        for block in blocks_of(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]  # fmt: skip
