"""Stepping inside backward: the same method, without the gradients."""

import io
import logging
import math

import pytest
import torch

from crosslore import LowRankOptimizer, attach_layerwise, create_optimizer

from .models import TinyDecoder, loss_of, tiny_decoder, train

OPTIONS = {"lr": 1e-3, "rank": 4, "scale": 2.0, "warmup_steps": 3, "residual_ratio": 0.3, "refresh_every": 4}


def losses_of(model: TinyDecoder, step: int, parts: int) -> list[torch.Tensor]:
    """The losses of the micro-batches of one step."""
    return [loss_of(model, parts * step + part) / parts for part in range(parts)]


def run(optimizer: torch.optim.Optimizer, model: TinyDecoder, steps: range, parts: int) -> None:
    for step in steps:
        optimizer.zero_grad()
        for loss in losses_of(model, step, parts):
            loss.backward()
        optimizer.step()


def weights(model: TinyDecoder) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_gradients_are_freed_inside_backward() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS, layerwise=True)  # its hooks go with it
    loss_of(model).backward()
    assert optimizer.layerwise is not None and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("rule", ["exact", "guarded"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_compact_gradients_equal_accumulated_gradients(parts: int, rule: str) -> None:
    """With one basis for all micro-batches projection is linear. Bases here do not depend on the gradient."""
    options = {**OPTIONS, "projector": "random", "residual_rule": rule, "cross_head_targets": None}
    paths = []
    for layerwise in (True, False):
        model = tiny_decoder().double()
        more = {"layerwise": True, "accumulation_steps": parts} if layerwise else {}
        optimizer = create_optimizer(model, **options, **more)
        run(optimizer, model, range(9), parts)
        paths.append(weights(model))
    for ours, theirs in zip(*paths, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("select", ["moment", "residual"])
def test_accumulation_with_fitted_bases_trains_like_full_gradients(select: str) -> None:
    """A basis that is due is fitted to the first micro-batch: close, not equal."""
    ends = []
    for layerwise in (True, False):
        model = tiny_decoder()
        more = {"layerwise": True, "accumulation_steps": 2} if layerwise else {}
        optimizer = create_optimizer(model, **{**OPTIONS, "lr": 5e-3}, residual_select=select, **more)
        run(optimizer, model, range(30), 2)
        ends.append(loss_of(model).item())
    assert ends[0] < 0.8 * loss_of(tiny_decoder()).item()
    assert math.isclose(*ends, rel_tol=0.2)


def test_no_gradient_sized_tensor_lives_between_micro_batches() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS, layerwise=True, accumulation_steps=3)
    for step in range(4):  # past the warm-up
        run(optimizer, model, range(step, step + 1), 3)
    optimizer.zero_grad()
    loss_of(model).backward()
    assert model.up_proj.weight.grad is None and model.self_attn.q_proj.weight.grad is None
    held = optimizer.layerwise._collected[model.self_attn.q_proj.weight].pendings
    assert all(pending.ctx.grad is None and pending.ctx.kept is not None for pending in held)


def test_a_step_with_fewer_micro_batches_is_finished_by_step() -> None:
    """The last step of an epoch, as transformers.Trainer does it."""
    models = [tiny_decoder() for _ in range(2)]
    first = create_optimizer(models[0], **OPTIONS, layerwise=True, accumulation_steps=4)
    second = create_optimizer(models[1], **OPTIONS, layerwise=True, accumulation_steps=2)
    for model, optimizer in zip(models, (first, second), strict=True):
        run(optimizer, model, range(5), 2)
    assert all(torch.equal(a, b) for a, b in zip(weights(models[0]), weights(models[1]), strict=True))


@pytest.mark.parametrize("stop", [2, 4, 6])
@pytest.mark.parametrize("clip", [None, "weight", "stale-global"])
def test_resuming_is_bitwise(stop: int, clip: str | None) -> None:
    more = {"layerwise": True, "accumulation_steps": 2}
    more |= {"max_grad_norm": 0.5, "clip": clip} if clip else {}
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS, **more)
    run(optimizer, model, range(stop), 2)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = tiny_decoder(seed=1)
    resumed.load_state_dict(model.state_dict())
    fresh = create_optimizer(resumed, **OPTIONS, **more)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for m, o in ((model, optimizer), (resumed, fresh)):
        run(o, m, range(stop, 10), 2)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(resumed), strict=True))


