"""From a model to groups: targets, heads, what is at full rank, and every error with its text."""

import logging

import pytest
import torch
from torch import nn

from crosslore import LowRankConfig, create_optimizer
from crosslore.layout import Block

from .models import tiny_decoder, train


def blocks_of(optimizer: torch.optim.Optimizer) -> dict[str, list[Block]]:
    return {
        name: [Block.from_plain(b) for b in plain]
        for group in optimizer.param_groups
        for name, plain in zip(group["param_names"], group["blocks"], strict=True)
    }


def test_every_trainable_weight_is_in_exactly_one_group() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, lr=1e-3, rank=4)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert len(grouped) == len({id(p) for p in grouped})


def test_query_and_key_share_a_basis_across_heads_and_have_a_residual() -> None:
    blocks = blocks_of(create_optimizer(tiny_decoder(), lr=1e-3, rank=4))
    (q,), (k,), (v,) = (blocks[f"self_attn.{name}_proj.weight"] for name in "qkv")
    assert (q.layout.heads, q.layout.side, q.cross_head, q.residual) == (4, "right", True, True)
    assert (k.layout.heads, k.layout.side, k.cross_head, k.residual) == (2, "right", True, True)
    assert (v.layout.heads, v.layout.side, v.cross_head, v.residual) == (1, "left", False, False)
    assert blocks["embed_tokens.weight"] == [] == blocks["norm.weight"]


def test_norms_and_biases_are_not_decayed() -> None:
    optimizer = create_optimizer(tiny_decoder(), lr=1e-3, rank=4, weight_decay=0.1)
    decay = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
    assert {name for name, value in decay.items() if value == 0} == {
        "self_attn.v_proj.bias", "up_proj.bias", "down_proj.bias", "norm.weight", "norm.bias",
    }  # fmt: skip


def test_an_untied_output_layer_is_no_target_of_all_linear() -> None:
    blocks = blocks_of(create_optimizer(tiny_decoder(tied=False), lr=1e-3, rank=4))
    assert blocks["lm_head.weight"] == []


def test_targets_match_whole_parts_of_names() -> None:
    blocks = blocks_of(create_optimizer(tiny_decoder(), lr=1e-3, rank=4, targets=["proj", "self_attn.v_proj"][1:]))
    assert [name for name, plan in blocks.items() if plan] == ["self_attn.v_proj.weight"]
    with pytest.raises(ValueError, match="targets names 'proj'"):
        create_optimizer(tiny_decoder(), lr=1e-3, rank=4, targets=["proj"])


def test_a_compiled_model_draws_the_same_heads() -> None:
    """torch.compile puts a word in front of the names, which are part of the seed."""
    plain, compiled = tiny_decoder(), torch.compile(tiny_decoder(), backend="eager")
    losses = [train(m, create_optimizer(m, lr=1e-3, rank=4), range(4)) for m in (plain, compiled)]
    assert losses[0] == losses[1]


def test_targets_without_query_and_key_need_no_note_about_heads(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="crosslore"):
        create_optimizer(tiny_decoder(), lr=1e-3, rank=4, targets=["v_proj"])
    assert "heads" not in caplog.text


def test_a_plain_module_without_a_config_trains_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    with caplog.at_level(logging.WARNING, logger="crosslore"):
        optimizer = create_optimizer(model, lr=1e-3, rank=2)
        for _ in range(3):
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
    text = [r.getMessage() for r in caplog.records]
    assert sum("without cross-head sharing" in t for t in text) == 1 and len(text) == 2


@pytest.mark.parametrize("embeddings", ["full", "lowrank", "frozen"])
def test_embeddings_train_in_full_in_low_rank_or_not_at_all(embeddings: str) -> None:
    model = tiny_decoder(tied=False)
    optimizer = create_optimizer(model, lr=1e-2, rank=4, embeddings=embeddings)
    before = model.embed_tokens.weight.detach().clone()
    train(model, optimizer, range(2))
    assert torch.equal(model.embed_tokens.weight, before) == (embeddings == "frozen")
    if embeddings == "lowrank":
        assert optimizer.state[model.lm_head.weight]["exp_avg"].numel() < model.lm_head.weight.numel()


