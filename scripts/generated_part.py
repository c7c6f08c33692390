"""The part of a page between two marks, which a script writes."""

import sys
from pathlib import Path


def write_part(page: Path, text: str, *, start: str, end: str, check: bool, command: str) -> int:
    """Put text between two lines of a page, or only compare; say what is wrong.

    Args:
        page: a Markdown file with the lines `start` and `end`.
        text: what stands between them, an empty line before and after it.
        start: the line before.
        end: the line after.
        check: whether to compare alone.
        command: what writes the page, for the message.

    Returns:
        The exit code: 0; 1: `check` found another text; 2: the page has no such lines.
    """
    old = page.read_text(encoding="utf-8")
    before, _, rest = old.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        print(f"{page} has no lines {start!r} and {end!r}. Put them where the text belongs.", file=sys.stderr)
        return 2
    new = f"{before}{start}\n\n{text}\n\n{end}{after}"
    if new == old:
        return 0
    if check:
        print(f"{page} is out of date. Run: python {command}", file=sys.stderr)
        return 1
    page.write_text(new, encoding="utf-8")
    return 0