def test_a_scheduler_changes_the_rate_inside_backward() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS, layerwise=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    train(model, optimizer, range(1))
    scheduler.step()
    before = weights(model)
    train(model, optimizer, range(1, 3))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_the_logged_norm_is_that_of_the_whole_gradient() -> None:
    model = tiny_decoder()
    loss_of(model).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    model.zero_grad()
    optimizer = create_optimizer(model, **OPTIONS, layerwise=True)
    loss_of(model).backward()
    assert math.isclose(optimizer.layerwise.grad_norm(), expected, rel_tol=1e-5)
    optimizer.step()
    assert math.isclose(optimizer.layerwise.grad_norm(), expected, rel_tol=1e-5)


def test_clipping_by_weight_limits_each_compact_gradient() -> None:
    """SGD without momentum, so that the step of a weight is its clipped compact gradient, projected back."""
    options = {"lr": 1.0, "rank": 4, "scale": 1.0, "rule": "sgd", "betas": (0.0, 0.0), "residual": None}
    model = tiny_decoder()
    create_optimizer(model, **options, layerwise=True, max_grad_norm=1e-3)
    before = weights(model)
    loss_of(model).backward()
    for old, new in zip(before, weights(model), strict=True):
        assert (new - old).norm() <= 1e-3 * (1 + 1e-4)
    moved = [float((new - old).norm()) for old, new in zip(before, weights(model), strict=True)]
    assert max(moved) > 0.99e-3


def test_stale_global_clipping_scales_all_weights_by_the_last_norm() -> None:
    options = {"lr": 1.0, "rank": 4, "scale": 1.0, "rule": "sgd", "betas": (0.0, 0.0), "residual": None}
    models = [tiny_decoder() for _ in range(2)]
    clipped = create_optimizer(models[0], **options, layerwise=True, max_grad_norm=0.1, clip="stale-global")
    free = create_optimizer(models[1], **options, layerwise=True)
    for model, optimizer in zip(models, (clipped, free), strict=True):
        train(model, optimizer, range(1))  # the first step is not clipped
    assert all(torch.equal(a, b) for a, b in zip(weights(models[0]), weights(models[1]), strict=True))
    norm, before = free.layerwise.grad_norm(), weights(models[0])
    for model, optimizer in zip(models, (clipped, free), strict=True):
        train(model, optimizer, range(1, 2))
    for start, ours, theirs in zip(before, weights(models[0]), weights(models[1]), strict=True):
        # Differences of weights of up to 4: fp32 resolves 2.4e-7 there.
        torch.testing.assert_close(ours - start, (theirs - start) * 0.1 / (norm + 1e-6), rtol=1e-3, atol=5e-7)


def test_a_bad_micro_batch_skips_its_weights_for_that_step() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS, layerwise=True, accumulation_steps=2)
    run(optimizer, model, range(2), 2)
    before, step = model.up_proj.weight.detach().clone(), optimizer.state[model.up_proj.weight]["step"].clone()
    optimizer.zero_grad()
    (loss_of(model) * model.up_proj.weight[0, 0].detach() * torch.tensor(float("nan"))).backward()
    loss_of(model).backward()
    optimizer.step()
    assert torch.equal(model.up_proj.weight, before)
    assert optimizer.nonfinite_skips["up_proj.weight"] == 1
    assert torch.equal(optimizer.state[model.up_proj.weight]["step"], step)
    run(optimizer, model, range(2, 4), 2)
    assert not torch.equal(model.up_proj.weight, before)


def test_gradient_checkpointing_and_tied_weights_are_fine() -> None:
    models = [tiny_decoder() for _ in range(2)]
    optimizers = [create_optimizer(m, **OPTIONS, layerwise=flag) for m, flag in zip(models, (True, False), strict=True)]
    for step in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            tokens = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            x = model.embed_tokens(tokens)
            x = torch.utils.checkpoint.checkpoint(lambda x, m=model: x + m.self_attn(x), x, use_reentrant=step % 2 == 0)
            model.lm_head(model.norm(x + model.down_proj(model.up_proj(x)))).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights(models[0]), weights(models[1]), strict=True))


