"""When bases are refitted, from what, and what happens when a factorisation fails."""

import logging
from collections import Counter

import pytest
import torch
from torch import nn

from crosslore import LowRankConfig, LowRankOptimizer, create_optimizer, fitting
from crosslore.projectors.randomized import Randomized
from crosslore.refresh import RefreshEvery

from .models import tiny_decoder, train

OPTIONS = {"lr": 1e-3, "rank": 4, "scale": 2.0, "residual_ratio": 0.0}


def fits_per_step(monkeypatch: pytest.MonkeyPatch, layers: int, every: int, steps: int, **options: object) -> list[int]:
    """How many bases are fitted in each step."""
    counts, fitted = [], Counter()
    original = fitting.refresh_

    def counting(*args: object, **kwargs: object) -> None:
        fitted["fits"] += 1
        original(*args, **kwargs)

    monkeypatch.setattr("crosslore.step.refresh_", counting)
    model = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(layers)])
    optimizer = create_optimizer(model, refresh_every=every, **OPTIONS, **options)
    for _ in range(steps):
        for layer in model:
            layer.weight.grad = torch.randn(8, 8)
        before = fitted["fits"]
        optimizer.step()
        counts.append(fitted["fits"] - before)
    return counts


@pytest.mark.parametrize(("layers", "every"), [(7, 14), (20, 5), (6, 6), (3, 1)])
def test_staggered_refreshes_are_spread_evenly(monkeypatch: pytest.MonkeyPatch, layers: int, every: int) -> None:
    counts = fits_per_step(monkeypatch, layers, every, 3 * every + 1, refresh_stagger=True)
    assert counts[0] == layers
    assert max(counts[1:]) <= -(-layers // every)
    # The first refresh of weight 0 falls on step 1 + every: each interval fits every weight once.
    assert sum(counts[every : 2 * every]) == sum(counts[2 * every : 3 * every]) == layers


def test_without_stagger_all_weights_refresh_together_as_the_peers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fits_per_step(monkeypatch, 5, 3, 7, refresh_stagger=False) == [5, 0, 0, 5, 0, 0, 5]


@pytest.mark.parametrize("phase", [0, 1, 2, 5, -1])
def test_the_number_of_a_basis_counts_its_refreshes(phase: int) -> None:
    refresh = RefreshEvery(3, phase)
    due = [t for t in range(1, 20) if refresh.due(t)]
    assert [refresh.number(t) for t in due] == list(range(len(due)))
    assert due[0] == 1 and all(b - a == 3 for a, b in zip(due[1:], due[2:], strict=False))
    assert all(refresh.soon(t, 2) == (refresh.due(t + 1) or refresh.due(t + 2)) for t in range(1, 15))


def test_a_window_fits_the_power_step_on_all_its_gradients() -> None:
    """Basis of step 7 = orth(sum over steps 4-6 of G^T G P), P the basis of step 1."""
    torch.manual_seed(0)
    weight, grads = nn.Parameter(torch.zeros(12, 8)), [torch.randn(12, 8) for _ in range(7)]
    config = LowRankConfig(rank=3, refresh_every=6, fit_window=3, projector="power", moments="rotate")
    optimizer = LowRankOptimizer([{"params": [weight], "rank": 3}], lr=1e-2, config=config)
    for t, grad in enumerate(grads, start=1):
        weight.grad = grad.clone()
        if t == 7:
            old = optimizer.state[weight]["basis"].clone()
        optimizer.step()
    expected = torch.linalg.qr(sum(g.mT @ g @ old for g in grads[3:6])).Q
    basis = optimizer.state[weight]["basis"]
    torch.testing.assert_close(basis @ basis.mT, expected @ expected.mT)
    assert not optimizer.state[weight]["sketch"].any()


def test_a_shared_basis_sees_another_head_in_each_step_of_the_window() -> None:
    from crosslore.projectors.cross_head import CrossHead

    seen, original = [], CrossHead.chosen

    def spy(self: CrossHead, *args: object) -> torch.Tensor:
        seen.append(original(self, *args))
        return seen[-1]

    model = tiny_decoder(width=64, heads=8, kv_heads=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrossHead, "chosen", spy)
        optimizer = create_optimizer(
            model, **OPTIONS, projector="power", fit_window=6, refresh_every=8, refresh_stagger=False
        )
        train(model, optimizer, range(9))
    assert len({int(heads[0]) for heads in seen}) > 3


def test_heads_by_energy_are_those_with_the_largest_gradient() -> None:
    from crosslore.layout import MatrixLayout
    from crosslore.projectors.cross_head import CrossHead
    from crosslore.refresh import draw_generator

    layout = MatrixLayout(rows=32, cols=24, rank=6, side="right", heads=8)
    grad = torch.randn(32, 24)
    grad[4:8] *= 10
    grad[20:24] *= 5
    chosen = CrossHead(head_choice="energy").chosen(grad, layout, draw_generator(0, "w", 0))
    assert sorted(chosen.tolist()) == [1, 5]


def test_a_failing_factorisation_falls_back_and_is_counted_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fitting, "fallbacks", Counter())

    def fails(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    weight = nn.Parameter(torch.zeros(12, 8))
    config = LowRankConfig(rank=3, refresh_every=1, projector="svd")
    optimizer = LowRankOptimizer([{"params": [("w", weight)], "rank": 3}], lr=1e-2, config=config)
    with caplog.at_level(logging.WARNING, logger="crosslore"):
        for _ in range(3):
            weight.grad = torch.randn(12, 8)
            optimizer.step()
    basis = optimizer.state[weight]["basis"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3))
    assert fitting.fallbacks == {"w": 3} and caplog.text.count("factorisation") == 1 and weight.any()


