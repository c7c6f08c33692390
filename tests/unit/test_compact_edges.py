"""What is unusual around compact and deferred layers: hooks, copies, tracers, freezing, rounding, strong decay."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from crosslore import create_optimizer
from crosslore.compact.deferred import deferred_of
from crosslore.compact.linear import CompactLinear

from .test_compact import llama, loss_of, options_of, train
from .test_deferred import assert_same, start

transformers = pytest.importorskip("transformers", reason="needs transformers")


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))


def pending_model() -> tuple[nn.Sequential, Any]:
    """A small model with updates pending."""
    model = two_layers()
    options: dict[str, Any] = {"lr": 1e-2, "rank": 4, "scale": 1.0, "refresh_every": 100}
    optimizer = create_optimizer(model, "crosslore_plus", **options, gradients="compact", weights="deferred")
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 16, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    assert deferred_of(model[0].weight).is_pending
    return model, optimizer


# Layers that stay ordinary


@pytest.mark.parametrize("kind", ["tensor", "accumulated"])
def test_a_hook_on_a_gradient_keeps_it_whole(kind: str) -> None:
    model = two_layers()
    weight, seen = model[0].weight, []
    if kind == "tensor":
        weight.register_hook(lambda grad: seen.append(grad.shape))
    else:
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    optimizer = create_optimizer(model, "crosslore_plus", lr=1e-3, rank=4, gradients="compact")
    assert type(model[0]) is nn.Linear and isinstance(model[2], CompactLinear)
    assert "1 x a layer with a hook on its weight's gradient" in optimizer.compact.summary
    model(torch.randn(3, 16)).sum().backward()
    assert seen == [weight.shape]


def test_a_layer_whose_forward_was_replaced_keeps_its_whole_gradient() -> None:
    model = two_layers()
    original = model[0].forward
    model[0].forward = lambda x: 2 * original(x)
    optimizer = create_optimizer(model, "crosslore_plus", lr=1e-3, rank=4, gradients="compact")
    assert type(model[0]) is nn.Linear
    assert "1 x a layer whose forward was replaced" in optimizer.compact.summary


# Reading weights with something pending


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_a_copied_optimizer_does_not_take_the_weights_without_what_is_pending(
    copied: Any, optimizer_first: bool
) -> None:
    model, optimizer = start("crosslore")
    direct, other = start("crosslore", weights="direct")
    train(optimizer, model, range(4))
    train(other, direct, range(4))
    both = copied((optimizer, model) if optimizer_first else (model, optimizer))
    twin = both[1] if optimizer_first else both[0]
    assert_same(twin, direct)
    assert_same(model, direct)


def test_evaluation_sees_merged_weights() -> None:
    """In evaluation torch's encoder layer reads the weights of its layers without calling them."""
    outputs = []
    for weights in ("direct", "deferred"):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        options: dict[str, Any] = {"lr": 1e-2, "rank": 4, "scale": 1.0, "cross_head_targets": None}
        optimizer = create_optimizer(model, "crosslore_plus", **options, gradients="compact", weights=weights)
        x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_loaded_leaves_what_is_pending() -> None:
    model, _ = pending_model()
    twin, _ = pending_model()
    with pytest.raises(RuntimeError, match="size mismatch for 0.weight"):
        model.load_state_dict({"0.weight": torch.zeros(3, 3)}, strict=False)
    assert_same(model, twin, 1e-6)


TRACERS: dict[str, Any] = {
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
}


@pytest.mark.parametrize("tracer", TRACERS)
def test_an_exported_model_does_not_lack_what_is_pending(tracer: str) -> None:
    model, optimizer = pending_model()
    x = torch.randn(3, 16)
    with pytest.raises(RuntimeError, match="deferred updates pending"):
        TRACERS[tracer](model, x)
    expected = model(x)
    optimizer.merge()
    torch.testing.assert_close(TRACERS[tracer](model, x)(x), expected, rtol=1e-5, atol=1e-6)
    model.eval()
    torch.testing.assert_close(TRACERS[tracer](copy.deepcopy(model), x)(x), expected, rtol=1e-5, atol=1e-6)


# Freezing