def test_detaching_goes_back_to_whole_steps() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS)
    handle = attach_layerwise(optimizer)
    train(model, optimizer, range(2))
    handle.detach()
    loss_of(model).backward()
    assert model.up_proj.weight.grad is not None and optimizer.layerwise is None


def test_what_needs_the_sum_of_all_gradients_is_refused() -> None:
    with pytest.raises(
        ValueError, match="accumulation_steps must be 1 for layerwise with residual='norm_scaled', got 2"
    ):
        create_optimizer(tiny_decoder(), "fira", lr=1e-3, rank=4, layerwise=True, accumulation_steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulation_steps": 0}, "accumulation_steps must be an integer >= 1, got 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be a number > 0, got -1"),
        ({"clip": "global"}, "unknown clip 'global'.*stale-global"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_optimizer(tiny_decoder(), **OPTIONS, layerwise=True, **options)


def test_options_of_layerwise_without_it_are_refused() -> None:
    with pytest.raises(ValueError, match="are for layerwise=True"):
        create_optimizer(tiny_decoder(), **OPTIONS, accumulation_steps=2)


def test_attaching_twice_is_refused() -> None:
    optimizer = create_optimizer(tiny_decoder(), **OPTIONS, layerwise=True)
    with pytest.raises(ValueError, match="layerwise already"):
        attach_layerwise(optimizer)


@pytest.mark.parametrize("rule", ["exact", "guarded", "paper"])
def test_accumulation_without_warm_up_starts_the_residual_at_the_second_step(rule: str) -> None:
    """Positions are chosen in the first step; its micro-batches are gone by then."""
    options = {**OPTIONS, "warmup_steps": 0, "residual_rule": rule, "projector": "random", "cross_head_targets": None}
    models = [tiny_decoder() for _ in range(2)]
    with_residual = create_optimizer(models[0], **options, layerwise=True, accumulation_steps=2)
    without = create_optimizer(models[1], **{**options, "residual_ratio": 0.0}, layerwise=True, accumulation_steps=2)
    for model, optimizer in zip(models, (with_residual, without), strict=True):
        run(optimizer, model, range(1), 2)
    assert all(torch.equal(a, b) for a, b in zip(weights(models[0]), weights(models[1]), strict=True))
    for model, optimizer in zip(models, (with_residual, without), strict=True):
        run(optimizer, model, range(1, 2), 2)
    assert not torch.equal(models[0].self_attn.q_proj.weight, models[1].self_attn.q_proj.weight)


def test_a_second_layerwise_optimizer_of_the_same_weights_is_refused() -> None:
    model = tiny_decoder()
    first = create_optimizer(model, **OPTIONS, layerwise=True)
    with pytest.raises(ValueError, match="steps inside backward for another optimizer already"):
        create_optimizer(model, **OPTIONS, layerwise=True)
    first.layerwise.detach()
    create_optimizer(model, **OPTIONS, layerwise=True)


def test_an_optimizer_that_nobody_holds_is_in_nobodys_way() -> None:
    model = tiny_decoder()
    for _ in range(2):
        optimizer = create_optimizer(model, **OPTIONS, layerwise=True)
        optimizer.state_dict()
        del optimizer


def test_loss_scaling_is_refused_by_name() -> None:
    layer = torch.nn.Linear(16, 16)
    optimizer = create_optimizer(layer, "galore", lr=1e-3, rank=4, layerwise=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(layer(torch.ones(2, 16)).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler is not for gradients='layerwise'"):
        scaler.step(optimizer)


def test_frozen_weights_have_no_hook_and_later_groups_have() -> None:
    frozen, later = torch.nn.Parameter(torch.ones(3), requires_grad=False), torch.nn.Parameter(torch.ones(3))
    optimizer = LowRankOptimizer([{"params": [frozen]}], lr=0.1)
    attach_layerwise(optimizer)
    optimizer.add_param_group({"params": [later]})
    later.sum().backward()
    assert later.grad is None and later.detach().max() < 1


def test_zero_grad_drops_what_was_collected() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS, layerwise=True, accumulation_steps=2)
    before = weights(model)
    loss_of(model).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_compiling_layerwise_is_refused() -> None:
    with pytest.raises(ValueError, match="compile must not be True for layerwise=True"):
        create_optimizer(tiny_decoder(), **OPTIONS, layerwise=True, compile=True)


def test_more_backward_passes_than_announced_are_pointed_out_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS, layerwise=True)
    with caplog.at_level(logging.WARNING, logger="crosslore"):
        train(model, optimizer, range(3))
        assert not caplog.text
        for _ in range(2):
            loss_of(model).backward()
            loss_of(model).backward()
            optimizer.step()
    assert caplog.text.count("Set accumulation_steps to the backward passes of a step") == 1


def test_layerwise_takes_our_optimizer_only() -> None:
    with pytest.raises(TypeError, match="takes a LowRankOptimizer, got SGD"):
        attach_layerwise(torch.optim.SGD(tiny_decoder().parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"clip": "foo"}, "unknown clip 'foo'"), ({"layerwise": "yes"}, "layerwise must be True or")],
)
def test_switches_are_checked_without_layerwise_too(options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        create_optimizer(tiny_decoder(), **OPTIONS, **options)


def test_a_lost_micro_batch_does_not_refresh_twice() -> None:
    """The step is begun again: basis and moments are those of the first attempt, and the sketch is not missed."""
    from crosslore import fitting

    for more in (
        {"projector": "gaussian", "moments": "rotate_first"},
        {"projector": "power", "moments": "rotate", "fit_window": 2},
    ):
        torch.manual_seed(0)
        layer = torch.nn.Linear(24, 32, bias=False)
        options = {**more, "refresh_every": 4, "refresh_stagger": False, "rank": 4, "lr": 1e-3}
        optimizer = create_optimizer(layer, "galore", **options, layerwise=True, accumulation_steps=2)

        def backward(seed: int, factor: float = 1.0, layer: torch.nn.Linear = layer) -> None:
            x = torch.randn(8, 24, generator=torch.Generator().manual_seed(seed))
            (layer(x).square().mean() * factor).backward()

        for step in range(4):
            backward(2 * step)
            backward(2 * step + 1)
            optimizer.step()
        fitting.fallbacks.clear()
        attempts = []
        for _ in range(3):
            backward(100)
            backward(101, math.nan)
            optimizer.step()
            attempts.append({k: v.clone() for k, v in optimizer.state[layer.weight].items()})
        for again in attempts[1:]:
            assert all(torch.equal(value, again[key]) for key, value in attempts[0].items())
        assert not fitting.fallbacks and optimizer.state[layer.weight]["step"] == 4
        backward(100)
        backward(102)
        assert optimizer.state[layer.weight]["step"] == 5


def test_the_norm_that_stale_global_clips_by_has_its_place_from_the_start() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS, layerwise=True, max_grad_norm=0.1, clip="stale-global")
    assert optimizer.state_dict()["param_groups"][0]["last_grad_norm"] == 0.0
    train(model, optimizer, range(2))
    # A distributed checkpoint is loaded into the keys of a fresh optimizer.
    saved = optimizer.state_dict()["param_groups"][0]["last_grad_norm"]
    assert saved > 0