ERRORS = [
    ({"rnak": 4}, TypeError, "unknown option 'rnak'. Did you mean 'rank'"),
    ({"alpha": 32}, TypeError, "The paper's alpha is `scale` here"),
    ({"rank": 0}, ValueError, "rank must be an integer >= 1, got 0"),
    ({"rank": "32"}, TypeError, r"rank must be an integer >= 1, got '32' \(str\)"),
    ({"rank": True}, TypeError, "rank must be an integer"),
    ({"rank": 17}, ValueError, r"self_attn.k_proj: rank must be in \[1, 16\] for a 16 x 32 matrix, got 17. Lower"),
    ({"residual_ratio": 1.2}, ValueError, "residual_ratio must be a number >= 0 and <= 1, got 1.2"),
    ({"residual_ratio": -0.1}, ValueError, "residual_ratio must be"),
    ({"residual_ratio": float("nan")}, ValueError, "residual_ratio must be"),
    ({"warmup_steps": -1}, ValueError, "warmup_steps must be an integer >= 0, got -1"),
    ({"scale": 0}, ValueError, "scale must be a number > 0, got 0"),
    ({"refresh_every": 0}, ValueError, "refresh_every must be an integer >= 1"),
    ({"projector": "randomised"}, ValueError, "unknown projector 'randomised'. Did you mean 'randomized'"),
    ({"projector": "cross_head"}, ValueError, "cross_head_targets"),
    ({"residual_rule": "exakt"}, ValueError, "unknown residual_rule 'exakt'. Did you mean 'exact'"),
    ({"rule": "adam"}, ValueError, "unknown rule 'adam'. Did you mean 'adamw'"),
    ({"targets": ["q_porj"]}, ValueError, "targets names 'q_porj'.*down_proj, k_proj, lm_head, o_proj, q_proj"),
    ({"targets": []}, TypeError, "targets must be 'all-linear' or a list of module names"),
    ({"cross_head_targets": ["query"]}, ValueError, "cross_head_targets names 'query', which is no linear layer"),
    ({"residual_targets": ["query"]}, ValueError, "residual_targets names 'query'"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be a number >= 0 and < 1, got 1.0"),
    ({"betas": 0.9}, TypeError, "betas must be two numbers"),
    ({"eps": -1e-8}, ValueError, "eps must be"),
    ({"weight_decay": -1}, ValueError, "weight_decay must be"),
    ({"lr": -1e-3}, ValueError, "lr must be a number >= 0"),
    ({"embeddings": "none"}, ValueError, "unknown embeddings 'none'"),
]


@pytest.mark.parametrize(
    ("options", "kind", "text"), ERRORS, ids=[f"{k}={v}" for o, _, _ in ERRORS for k, v in o.items()]
)
def test_wrong_options_are_refused_before_the_model_changes(options: dict, kind: type, text: str) -> None:
    model = tiny_decoder()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(kind, match=text):
        create_optimizer(model, **{"lr": 1e-3, "rank": 4, **options})
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, model.parameters(), strict=True))


def test_unknown_presets_list_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="unknown preset 'crosslor'. Did you mean 'crosslore'.*Known: .*crosslore.*galore"
    ):
        create_optimizer(tiny_decoder(), "crosslor", lr=1e-3)


def test_parameters_instead_of_the_model_are_refused() -> None:
    with pytest.raises(TypeError, match="takes the model itself, got generator"):
        create_optimizer(tiny_decoder().parameters(), lr=1e-3)


def test_a_residual_ratio_switches_the_residual_on() -> None:
    optimizer = create_optimizer(tiny_decoder(), "galore", lr=1e-3, rank=4, residual_ratio=0.1)
    assert all(b.residual for plan in blocks_of(optimizer).values() for b in plan)


def test_a_frozen_model_and_frozen_targets_are_refused() -> None:
    model = tiny_decoder()
    model.up_proj.requires_grad_(False)
    with pytest.raises(ValueError, match="all of them are frozen"):
        create_optimizer(model, lr=1e-3, rank=4, targets=["up_proj"])


def test_quantised_models_are_refused() -> None:
    model = tiny_decoder()
    model.quantization_method = "bitsandbytes"
    with pytest.raises(ValueError, match="quantised.*LoRA"):
        create_optimizer(model, lr=1e-3, rank=4)


def test_routers_and_heads_stay_at_full_rank() -> None:
    """Routers are narrower than most ranks: they must not make "all-linear" fail."""
    narrow = {"gate": nn.Linear(16, 2), "score": nn.Linear(16, 1), "shared_expert_gate": nn.Linear(16, 1)}
    model = nn.ModuleDict({**narrow, "fc": nn.Linear(16, 16)})
    blocks = blocks_of(create_optimizer(model, lr=1e-3, rank=8))
    assert [name for name, plan in blocks.items() if plan] == ["fc.weight"]


def test_configurations_are_frozen_and_comparable() -> None:
    assert LowRankConfig(rank=8) == LowRankConfig(rank=8)
    with pytest.raises(AttributeError):
        LowRankConfig().rank = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("targets", "message"),
    [(("q_prj",), "Did you mean q_proj"), ("all", "In Python give a list"), ("q_proj,k_proj", "In Python give a list")],
)
def test_a_wrong_target_says_what_to_write(targets: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_optimizer(tiny_decoder(), lr=1e-3, rank=4, targets=targets)


def test_a_model_in_place_of_groups_is_named() -> None:
    from crosslore import LowRankOptimizer

    with pytest.raises(TypeError, match=r"got the model TinyDecoder\. Use create_optimizer"):
        LowRankOptimizer(tiny_decoder())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_wise": True}, "Did you mean 'layerwise'"),
        ({"accumulation_step": 2}, "Did you mean 'accumulation_steps'"),
        ({"learning_rate": 1e-3}, "It is `lr` here"),
    ],
)
def test_a_wrong_name_is_near_the_switches_too(options: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        create_optimizer(tiny_decoder(), lr=1e-3, rank=4, **options)


def test_a_sparse_residual_without_a_share_is_refused() -> None:
    with pytest.raises(ValueError, match="residual='sparse' keeps a share of the positions, got residual_ratio=0"):
        create_optimizer(tiny_decoder(), "galore", lr=1e-3, rank=4, residual="sparse")


def test_known_names_are_those_that_can_be_given() -> None:
    with pytest.raises(ValueError, match="Known: (?!.*cross_head)"):
        create_optimizer(tiny_decoder(), lr=1e-3, rank=4, projector="svdd")
    with pytest.raises(ValueError, match="None switches it off"):
        create_optimizer(tiny_decoder(), lr=1e-3, rank=4, residual="none")
