"""Bytes that the forward pass of a decoder leaves for its backward pass, by formula.

Counted from what autograd saves in transformers' `LlamaDecoderLayer` with SDPA or FlashAttention, per token, with
hidden width h, query width a = heads * d, key width k = key heads * d, inner width f, vocabulary V and s bytes an
entry. A tensor that several operations save counts once.

| part | saved | bytes |
|---|---|---|
| RMSNorm, two | input in fp32, 1 / rms, normalised input, output (input of q, k, v; gate, up) | 4h + 4 + 2sh |
| attention | q, k after rotation; v; output (input of o); log-sum-exp of each head, fp32 | s (2a + 2k) + 4 heads |
| MLP | gate, silu(gate), up, their product (input of down) | 4sf |
| **layer** | | **8h + 8 + 4sh + s (2a + 2k) + 4 heads + 4sf** |
| end | final RMSNorm; log-probabilities in fp32, two int64 labels | 4h + 4 + 2sh + 4V + 16 |

For bf16 LLaMA2-7B: 16h + 8h + 8f + 136 = 186,504 a token and layer. Rotary cosines and sines are 2sd a position.
With gradient checkpointing a layer leaves its input alone, sh; in its backward pass one layer's bytes are there too.

Frozen weights (LoRA, DoRA): layers and norms save no input for them. An adapter saves its input and A's output, r. In
a bf16 model each fp32 adapter saves its own copy of the input: in bf16 under autocast, where bf16 copies of its weights
stay too without checkpointing; else in fp32. DoRA saves the layer's output and the adapter's as well.

`tests/unit/test_estimate.py` holds all of it against what `torch.autograd.graph.saved_tensors_hooks` sees.
"""

from dataclasses import dataclass
from typing import Any, Literal

# What trains: all weights, LoRA's adapters, DoRA's.
Trained = Literal["all", "lora", "dora"]
# Types whose layer is the one that is counted here.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "smollm3")


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The sizes that the formula needs."""

    hidden: int
    # Rows of the query weight, and of the key weight.
    query: int
    key: int
    heads: int
    head_dim: int
    inner: int
    vocabulary: int
    layers: int

    @classmethod
    def of(cls, config: Any) -> "DecoderShape":  # Any: transformers' own
        """Return the sizes of a configuration, under the names that transformers maps all its models to.

        Raises:
            AttributeError: if it has no such size.
        """
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        keys = getattr(text, "num_key_value_heads", None) or heads
        inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
        return cls(
            hidden=text.hidden_size,
            query=heads * head_dim,
            key=keys * head_dim,
            heads=heads,
            head_dim=head_dim,
            inner=inner,
            vocabulary=text.vocab_size,
            layers=text.num_hidden_layers,
        )

    @property
    def linear_sizes(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of q, k, v, o, gate, up and down."""
        h, a, k, f = self.hidden, self.query, self.key, self.inner
        return (h, a), (h, k), (h, k), (a, h), (h, f), (h, f), (f, h)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes for one batch, all layers together."""

    # What backward starts with, the end of the model (logits and loss) apart.
    layers: int
    # Final norm and log-probabilities.
    end: int
    # Of these, what the output layer's backward pass still finds.
    norm: int
    # Gradient of the logits in the weights' dtype, a factor of the output layer's gradient.
    logits: int
    # What computing the loss and its gradient takes beside `end`, at its largest.
    loss: int
    # What the backward pass of one layer takes beside what was saved; with checkpointing its recomputed bytes too.
    inside: int

    @property
    def saved(self) -> int:
        """What the forward pass leaves."""
        return self.layers + self.end


def activations(
    shape: DecoderShape,
    *,
    batch: int,
    seq: int,
    itemsize: int,
    checkpointing: bool,
    trained: Trained = "all",
    rank: int = 0,
    autocast: bool = True,
) -> Activations:
    """Return the bytes of activations; see the module's table.

    Args:
        shape: of the model.
        batch: sequences of a micro-batch.
        seq: tokens of a sequence.
        itemsize: bytes of an entry of the weights, 2 or 4.
        checkpointing: each layer's forward pass is repeated in backward.
        trained: what trains.
        rank: of the adapters.
        autocast: adapters of a bf16 model are computed in bf16.
    """
    tokens, s = batch * seq, itemsize
    layer = tokens * layer_bytes(shape, itemsize, trained=trained, rank=rank, autocast=autocast)
    copies = _adapter_copies(shape, itemsize, trained, rank) if autocast else 0
    rotary = 2 * s * shape.head_dim * seq
    # Gradients of gate, up and their product, of the layer's input and its fp32 form in the norm.
    inside = tokens * (3 * s * shape.inner + (4 + s) * shape.hidden)
    norm = 4 * shape.hidden + 4 + (2 * s * shape.hidden if trained == "all" else 0)
    kept = tokens * s * shape.hidden if checkpointing else layer + copies
    return Activations(
        layers=shape.layers * kept + rotary,
        end=tokens * (norm + 4 * shape.vocabulary + 16),
        norm=tokens * norm,
        logits=tokens * s * shape.vocabulary,
        # nll_loss' gradient and log_softmax' gradient, fp32, while the log-probabilities are there.
        loss=8 * tokens * shape.vocabulary,
        inside=inside + (layer + copies if checkpointing else 0),
    )


def layer_bytes(
    shape: DecoderShape, itemsize: int, *, trained: Trained = "all", rank: int = 0, autocast: bool = True
) -> int:
    """Return the bytes that one layer saves for each token."""
    s, h, wide = itemsize, shape.hidden, shape.inner
    attention = s * (2 * shape.query + 2 * shape.key) + 4 * shape.heads
    if trained == "all":
        return 2 * (4 * h + 4 + 2 * s * h) + attention + 4 * s * wide
    sizes, adapter = shape.linear_sizes, s if autocast else 4  # bytes of an entry in an adapter
    # In fp32 the input is shared, as without adapters; else each adapter has its own copy.
    inputs = s * (2 * h + wide) if s == 4 else adapter * sum(inp for inp, _ in sizes)
    outputs = (s + adapter) * sum(out for _, out in sizes) if trained == "dora" else 0
    return 2 * (4 * h + 4) + attention + 3 * s * wide + inputs + outputs + adapter * len(sizes) * rank


def _adapter_copies(shape: DecoderShape, itemsize: int, trained: Trained, rank: int) -> int:
    """Return the bytes of one layer's adapters in bf16, which autocast keeps."""
    if trained == "all" or itemsize == 4:
        return 0
    return 2 * rank * sum(inp + out for inp, out in shape.linear_sizes)
