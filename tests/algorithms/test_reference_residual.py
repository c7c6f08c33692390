"""Checks of the float64 reference's residuals: Algorithm 2, its positions and its warm-up.

Each is against something that does not come from it: torch.optim.AdamW, numbers worked out by hand, or an identity.
"""

import math

import pytest
import torch
from torch import Tensor

from crosslore import LowRankOptimizer, create_optimizer

from . import reference as ref
from .reference import LinearReference, ReferenceCrossLore
from .samples import SHAPES, assert_close, gradients, normal, orthonormal, torch_adamw

ADAM = {"b1": 0.9, "b2": 0.99, "eps": 1e-8}


# The rule "exact" against torch.optim.AdamW


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("select", ["moment", "residual"])
def test_exact_rule_at_every_position_is_full_rank_adamw(rows: int, cols: int, side: str, select: str) -> None:
    """Any basis, any rank, across refreshes: P N cancels. alpha scales lr and so divides the decay."""
    W, grads, scale = normal(rows, cols, seed=5), gradients(rows, cols, 10), 0.25
    expected = torch_adamw(W, grads, lr=1e-2 * scale, betas=(0.9, 0.99), weight_decay=0.1 / scale)
    m = rows if side == "left" else cols
    model = LinearReference(
        W, side=side, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, scale=scale, refresh_every=3,
        basis=lambda G, t: orthonormal(m, 5, seed=t), residual_rule="exact", residual_ratio=1.0, residual_select=select,
    )  # fmt: skip
    for G, W_t in zip(grads, expected, strict=True):
        assert_close(model.step(G), W_t)