def test_the_old_basis_stays_when_nothing_can_be_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "fallbacks", Counter())
    weight = nn.Parameter(torch.zeros(12, 8))
    optimizer = LowRankOptimizer([{"params": [("w", weight)], "rank": 3, "refresh_every": 2}], lr=1e-2)
    weight.grad = torch.randn(12, 8)
    optimizer.step()
    optimizer.step()
    before = optimizer.state[weight]["basis"].clone()
    monkeypatch.setattr(Randomized, "fit", lambda *_, **__: torch.full((8, 3), float("nan")))
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["basis"], before) and fitting.fallbacks["w"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit_window": 2, "projector": "svd"}, "fit_window must be 1 for projector 'svd', got 2"),
        ({"fit_window": 4, "refresh_every": 3}, r"fit_window must be at most refresh_every \(3\), got 4"),
        ({"projector": "gaussian", "moments": "rotate"}, "moments='rotate' needs an orthonormal basis"),
        ({"projector": "gaussian", "residual": "norm_scaled"}, "residual='norm_scaled' needs an orthonormal basis"),
        ({"residual": "flora"}, "residual='flora' goes with projector='gaussian' and rule='adafactor'"),
        ({"residual": "norm_scaled", "residual_ratio": 0.1}, "residual_ratio must be 0 for residual='norm_scaled'"),
        ({"projector": "power", "power_iterations": 0}, "power_iterations must be at least 1 for projector 'power'"),
        ({"projector": "random", "cross_head_targets": ("q_proj",)}, "cross_head_targets must be None for projector"),
        ({"random_after": -1}, "random_after must be an integer >= 0, got -1"),
        ({"fit_momentum": 1.5}, "fit_momentum must be a number >= 0 and <= 1, got 1.5"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankConfig(**options)


def test_reset_moments_start_their_bias_correction_again() -> None:
    """A refresh's first update is then as large as the first one of a run: the sign of a constant gradient."""
    weight = nn.Parameter(torch.zeros(8, 6))
    config = LowRankConfig(rank=6, refresh_every=5, moments="reset", projector="svd", refresh_phase=2)
    optimizer = LowRankOptimizer([{"params": [weight], "rank": 6}], lr=1.0, config=config)
    for step in range(1, 14):
        weight.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        before = weight.detach().clone()
        optimizer.step()
        update = (weight.detach() - before) @ optimizer.state[weight]["basis"]
        fresh = step in (1, 3, 8, 13)
        assert torch.allclose(update.abs(), torch.ones(8, 6), atol=1e-4) == fresh, step


@pytest.mark.parametrize("phase", [0, 1, 4, 5, -1])
def test_the_age_of_a_basis_counts_from_its_refresh(phase: int) -> None:
    refresh, last = RefreshEvery(5, phase), 1
    for t in range(1, 30):
        last = t if refresh.due(t) else last
        assert refresh.age(t) == t - last + 1


def test_groups_of_one_weight_refresh_on_different_steps_too() -> None:
    layers = [nn.Linear(8, 8, bias=False) for _ in range(8)]
    groups = [{"params": [layer.weight], "rank": 4, "refresh_stagger": True, "refresh_every": 16} for layer in layers]
    optimizer = LowRankOptimizer(groups, lr=1e-3)
    offsets = [group["blocks"][0][0]["refresh_offset"] for group in optimizer.param_groups]
    assert offsets[0] == 0 and len(set(offsets)) == 8


def test_heads_without_a_gradient_leave_the_basis_to_the_others() -> None:
    from crosslore.layout import MatrixLayout
    from crosslore.projectors.cross_head import CrossHead, drawn

    layout = MatrixLayout(rows=32, cols=24, rank=8, side="right", heads=4)
    (head,) = drawn(layout, torch.Generator().manual_seed(0))
    grad = torch.randn(32, 24, generator=torch.Generator().manual_seed(1))
    grad[8 * head : 8 * head + 8] = 0
    basis = CrossHead().fit(grad, layout, previous=None, generator=torch.Generator().manual_seed(0))
    whole = CrossHead().inner.fit(grad, layout, previous=None, generator=torch.Generator().manual_seed(2))
    assert torch.linalg.norm(grad @ basis) > 0.9 * torch.linalg.norm(grad @ whole)
