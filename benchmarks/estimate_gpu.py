"""What `crosslore estimate` says beside the peaks that `train_7b.py` measured on a GPU: LLaMA2 in bf16, batch 1.

    python benchmarks/estimate_gpu.py        # writes results/estimate_gpu.json, prints a table; seconds, no GPU

The estimate is asked for what that benchmark does: adapters without autocast, by torch's AdamW, whose step holds the
roots of all second moments together; everything else with 8-bit moments; of GSM8K's rows the longest. CUDA's own memory
is left out of both, because the allocator, which was asked, does not count it. The estimate is the peak of a step that
fits bases; the measured steps are ordinary ones. What this package does not estimate (other packages' GaLore, BAdam,
moments in bf16) has no row.
"""

import json
import sys
from typing import Any

from common import ROOT
from train_7b import CHECKPOINTING, GSM8K_LENGTHS, PRESETS

from crosslore.estimate import GIB, Estimator, Method, Setting, chosen_method, load_config

MEASURED, OUTPUT = ROOT / "results" / "benchmarks" / "train_7b.json", ROOT / "results" / "estimate_gpu.json"
MODELS = {"7b": "LLaMA2-7B", "13b": "LLaMA2-13B"}
PEERS = {
    "lora": Method(name="LoRA", trained="lora", rule="adamw", roots=True),
    "dora": Method(name="DoRA", trained="dora", rule="adamw", roots=True),
    "adamw8bit": Method(name="AdamW8bit", rule="adamw8bit"),
}

Row = dict[str, Any]  # Any: JSON


def main() -> int:
    """Write the result file."""
    rows = compared(json.loads(MEASURED.read_text(encoding="utf-8")))
    OUTPUT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))
    return 0


def compared(measured: dict[str, Row]) -> list[Row]:
    """Return the estimate beside each measurement that this package has one for."""
    estimators: dict[str, Estimator] = {}
    rows = []
    for one in measured.values():
        method = method_of(one["method"]) if one["status"] == "ok" else None
        if method is None or one["model"] not in MODELS or "peak_allocated_gib" not in one:
            continue
        if one["model"] not in estimators:
            estimators[one["model"]] = Estimator(load_config(MODELS[one["model"]]))
        tokens = one["tokens"].removesuffix(CHECKPOINTING)
        setting = Setting(
            seq=max(GSM8K_LENGTHS) if tokens == "gsm8k" else int(tokens), checkpointing=tokens != one["tokens"],
            rank=one["rank"], autocast=False, cuda_gb=0.0,
        )  # fmt: skip
        found = estimators[one["model"]].estimate(method, setting)
        peak = round(one["peak_allocated_gib"] * GIB)
        rows.append({
            "model": MODELS[one["model"]], "method": method.name, "rank": setting.rank, "tokens": setting.seq,
            "checkpointing": setting.checkpointing, "measured_bytes": peak, "estimated_bytes": found.peak,
            "difference_percent": round(100 * (found.peak / peak - 1), 1), "estimated_at": found.peak_at,
            "weights_and_state_bytes": found.tensors.fixed,
            **{key: one["environment"][key] for key in ("device", "torch", "source", "commit")},
        })  # fmt: skip
    return rows


def method_of(name: str) -> Method | None:
    """Return the method of `train_7b.py` as the estimate has it; None for what it does not know."""
    preset, _, mode = name.partition(":")
    if preset not in PRESETS:
        return PEERS.get(name)
    if mode == "deferred":
        return chosen_method(preset, "compact", "deferred")
    return chosen_method(preset, mode or "layerwise", "direct")  # type: ignore[arg-type]


def table(rows: list[Row]) -> list[str]:
    """Return the lines of a Markdown table, a method each: estimated / measured GB of each setting."""
    settings = list(dict.fromkeys(map(setting_of, rows)))
    lines = ["| | " + " | ".join(settings) + " |", "|---" * (1 + len(settings)) + "|"]
    for name in dict.fromkeys(name_of(row) for row in rows):
        cells = {setting_of(row): cell(row) for row in rows if name_of(row) == name}
        lines.append(f"| {name} | " + " | ".join(cells.get(setting, "") for setting in settings) + " |")
    return lines


def name_of(row: Row) -> str:
    """Return what a line of the table is called."""
    return str(row["method"]) if row["model"] == MODELS["7b"] else f"{row['model']}, {row['method']}"


def setting_of(row: Row) -> str:
    """Return the head of a column."""
    return f"{row['tokens']} tokens" + (", checkpointing" if row["checkpointing"] else "")


def cell(row: Row) -> str:
    """Return estimated / measured GB and the difference."""
    told, seen = row["estimated_bytes"] / 1e9, row["measured_bytes"] / 1e9
    return f"{told:.2f} / {seen:.2f} ({row['difference_percent']:+.1f} %)"


if __name__ == "__main__":
    sys.exit(main())