def test_exact_rule_follows_adamw_at_the_kept_positions_and_galore_elsewhere() -> None:
    W, grads = normal(24, 40, seed=5), gradients(24, 40, 10)
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "basis": lambda G, t: orthonormal(24, 5, seed=t), "refresh_every": 4}
    model = ReferenceCrossLore(W, residual_rule="exact", residual_ratio=0.1, **options)
    galore = ReferenceCrossLore(W, **options)
    adamw = torch_adamw(W, grads, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    for G, W_t in zip(grads, adamw, strict=True):
        model.step(G), galore.step(G)
        assert_close(model.W, torch.where(model.L, W_t, galore.W))


def test_exact_rule_after_a_warm_up_moves_like_an_adamw_that_starts_then() -> None:
    W, grads, k = normal(24, 40, seed=5), gradients(24, 40, 10), 4
    model = ReferenceCrossLore(
        W,
        rank=5,
        lr=1e-2,
        betas=(0.9, 0.99),
        refresh_every=3,
        residual_rule="exact",
        residual_ratio=1.0,
        warmup_steps=k,
    )
    for G in grads[:k]:
        model.step(G)
    later = torch_adamw(model.W, grads[k:], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    for G, W_t in zip(grads[k:], later, strict=True):
        assert_close(model.step(G), W_t)


def test_exact_rule_subtracts_two_updates_with_the_same_eps_placement() -> None:
    W, options = normal(24, 40, seed=5), {"lr": 1e-2, "eps": 0.1, "placement": "uncorrected", "decay": "after"}
    adamw = ReferenceCrossLore(W, basis=lambda G, t: torch.eye(24), **options)  # checked against galore-torch
    model = ReferenceCrossLore(W, rank=5, residual_rule="exact", residual_ratio=1.0, **options)
    for G in gradients(24, 40, 3):
        assert_close(model.step(G), adamw.step(G))


# Algorithm 2


@pytest.mark.parametrize(
    ("rule", "under_root"),
    [
        # P = (.6, .8), G = (1, 2): R = 2.2, G_hat = (1.32, 1.76), dG = (-.32, .24); at t = 1 the bias corrections leave
        # M' = 2.2, V' = 4.84, dM = dG, N = 1.
        ("guarded", (0.36 * 4.84 + 0.1024, 0.64 * 4.84 + 0.0576)),  # (P*P) V' + dG*dG
        ("paper", (0.6 * 4.84 - 0.8448, 0.8 * 4.84 + 0.8448)),  # P V' + 2 G_hat*dG
    ],
)
def test_first_residual_step_is_the_one_worked_out_by_hand(rule: str, under_root: tuple[float, float]) -> None:
    P = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    options = {"lr": 1.0, "eps": 0.0, "basis": lambda G, t: P}
    model = ReferenceCrossLore(torch.zeros(2, 1), residual_rule=rule, residual_ratio=1.0, **options)
    model.step(torch.tensor([[1.0], [2.0]], dtype=torch.float64))
    delta = torch.tensor([[-0.32 / math.sqrt(under_root[0])], [0.24 / math.sqrt(under_root[1])]], dtype=torch.float64)
    assert_close(model.delta, delta)
    assert_close(model.W, -(P + delta))


@pytest.mark.parametrize("rule", ["guarded", "paper"])
def test_second_residual_step_is_the_one_worked_out_by_hand(rule: str) -> None:
    """The same P, then G = (2, 1): R = 2, G_hat = (1.2, 1.6), dG = (.8, -.6), after a warm-up of one step.

    dM starts at zero at t = 2 and is still corrected with 1 - b1^2, as Algorithm 2 prints it.
    """
    P = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    options = {"lr": 1.0, "betas": (0.9, 0.99), "eps": 0.0, "basis": lambda G, t: P, "warmup_steps": 1}
    model = ReferenceCrossLore(torch.zeros(2, 1), residual_rule=rule, residual_ratio=0.5, **options)
    model.step(torch.tensor([[1.0], [2.0]], dtype=torch.float64))
    assert model.L.tolist() == [[False], [True]]  # |P M'| is larger where P is
    model.step(torch.tensor([[2.0], [1.0]], dtype=torch.float64))
    V = (0.99 * 0.01 * 4.84 + 0.01 * 4.0) / (1 - 0.99**2)
    if rule == "guarded":
        under_root = 0.64 * V + 0.01 * 0.36 / (1 - 0.99**2)
    else:
        under_root = 0.8 * V + 2 * 0.01 * 1.6 * -0.6 / (1 - 0.99**2)
    delta = 0.1 * -0.6 / (1 - 0.9**2) / math.sqrt(under_root)
    assert_close(model.delta, torch.tensor([[0.0], [delta]], dtype=torch.float64))


def test_recursion_for_the_first_moment_is_exact_while_the_basis_stays_and_for_the_second_is_not() -> None:
    """Eq. 9 against Eq. 8, with every position kept."""
    m, n, P = 12, 20, orthonormal(12, 4)
    L, zero = torch.ones(m, n, dtype=torch.bool), torch.zeros(m, n, dtype=torch.float64)
    M, V, dM, dV, dropped, M_low, V_low = (zero,) * 5 + (zero[:4],) * 2
    for t, G in enumerate(gradients(m, n, 6), start=1):
        R, G_hat, dG = P.T @ G, P @ P.T @ G, G - P @ P.T @ G
        M, V = ref.moments(M, V, G, b1=0.9, b2=0.99)
        N, M_low, V_low = ref.adam_low_rank(R, M_low, V_low, t, **ADAM)
        _, dM, dV = ref.residual_step(G, P, N, V_low, L, dM, dV, t, since=t, residual_rule="paper", **ADAM)
        true_dM, true_dV = ref.moment_residuals(M, V, P, M_low, V_low)
        assert_close(dM, true_dM)
        dropped = 0.99 * dropped + 0.01 * (dG * dG + G_hat * G_hat - P @ (R * R))  # Eq. 22, neglected there
        assert_close(dV + dropped, true_dV)
    assert dropped.norm() > 0.5 * true_dV.norm()  # neglected, and not small


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_guarded_radicand_is_never_negative_and_the_printed_one_is(m: int, n: int) -> None:
    """Pure noise, so that P has no preferred sign. DESIGN 4.1: without a floor, half of the roots are NaN."""
    values: dict[str, list[Tensor]] = {"guarded": [], "paper": []}
    for rule, found in values.items():
        options = {"rank": 6, "lr": 1e-2, "refresh_every": 4, "residual_rule": rule, "residual_ratio": 0.1}
        model = ReferenceCrossLore(normal(m, n, seed=5), **options)
        for t in range(10):
            model.step(normal(m, n, seed=100 + t))
            assert torch.isfinite(model.W).all()
            under_root = ref.radicand(model.P, model.V, model.dV, model.t, b2=model.b2, residual_rule=rule)
            found.append(under_root[model.L])
    assert (torch.cat(values["guarded"]) >= 0).all()
    assert 0.3 < (torch.cat(values["paper"]) < 0).double().mean() < 0.7


def test_printed_rule_uses_the_floor_that_it_is_given() -> None:
    grads, seen = gradients(24, 40, 3), []

    def floor(radicand: Tensor) -> Tensor:
        seen.append(radicand.min().item())
        return radicand.abs()

    options = {"rank": 6, "lr": 1e-2, "residual_rule": "paper", "residual_ratio": 0.1}
    by_abs = ReferenceCrossLore(normal(24, 40), floor=floor, **options)
    by_clamp = ReferenceCrossLore(normal(24, 40), **options)
    none = ReferenceCrossLore(normal(24, 40), floor=lambda radicand: radicand, **options)
    for G in grads:
        by_abs.step(G), by_clamp.step(G), none.step(G)
    assert len(seen) == 3 and min(seen) < 0
    assert by_clamp.delta.abs().max() > 1e3 > by_abs.delta.abs().max()  # dM over eps: why it diverges when clamped
    assert none.W.isnan().any() and not none.W[~none.L].isnan().any()  # as printed


# Warm-up and positions


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("rule", ["paper", "guarded", "exact"])
@pytest.mark.parametrize("select", ["moment", "residual"])
def test_residual_starts_after_step_k_at_the_positions_recorded_in_step_k(k: int, rule: str, select: str) -> None:
    m, n, ratio = 24, 40, 0.05
    options = {"rank": 5, "lr": 1e-2, "refresh_every": 2}
    galore = ReferenceCrossLore(normal(m, n), **options)
    model = ReferenceCrossLore(
        normal(m, n), residual_rule=rule, residual_ratio=ratio, residual_select=select, warmup_steps=k, **options
    )
    energy, kept = torch.zeros(m, n).double(), None
    for t, G in enumerate(gradients(m, n, 6), start=1):
        model.step(G), galore.step(G)
        energy += (G - galore.P @ galore.P.T @ G) ** 2
        if t == max(k, 1):
            scores = (galore.P @ galore.M).abs() if select == "moment" else ref.row_by_column(energy)
            kept = scores >= scores.flatten().topk(48).values[-1]  # 48 = 0.05 * 24 * 40
            of_warm_up = energy.clone()
        if t <= k:
            assert torch.equal(model.W, galore.W)
        if t < max(k, 1):
            assert model.L is None
            continue
        assert torch.equal(model.L, kept) and kept.sum() == 48
        assert_close(model.energy, of_warm_up)
        assert torch.equal(model.W != galore.W, kept if t > k else torch.zeros_like(kept))
        assert torch.equal(model.dM != 0, kept if t > k else torch.zeros_like(kept))


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (1e-9, 1), (0.012, 12), (0.0126, 13), (1.0, 1000)])
def test_number_of_kept_positions_is_the_rounded_share(ratio: float, count: int) -> None:
    P, M = orthonormal(20, 4), normal(4, 50)
    L, scores = ref.select_positions(P, M, ratio), (P @ M).abs()
    assert L.sum() == count
    if 0 < count < 1000:
        assert scores[L].min() > scores[~L].max()


