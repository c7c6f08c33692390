"""Bytes of LLaMA2-7B in training, by shapes alone: weights, gradients that live at the same time, optimizer state.

    python benchmarks/memory_7b.py                   # writes results/memory_7b.json; seconds, nothing is downloaded

Nothing is allocated: the model is on torch's meta device, the state is counted by `crosslore.memory.state_bytes`. With
compact gradients a linear layer's gradient is its R (fp32); G of the weight whose basis is being fitted comes and goes.
"compact-layerwise" holds one gradient at a time, as "layerwise" does; the largest is an embedding's in both.
Activations are not counted: they depend on batch, length and checkpointing.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crosslore import LowRankOptimizer, create_optimizer
from crosslore.memory import state_bytes

OUTPUT = Path(__file__).resolve().parent.parent / "results" / "memory_7b.json"
MODES = ("full", "layerwise", "compact", "compact-layerwise")
SIZES = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
         "vocab_size": 32000}  # fmt: skip


def model() -> nn.Module:
    """Return LLaMA2-7B in bf16, without memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        made: nn.Module = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16)
    return made


def gradient_bytes(optimizer: LowRankOptimizer, mode: str) -> int:
    """Return the most bytes of gradients alive together: all of them at the end of backward, or the largest one."""
    total = largest = 0
    for g, group in enumerate(optimizer.param_groups):
        for i, weight in enumerate(group["params"]):
            whole = weight.numel() * weight.element_size()
            blocks = optimizer.item(g, i).blocks
            compact = sum(4 * torch.Size(block.layout.low_shape).numel() for block in blocks)
            total += compact if mode == "compact" and blocks else whole if mode != "layerwise" else 0
            largest = max(largest, whole)
    return largest if mode.endswith("layerwise") else total


def row(preset: str, rank: int, rule: str, embeddings: str) -> dict[str, Any]:
    """Return the bytes of one configuration."""
    net = model()
    optimizer = create_optimizer(net, preset, lr=1e-6, rank=rank, rule=rule, embeddings=embeddings)
    return {
        "preset": preset, "rank": rank, "rule": rule, "embeddings": embeddings,
        "weights": sum(p.numel() * p.element_size() for p in net.parameters()),
        "state": state_bytes(optimizer),
        **{f"gradients_{mode}": gradient_bytes(optimizer, mode) for mode in MODES},
    }  # fmt: skip


def main() -> None:
    """Write the result file."""
    rows = [
        row(preset, rank, rule, embeddings)
        for preset in ("crosslore", "crosslore_plus")
        for rank in (16, 128)
        for rule in ("adamw", "adamw8bit")
        for embeddings in ("full", "frozen")
    ]
    OUTPUT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for one in rows:
        print(
            {
                key: round(value / 1e9, 2) if isinstance(value, int) and value > 1e6 else value
                for key, value in one.items()
            }
        )


if __name__ == "__main__":
    main()
