"""Size limits of the style guide: files of at most 300 lines, functions of at most 60. Tests are exempt."""

import ast
import sys
from pathlib import Path

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60


def too_long(path: Path) -> list[str]:
    """Return one message for the file and for each function of it that is over the limit."""
    text = path.read_text(encoding="utf-8")
    found = []
    if (lines := text.count("\n")) > MAX_FILE_LINES:
        found.append(f"{path}: {lines} lines, at most {MAX_FILE_LINES}. Split it by idea.")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}.")
    return found


def main() -> int:
    """Print what is over a limit; return 1 if anything is."""
    folders = ("src", "evaluation", "scripts", "examples", "benchmarks")
    root = Path(__file__).parent.parent
    messages = [m for folder in folders for path in sorted((root / folder).rglob("*.py")) for m in too_long(path)]
    print("\n".join(messages) or "sizes: all files and functions within limits")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