@pytest.mark.parametrize("weights", ["direct", "deferred"])
def test_a_weight_that_is_frozen_before_backward_gets_no_gradient(weights: Any) -> None:
    model, optimizer = start(weights=weights)
    train(optimizer, model, range(3))
    weight, other = model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.down_proj.weight
    optimizer.zero_grad()
    loss = loss_of(model, 3)
    weight.requires_grad_(False)
    loss.backward()
    optimizer.step()
    assert (float(optimizer.state[weight]["step"]), float(optimizer.state[other]["step"])) == (3, 4)
    weight.requires_grad_(True)
    train(optimizer, model, range(4, 5))
    assert (float(optimizer.state[weight]["step"]), float(optimizer.state[other]["step"])) == (4, 5)


@pytest.mark.parametrize("weights", ["direct", "deferred"])
def test_freezing_in_turn_trains_like_whole_gradients(weights: Any) -> None:
    models = []
    for mode in ({"gradients": "full", "weights": "direct"}, {"weights": weights}):
        model, optimizer = start("crosslore", weight_decay=0.1, **mode)
        for step in range(16):
            model.model.layers[0].mlp.up_proj.weight.requires_grad_(step % 4 != 1)
            train(optimizer, model, range(step, step + 1))
        models.append(model)
    assert_same(*models)


# Numbers


@pytest.mark.parametrize("order", ["before", "after"])
def test_options_that_change_within_an_interval_act_at_once(order: str) -> None:
    models = []
    for mode in ({"gradients": "full", "weights": "direct"}, {"weights": "direct"}, {"weights": "deferred"}):
        model, optimizer = start("crosslore", decay_order=order, **mode)
        for step in range(24):
            for group in optimizer.param_groups:
                group |= {"lr": 1e-3 * (1 + step % 5), "weight_decay": 0.1 * (step % 3), "scale": 1 + 0.1 * (step % 2)}
            train(optimizer, model, range(step, step + 1))
        models.append(model)
    assert_same(models[1], models[0])
    assert_same(models[2], models[0])


@pytest.mark.parametrize("decay", [1.0, 0.97])
def test_a_decay_that_leaves_nothing_of_the_weight_is_exact(decay: float) -> None:
    """lr * weight_decay = 1: the old weight is gone at once, and nothing can be divided by what is left of it."""
    models = []
    for weights in ("direct", "deferred"):
        model, optimizer = start("crosslore", lr=1e-3, weight_decay=decay * 1e3, refresh_every=50, weights=weights)
        train(optimizer, model, range(12))
        models.append(model)
    assert_same(*models)


def test_the_residual_of_a_deferred_bf16_weight_is_rounded_at_random() -> None:
    """Rounded to the nearest, steps far below bf16's spacing would be lost at the kept positions."""
    model = llama(dtype=torch.bfloat16)
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight.copy_(weight.sign() * 0.26)  # the nearest other values are 0.002 away
    options = {**options_of("crosslore")[1], "lr": 1e-4, "refresh_every": 500, "warmup_steps": 0, "rank": 2}
    options |= {"residual_ratio": 0.5, "stochastic_rounding": True, "gradients": "compact", "weights": "deferred"}
    optimizer = create_optimizer(model, "crosslore", **options)
    train(optimizer, model, range(1))
    optimizer.merge()
    kept, before = optimizer.state[weight]["res_index"].long(), weight.detach().clone()
    train(optimizer, model, range(1, 20))
    changed = (weight.detach() != before).reshape(-1)  # only the residual changes the weight before a merge
    assert float(changed[kept].float().mean()) > 0.2
    changed[kept] = False
    assert not bool(changed.any())


# After another optimizer, and after an error


@pytest.mark.parametrize("mode", ["full", "layerwise", "compact"])
def test_what_a_deleted_optimizer_has_pending_is_merged_before_the_next_one(mode: str) -> None:
    ends = []
    for detach in (True, False):
        model, optimizer = pending_model()
        if detach:
            optimizer.compact.detach()
        del optimizer
        after = create_optimizer(model, "crosslore_plus", lr=1e-2, rank=4, weight_decay=5.0, gradients=mode)
        assert deferred_of(model[0].weight) is None
        for step in range(3):
            after.zero_grad()
            model(torch.randn(8, 16, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            after.step()
        ends.append(model)
    assert_same(*ends)


@pytest.mark.parametrize("mode", ["layerwise", "compact-layerwise", "compact"])
def test_after_a_refused_loss_scale_plain_steps_are_plain(mode: str) -> None:
    model = two_layers()
    optimizer = create_optimizer(model, "galore", lr=1e-3, rank=4, gradients=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.ones(2, 16)).sum()).backward()
    if mode == "compact":
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    optimizer.zero_grad()
    before = model[0].weight.detach().clone()
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
