"""Bytes of LLaMA2-7B in training, by shapes alone: weights, gradients that live at the same time, optimizer state.

    python benchmarks/memory_7b.py                   # writes results/memory_7b.json; seconds, nothing is downloaded

Nothing is allocated: the model is on torch's meta device, the state is counted by `crosslore.memory.state_bytes`. With
compact gradients a linear layer's gradient is its R and the gradient at the residual's positions (fp32); G of the
weight whose basis is being fitted comes and goes. "layerwise" holds one gradient at a time; the largest is an
embedding's. "compact-layerwise" holds compact gradients of the few weights that step together, and rows of an
embedding's gradient, as many as on a GPU.
Activations are not counted: they depend on batch, length and checkpointing.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crosslore import LowRankOptimizer, create_optimizer
from crosslore.compact.rows import rows_weights
from crosslore.estimate.at_once import row_entries, waiting_compact
from crosslore.items import Item
from crosslore.memory import state_bytes
from crosslore.residuals.sparse import SparseResidual
from crosslore.targets import embedding_weights

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


def gradient_bytes(optimizer: LowRankOptimizer, net: nn.Module, mode: str) -> int:
    """Return the most bytes of gradients alive together: all of them at the end of backward, or what waits in it."""
    items = [optimizer.items.of(p) for p in net.parameters() if p.requires_grad]
    low = {id(item.weight): sum(math.prod(block.layout.low_shape) for block in item.blocks) for item in items}
    held = {id(item.weight): 4 * (low[id(item.weight)] + kept_entries(item)) for item in items if low[id(item.weight)]}
    whole = {id(item.weight): item.weight.numel() * item.weight.element_size() for item in items}
    if mode == "full":
        return sum(whole.values())
    if mode == "layerwise":
        return max(whole.values())
    if mode == "compact":
        return sum((whole | held).values())
    rows = {id(w): w.element_size() * row_entries(w, "cuda") for w in rows_weights(optimizer, net)}
    pieces = {key: size for key, size in (whole | rows).items() if not low[key]}
    sizes = list(reversed(held.values()))
    most, left = waiting_compact([entries for entries in reversed(low.values()) if entries], "cuda", sizes=sizes)
    # The input embedding is the last one: R of the last few layers still wait.
    ends = [pieces.get(id(w), 0) for w in embedding_weights(net).values()]
    return max(most, left + ends[0], *pieces.values())


def kept_entries(item: Item) -> int:
    """Return how many entries of a weight its residual keeps."""
    pairs = zip(item.blocks, item.methods, strict=True)
    return sum(m.residual.kept(b.layout) for b, m in pairs if isinstance(m.residual, SparseResidual))


def row(preset: str, rank: int, rule: str, embeddings: str) -> dict[str, Any]:
    """Return the bytes of one configuration."""
    net = model()
    optimizer = create_optimizer(net, preset, lr=1e-6, rank=rank, rule=rule, embeddings=embeddings)
    return {
        "preset": preset, "rank": rank, "rule": rule, "embeddings": embeddings,
        "weights": sum(p.numel() * p.element_size() for p in net.parameters()),
        "state": state_bytes(optimizer),
        **{f"gradients_{mode}": gradient_bytes(optimizer, net, mode) for mode in MODES},
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
