"""Head layouts of the decoder families, checked on transformers' own tiny models."""

import logging

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra llamafactory)")

from crosslore import create_optimizer  # noqa: E402
from crosslore.layout import Block, RowSpan  # noqa: E402

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 40}
GQA = {**SMALL, "num_key_value_heads": 2}
SEPARATE = ["LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config", "GemmaConfig", "Gemma2Config", "CohereConfig",
            "GlmConfig", "Olmo2Config", "PhiConfig", "StableLmConfig", "Starcoder2Config", "GraniteConfig"]  # fmt: skip


def blocks_of(model: torch.nn.Module, **options: object) -> dict[str, list[Block]]:
    optimizer = create_optimizer(model, lr=1e-3, rank=4, warmup_steps=0, residual_ratio=0.1, **options)
    model(input_ids=torch.arange(12).reshape(2, 6), labels=torch.arange(12).reshape(2, 6)).loss.backward()
    optimizer.step()
    names = [n for group in optimizer.param_groups for n in group["param_names"]]
    plans = [[Block.from_plain(b) for b in plan] for group in optimizer.param_groups for plan in group["blocks"]]
    return dict(zip(names, plans, strict=True))


def tiny(config_name: str, **options: object) -> torch.nn.Module:
    config = getattr(transformers, config_name)(**{"pad_token_id": 0, **options})
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("config_name", SEPARATE)
def test_separate_query_and_key_are_found(config_name: str) -> None:
    blocks = blocks_of(tiny(config_name, **GQA))
    plans = {name.rsplit(".", 2)[-2]: plan for name, plan in blocks.items() if "_proj.weight" in name}
    (q,), (k,) = plans["q_proj"], plans["k_proj"]
    assert q.cross_head and k.cross_head and q.residual and k.residual
    assert (q.layout.heads, k.layout.heads) == (4, 2)
    assert q.layout.head_width == k.layout.head_width


FUSED = {
    "Phi3Config": (GQA, "qkv_proj", (4, 2)),
    "GPTNeoXConfig": (SMALL, "query_key_value", (4, 4)),
    "BloomConfig": ({"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 40}, "query_key_value", (4, 4)),
    "FalconConfig": ({**SMALL, "num_kv_heads": 2, "new_decoder_architecture": True}, "query_key_value", (4, 2)),
    "MptConfig": ({"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 40}, "Wqkv", (4, 4)),
    "DbrxConfig": ({"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 40, "max_seq_len": 16,
                    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
                    "ffn_config": {"ffn_hidden_size": 32}},
                   "Wqkv", (4, 2)),
    "GPTBigCodeConfig": ({"n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 40}, "c_attn", (4, 1)),
}  # fmt: skip


@pytest.mark.parametrize("config_name", FUSED)
def test_fused_weights_are_row_ranges_with_their_own_layouts(config_name: str) -> None:
    options, layer, (heads, kv_heads) = FUSED[config_name]
    blocks = blocks_of(tiny(config_name, **options))
    q, k, v = next(plan for name, plan in blocks.items() if name.endswith(f"{layer}.weight"))
    assert (q.key, k.key, v.key) == ("q_proj.", "k_proj.", "v_proj.")
    assert (q.layout.heads, k.layout.heads, v.layout.heads) == (heads, kv_heads, 1)
    assert (q.cross_head, k.cross_head, v.cross_head) == (q.residual, k.residual, v.residual) == (True, True, False)
    assert q.layout.rows == heads * 8 and k.layout.rows == v.layout.rows == kv_heads * 8


@pytest.mark.parametrize("stride", [12, 48], ids=["interleaved", "concatenated"])
def test_spans_take_and_put_back_their_rows_and_no_others(stride: int) -> None:
    span, weight = RowSpan(start=4, length=4, stride=stride), torch.arange(96.0).reshape(48, 2)
    expected = weight.clone()
    rows = [r for r in range(48) if 4 <= r % stride < 8]
    expected[rows] *= -1
    block = span.take(weight)
    assert block.shape == (len(rows), 2)
    block.mul_(-1)
    span.put_(weight, block)
    assert torch.equal(weight, expected)


def test_a_fused_weight_trains_as_separate_ones_would() -> None:
    """Same heads drawn (the names agree), so the parts of a fused weight move as three separate weights."""
    torch.manual_seed(0)
    fused = tiny("Phi3Config", **GQA)
    separate = tiny("LlamaConfig", **GQA)
    start = separate.state_dict()
    layer = "model.layers.0.self_attn."
    qkv = torch.cat([start[f"{layer}{name}_proj.weight"] for name in "qkv"])
    fused.state_dict()[f"{layer}qkv_proj.weight"].copy_(qkv)
    options = {"lr": 1e-2, "rank": 4, "warmup_steps": 1, "residual_ratio": 0.1, "projector": "svd"}
    optimizers = [create_optimizer(m, **options) for m in (fused, separate)]
    grads = [torch.randn(64, 32, generator=torch.Generator().manual_seed(t)) for t in range(3)]
    for grad in grads:
        fused.model.layers[0].self_attn.qkv_proj.weight.grad = grad
        attention = separate.model.layers[0].self_attn
        for layer_, part in zip(
            (attention.q_proj, attention.k_proj, attention.v_proj), grad.split([32, 16, 16]), strict=True
        ):
            layer_.weight.grad = part.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    parts = torch.cat([separate.state_dict()[f"{layer}{name}_proj.weight"] for name in "qkv"])
    result = fused.state_dict()[f"{layer}qkv_proj.weight"]
    assert not torch.allclose(result, qkv)
    torch.testing.assert_close(result, parts)


def test_an_unknown_layout_trains_without_sharing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("GPTNeoXConfig", **SMALL)
    model.config.model_type = "something_new"
    with caplog.at_level(logging.WARNING, logger="crosslore"):
        blocks = blocks_of(model)
    assert not any(block.cross_head for plan in blocks.values() for block in plan)
    assert caplog.text.count("without cross-head sharing") == 1
