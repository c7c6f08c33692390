"""Low precision: stochastic rounding, dtypes of bases and moments."""

import threading
from typing import Any

import pytest
import torch
from torch import nn

from crosslore import LowRankOptimizer, create_optimizer
from crosslore.config import Hyper
from crosslore.kernels.rounding import stochastic_round
from crosslore.rules.adamw import AdamW
from crosslore.stepping import full_precision

from .models import tiny_decoder, train

OPTIONS = {"lr": 1e-3, "rank": 4, "scale": 2.0, "warmup_steps": 2, "residual_ratio": 0.1, "refresh_every": 4}


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rounding_keeps_the_mean_and_goes_to_a_neighbour() -> None:
    values = torch.tensor([1.0 + 2**-10, -3.3, 1e-20, 7e10, 0.0]).repeat_interleave(200_000)
    rounded = stochastic_round(values, torch.bfloat16, generator=draws()).float()
    spacing = 2.0 ** (values.abs().clamp(min=1e-38).log2().floor() - 7)
    assert ((rounded - values).abs() < spacing).all()
    means, truth = rounded.view(5, -1).double().mean(1), values.view(5, -1)[:, 0].double()
    torch.testing.assert_close(means, truth, rtol=2e-4, atol=0)
    assert rounded.view(5, -1)[0].unique().numel() == 2


def test_what_bf16_holds_exactly_and_what_is_not_finite_stays() -> None:
    values = torch.tensor([1.0, -0.5, 0.0, float("inf"), -float("inf"), float("nan")])
    rounded = stochastic_round(values, torch.bfloat16, generator=draws()).float()
    torch.testing.assert_close(rounded, values, rtol=0, atol=0, equal_nan=True)


def test_small_steps_move_bf16_weights_on_average() -> None:
    """Steps of a hundredth of bf16's spacing: to the nearest nothing moves, at random the mean does."""
    moved = []
    for rounding in (False, True):
        weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        group = {"params": [weight], "rank": 4, "rule": "sgd", "stochastic_rounding": rounding, "scale": 1.0}
        optimizer = LowRankOptimizer([group], lr=1.0, betas=(0.0, 0.0))
        for _ in range(100):
            weight.grad = torch.full_like(weight, 2.0**-14)
            optimizer.step()
        moved.append(float(weight.detach().double().mean()) - 1)
    assert moved[0] == 0
    assert moved[1] == pytest.approx(-100 * 2.0**-14, rel=0.1)


@pytest.mark.parametrize("embeddings", ["full", "lowrank"])
def test_rounding_draws_from_the_seed_the_name_and_the_step_only(embeddings: str) -> None:
    ends = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 5)):
        model = tiny_decoder().bfloat16()
        optimizer = create_optimizer(model, **OPTIONS, stochastic_rounding=True, seed=seed, embeddings=embeddings)
        torch.manual_seed(global_seed)
        train(model, optimizer, range(5))
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ends[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ends[0], ends[2], strict=True))


def test_rounding_concerns_bf16_weights_only() -> None:
    ends = []
    for rounding in (False, True):
        model = tiny_decoder()
        train(model, create_optimizer(model, **OPTIONS, stochastic_rounding=rounding), range(5))
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(("asked", "found"), [("weight", torch.bfloat16), ("float32", torch.float32)])
def test_the_basis_has_the_weights_dtype_unless_set(asked: str, found: torch.dtype) -> None:
    model = tiny_decoder().bfloat16()
    optimizer = create_optimizer(model, **OPTIONS, basis_dtype=asked)
    train(model, optimizer, range(6))
    state = optimizer.state[model.self_attn.q_proj.weight]
    assert state["basis"].dtype == found
    assert state["exp_avg"].dtype == state["res_avg"].dtype == torch.float32


def test_bf16_training_follows_fp32_for_a_few_steps() -> None:
    """Five steps of the same method; the tolerance is bf16's 2^-8 on weights of up to 4."""
    models = [tiny_decoder(), tiny_decoder().bfloat16()]
    for model in models:
        train(model, create_optimizer(model, **OPTIONS), range(5))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(b.float(), a, rtol=0.04, atol=0.02)


@pytest.mark.parametrize("preset", ["fira", "apollo", "crosslore", "galore"])
def test_tiny_fp16_gradients_keep_fp16_weights_finite(preset: str) -> None:
    """Fira's and APOLLO's scaling is the inverse of the gradient's size, more than fp16 can hold."""
    weight = nn.Parameter(torch.randn(32, 24, generator=draws()).half())
    optimizer = create_optimizer(_Holder(weight), preset, lr=1e-3, rank=4, scale=1.0, residual_ratio=0.0)
    before = weight.detach().clone()
    for step in range(8):
        weight.grad = (torch.randn(32, 24, generator=draws(step)) * 2e-6).half()
        optimizer.step()
    assert weight.isfinite().all() and not torch.equal(weight, before)


class _Holder(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.proj = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.proj.weight = weight


def test_a_window_of_tiny_fp16_gradients_still_moves_a_shared_basis() -> None:
    model = tiny_decoder().half()
    optimizer = create_optimizer(
        model, lr=1e-4, rank=4, projector="power", fit_window=2, refresh_every=4, refresh_stagger=False, residual=None
    )
    weight = model.self_attn.q_proj.weight
    for step in range(4):
        weight.grad = (torch.randn(32, 32, generator=draws(step)) * 3e-5).half()
        optimizer.step()
    before = optimizer.state[weight]["basis"].clone()
    weight.grad = (torch.randn(32, 32, generator=draws(9)) * 3e-5).half()
    optimizer.step()
    assert not torch.equal(optimizer.state[weight]["basis"], before)


def test_the_callers_autocast_does_not_reach_the_step() -> None:
    ends = []
    for enabled in (False, True):
        model = tiny_decoder()
        optimizer = create_optimizer(model, **OPTIONS)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draws(p.numel()))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_one_call_of_the_fused_kernel_has_one_dtype_one_device_and_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a GPU it would read the others as what the first is.
    calls: list[list[torch.dtype]] = []
    original = torch._fused_adamw_

    def recorded(targets: list[torch.Tensor], *rest: Any, **options: Any) -> None:
        calls.append([target.dtype for target in targets])
        original(targets, *rest, **options)

    monkeypatch.setattr(torch, "_fused_adamw_", recorded)
    rule, hp = AdamW(), Hyper(lr=1.0, scale=1.0, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    lows = [torch.full((3, 2), 2.0, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    lows += [torch.full((2,), 2.0, dtype=torch.float64), torch.full((4,), 2.0)]
    updates = rule.update_many(lows, [rule.init(low) for low in lows], [1, 1, 1, 1, 2], hp)
    assert calls == [[torch.float32] * 2, [torch.float64] * 2, [torch.float32]]
    for low, update, t in zip(lows, updates, (1, 1, 1, 1, 2), strict=True):
        torch.testing.assert_close(update, rule.update(low, rule.init(low), t, hp), rtol=0, atol=0)


class Raised(Exception):
    pass


def test_full_precision_nests_and_ends_with_an_error_and_in_other_threads() -> None:
    seen: list[bool] = []

    @full_precision()
    def inside(depth: int) -> None:
        seen.append(torch.is_autocast_enabled("cpu"))
        if depth:
            with pytest.raises(Raised):
                inside(depth - 1)
        raise Raised

    def autocast() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with pytest.raises(Raised):
                inside(2)
            seen.append(not torch.is_autocast_enabled("cpu"))
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16

    threads = [threading.Thread(target=autocast) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    autocast()
    assert seen == [False] * 20 and not torch.is_autocast_enabled("cpu")
