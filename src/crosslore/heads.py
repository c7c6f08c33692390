"""Where the attention heads are in a model's weights, read from its config."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from crosslore.layout import RowSpan

# Name of the fused query-key-value layer of each `model_type`, and how its rows are arranged.
# "concatenated": all query heads, all key heads, all value heads. "grouped": for each key head its query heads,
# the key head, the value head (with as many key as query heads: q, k, v of head 0, then of head 1, ...).
Arrangement = Literal["concatenated", "grouped"]
FUSED: dict[str, tuple[str, Arrangement]] = {
    "baichuan": ("W_pack", "concatenated"),
    "bloom": ("query_key_value", "grouped"),
    "chatglm": ("query_key_value", "concatenated"),
    "dbrx": ("Wqkv", "concatenated"),
    "falcon": ("query_key_value", "grouped"),
    "gpt2": ("c_attn", "concatenated"),
    "gpt_bigcode": ("c_attn", "concatenated"),
    "gpt_neox": ("query_key_value", "grouped"),
    "gpt_neox_japanese": ("query_key_value", "grouped"),
    "internlm2": ("wqkv", "grouped"),
    "mpt": ("Wqkv", "concatenated"),
    "persimmon": ("query_key_value", "grouped"),
    "phi3": ("qkv_proj", "concatenated"),
    "phi3small": ("query_key_value", "grouped"),
    "qwen": ("c_attn", "concatenated"),
}


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Heads of a decoder's attention."""

    # Query heads h, key and value heads, rows of one head d_k.
    heads: int
    kv_heads: int
    head_dim: int
    # Name and arrangement of the fused layer, if the model has one.
    fused: tuple[str, Arrangement] | None = None

    def heads_in(self, rows: int) -> int | None:
        """Return how many heads a query or key weight of that many rows has; None if it fits neither."""
        if rows == self.heads * self.head_dim:
            return self.heads
        return self.kv_heads if rows == self.kv_heads * self.head_dim else None

    def fused_spans(self, leaf: str, rows: int) -> dict[str, tuple[RowSpan, int]] | None:
        """Return span and head count of q_proj, k_proj and v_proj in a fused weight; None if it is not one.

        Args:
            leaf: last part of the module's name.
            rows: rows of its weight.
        """
        d, h, kv = self.head_dim, self.heads, self.kv_heads
        if self.fused is None or leaf != self.fused[0] or rows != (h + 2 * kv) * d:
            return None
        sizes = (h * d, kv * d, kv * d) if self.fused[1] == "concatenated" else (h // kv * d, d, d)
        counts, starts = (h, kv, kv), (0, sizes[0], sizes[0] + sizes[1])
        return {
            role: (RowSpan(start=start, length=size, stride=sum(sizes)), count)
            for role, start, size, count in zip(("q_proj", "k_proj", "v_proj"), starts, sizes, counts, strict=True)
        }


def attention_shape(model: nn.Module) -> AttentionShape | None:
    """Return the heads that the model's config tells, or None when it does not (any `nn.Module` may come)."""
    config: Any = getattr(model, "config", None)  # Any: configs are untyped
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    heads = _first(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
    hidden = _first(config, "hidden_size", "n_embd", "d_model", "dim")
    head_dim = _first(config, "qk_head_dim", "head_dim", "kv_channels") or (
        hidden // heads if heads and hidden else None
    )
    if not heads or not head_dim:
        return None
    model_type = getattr(config, "model_type", "")
    kv_heads, fused = _kv_heads(config, model_type, heads), FUSED.get(model_type)
    if fused and model_type in ("falcon", "gpt_bigcode"):
        fused = (fused[0], _multi_query_arrangement(config, model_type))
    if heads % kv_heads:
        return None
    return AttentionShape(heads=heads, kv_heads=kv_heads, head_dim=head_dim, fused=fused)


def _kv_heads(config: Any, model_type: str, heads: int) -> int:  # Any: configs are untyped
    """Return the number of key heads; falcon and gpt_bigcode say it through `multi_query`, others by number."""
    if model_type == "falcon":
        if config.new_decoder_architecture:
            return int(config.num_kv_heads)
        return 1 if config.multi_query else heads
    if model_type == "gpt_bigcode":
        return 1 if config.multi_query else heads
    if model_type == "chatglm":
        return int(config.multi_query_group_num) if getattr(config, "multi_query_attention", False) else heads
    nested = _first(getattr(config, "attn_config", None), "kv_n_heads")
    return nested or _first(config, "num_key_value_heads", "num_kv_heads") or heads


def _multi_query_arrangement(config: Any, model_type: str) -> Arrangement:  # Any: configs are untyped
    grouped = getattr(config, "new_decoder_architecture", False) or not config.multi_query
    return "grouped" if grouped else "concatenated"


def _first(config: Any, *names: str) -> int | None:  # Any: configs are untyped
    """Return the first of these attributes that is a positive integer."""
    values = (getattr(config, name, None) for name in names)
    return next((int(v) for v in values if isinstance(v, int) and v > 0), None)
