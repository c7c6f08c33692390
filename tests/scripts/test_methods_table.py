"""The page of methods follows the presets."""

import re
import subprocess
import sys
from pathlib import Path

from crosslore import PRESETS
from crosslore.heads import FUSED
from crosslore.registry import REGISTRY

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "methods.md"


def test_the_page_is_up_to_date() -> None:
    script = ROOT / "scripts" / "make_methods_table.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_part_and_preset_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    names = {name for kind in REGISTRY.values() for name in kind} - {"cross_head"} | set(PRESETS)
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_the_number_of_fused_model_types_is_right() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert int(re.search(r"\((\d+) model types\)", text).group(1)) == len(FUSED)
