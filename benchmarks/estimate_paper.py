"""What `crosslore estimate` says beside the paper's table 1: LLaMA2-7B, batch 1, bf16, AdamW in 8 bits.

    python benchmarks/estimate_paper.py      # writes results/estimate_paper.json; a minute, nothing is downloaded

The paper gives neither the length of its sequences nor gradient checkpointing, nor which GB it counts, nor whether it
read PyTorch's peak or the card's. Assumed: checkpointing, as LLaMA-Factory has it, and 512 tokens for GSM8K, 128 for
MAWPS. Each row has the estimate with and without CUDA's own 0.8 GB, which is assumed too. GaLore and CrossLore are
those that step inside backward: with all gradients at once no card of 24 GB would do.
"""

import json
import sys

from common import ROOT

from crosslore.estimate import GIB, Estimator, Method, Setting, chosen_method, load_config

OUTPUT = ROOT / "results" / "estimate_paper.json"
TOKENS = {"gsm8k": 512, "mawps": 128}
METHODS = {
    "lora": Method(name="LoRA", trained="lora"),
    "dora": Method(name="DoRA", trained="dora"),
    "galore": chosen_method("galore", "layerwise", "direct"),
    "crosslore": chosen_method("crosslore", "layerwise", "direct"),
}


def main() -> int:
    """Write the result file."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from reproduction.paper import load_paper

    estimator, rows = Estimator(load_config("LLaMA2-7B")), []
    for cell in load_paper().cells():
        key = cell.key
        if (key.table, key.model, key.column) != ("table1", "llama2-7b", "memory") or cell.figure is None:
            continue
        found = estimator.estimate(METHODS[key.method], Setting(rank=key.rank, seq=TOKENS[key.dataset]))
        paper, without = float(cell.figure), found.peak - found.cuda
        rows.append({
            "method": key.method, "rank": key.rank, "dataset": key.dataset, "tokens": TOKENS[key.dataset],
            "paper_gb": paper, "estimated_bytes": found.peak, "estimated_bytes_without_cuda": without,
            "fixed_bytes": found.tensors.fixed,
            "difference_percent_if_gb": round(100 * (found.peak / 1e9 / paper - 1), 1),
            "difference_percent_if_gib": round(100 * (found.peak / GIB / paper - 1), 1),
        })  # fmt: skip
    OUTPUT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