def test_ratio_zero_is_galore() -> None:
    model = ReferenceCrossLore(normal(24, 40), rank=5, lr=1e-2, residual_rule="guarded", residual_ratio=0.0)
    galore = ReferenceCrossLore(normal(24, 40), rank=5, lr=1e-2)
    for G in gradients(24, 40, 3):
        assert torch.equal(model.step(G), galore.step(G))


def test_an_exact_sum_starts_from_what_the_compact_sum_stands_for() -> None:
    """AdaGrad's sum at the kept positions would otherwise be 50 steps behind, and the first update 1."""
    weight = torch.nn.Parameter(torch.zeros(32, 32))
    group = {"params": [weight], "rank": 4, "residual": "sparse", "residual_ratio": 0.1, "residual_rule": "exact"}
    more = {"rule": "adagrad", "warmup_steps": 50, "refresh_every": 1000}
    optimizer = LowRankOptimizer([{**group, **more}], lr=1.0)
    for t in range(1, 52):
        weight.grad = torch.randn(32, 32, generator=torch.Generator().manual_seed(t))
        before = weight.detach().clone()
        optimizer.step()
    moved = (weight.detach() - before).view(-1)[optimizer.state[weight]["res_index"].long()]
    assert moved.square().mean().sqrt() < 0.5


def test_without_a_warm_up_layerwise_counts_the_age_of_exact_moments_from_their_first_gradient() -> None:
    """The positions are chosen in step 1, whose gradients are gone by then: the residual starts in step 2."""
    layer = torch.nn.Linear(6, 6, bias=False)
    options = {"rank": 1, "lr": 1.0, "scale": 1.0, "residual_rule": "exact", "residual_ratio": 1.0, "warmup_steps": 0}
    options |= {"residual_targets": None, "cross_head_targets": None}
    optimizer = create_optimizer(layer, "crosslore", **options, layerwise=True, accumulation_steps=2)
    for step in range(2):
        before = layer.weight.detach().clone()
        for part in range(2):
            x = torch.randn(9, 6, generator=torch.Generator().manual_seed(2 * step + part))
            (layer(x) * x).sum().backward()
        optimizer.step()
    # All positions are kept: the whole update is Adam's first one.
    torch.testing.assert_close((layer.weight.detach() - before).abs(), torch.ones(6, 6), rtol=0, atol=1e-4)