def test_large_finite_gradients_step_as_in_a_whole_step() -> None:
    """The squares of 1e20 are not fp32 numbers."""
    ends = []
    for layerwise in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 8, bias=False)
        optimizer = create_optimizer(layer, "galore", lr=1e-3, rank=4, layerwise=layerwise)
        (layer(torch.eye(8)).sum() * 1e20).backward()
        optimizer.step()
        assert not optimizer.nonfinite_skips
        ends.append(layer.weight.detach().clone())
    assert torch.equal(*ends)


def test_a_second_optimizer_of_a_layerwise_model_is_refused() -> None:
    """Its steps would find no gradients: the first one's hooks have taken them."""
    model = tiny_decoder()
    first = create_optimizer(model, **OPTIONS, layerwise=True)
    with pytest.raises(ValueError, match=r"steps inside backward for another optimizer already.*detach\(\)"):
        create_optimizer(model, **OPTIONS)
    first.layerwise.detach()
    create_optimizer(model, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layerwise": True, "foreach": True}, "foreach must not be True for layerwise=True"),
        ({"clip": "stale-global"}, "clip='stale-global' needs a max_grad_norm, got None"),
        ({"layerwise": True, "clip": "stale-global"}, "clip='stale-global' needs a max_grad_norm, got None"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_optimizer(tiny_decoder(), **OPTIONS, **options)
