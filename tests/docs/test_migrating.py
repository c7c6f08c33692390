"""docs/migrating.md: each pair of configurations asks for the same numbers, under their two names."""

import json
import re

import yaml
from tests.docs.blocks import ROOT, blocks_of

TEXT = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
# Of the old method -> of crosslore.
NAMES = {
    "galore_rank": "rank", "galore_scale": "alpha", "galore_update_interval": "crosslore_refresh_every",
    "galore_target": "crosslore_target", "apollo_rank": "rank", "apollo_scale": "alpha",
    "apollo_update_interval": "crosslore_refresh_every", "apollo_target": "crosslore_target", "lora_rank": "rank",
    "lora_target": "crosslore_target",
}  # fmt: skip


def pairs() -> list[tuple[dict, dict]]:
    grids = re.findall(r'<div class="grid" markdown>(.*?)</div>', TEXT, re.S)
    return [tuple(yaml.safe_load(block.text) for block in blocks_of(grid, "migrating.md")) for grid in grids]


def test_the_two_sides_ask_for_the_same() -> None:
    assert [old["finetuning_type"] for old, _ in pairs()] == ["full", "full", "lora"]
    for old, new in pairs():
        assert new["finetuning_type"] == "crosslore"
        for name, theirs in old.items():
            if name in NAMES:
                assert new[NAMES[name]] == theirs, name
        if old["finetuning_type"] == "full":
            assert new["learning_rate"] == old["learning_rate"]


def test_presets_take_over_what_the_peers_have_as_their_choices() -> None:
    from crosslore.presets import get_preset

    (galore, _), (apollo, _), _ = pairs()
    assert get_preset("galore").config.scale == galore["galore_scale"]
    assert get_preset("apollo").config.norm_granularity == apollo["apollo_scale_type"]


def test_the_arithmetic_by_hand_is_that_of_the_result_file() -> None:
    """docs/memory_by_hand.md against results/memory_7b.json; that its program prints it, test_code_blocks.py says."""
    rows = json.loads((ROOT / "results" / "memory_7b.json").read_text(encoding="utf-8"))
    (row,) = [r for r in rows if (r["preset"], r["rank"], r["rule"], r["embeddings"]) ==
              ("crosslore", 128, "adamw8bit", "full")]  # fmt: skip
    text = (ROOT / "docs" / "memory_by_hand.md").read_text(encoding="utf-8")
    printed = next(block.text for block in blocks_of(text, "memory_by_hand.md") if block.mark == "printed")
    said = {
        name.strip(): int(number.replace(",", "")) for name, number in re.findall(r"^(.+?) +([\d,]{3,})", printed, re.M)
    }
    assert (said["weights"], said["state together"]) == (row["weights"], row["state"])
    for mode in ("full", "compact", "compact-layerwise"):
        match = re.search(rf"^{mode} +gradients +([\d,]+)", printed, re.M)
        assert int(match.group(1).replace(",", "")) == row[f"gradients_{mode}"]
