"""Checks of the float64 reference itself, each against something that does not come from it: torch.optim.AdamW,
galore-torch, numbers worked out by hand, or an identity of projections. Algorithm 2: test_reference_residual.py.
"""

import pytest
import torch
from torch import Tensor

from . import reference as ref
from .reference import LinearReference, ReferenceCrossLore, align_signs, cross_head_basis, low_rank, svd_basis
from .samples import SHAPES, assert_close, gradients, normal, orthonormal, torch_adamw

ADAM = {"b1": 0.9, "b2": 0.99, "eps": 1e-8}


# Projection: Eq. 2-5


@pytest.mark.parametrize(("m", "n"), [*SHAPES, (1, 5), (5, 1)])
@pytest.mark.parametrize("full", [False, True])
def test_svd_basis_is_an_orthogonal_projection_with_the_least_error(m: int, n: int, full: bool) -> None:
    G, r = normal(m, n), min(m, n) if full else max(min(m, n) // 4, 1)
    P = svd_basis(G, r)
    projection, G_hat = P @ P.T, low_rank(P, G)
    dG = G - G_hat  # Eq. 5
    assert P.shape == (m, r)
    assert_close(P.T @ P, torch.eye(r, dtype=torch.float64))
    assert_close(projection @ projection, projection)
    assert_close(P.T @ dG, torch.zeros(r, n, dtype=torch.float64))
    assert abs((G_hat * dG).sum()) < 1e-11  # DESIGN 4.1: why the cross term of Eq. 9 averages to zero
    assert_close((dG * dG).sum(), (torch.linalg.svdvals(G)[r:] ** 2).sum(), atol=1e-10)  # Eckart-Young


def test_projection_identities_hold_for_a_basis_that_does_not_fit_the_gradient() -> None:
    G, P = normal(20, 30), orthonormal(20, 4, seed=1)
    dG = G - low_rank(P, G)
    assert abs((low_rank(P, G) * dG).sum()) < 1e-11
    assert_close((G * G).sum(), (low_rank(P, G) ** 2).sum() + (dG * dG).sum(), atol=1e-10)


@pytest.mark.parametrize(("r", "chosen"), [(1, [2]), (3, [0]), (4, [4]), (5, [3, 0]), (8, [1, 2]), (9, [4, 0, 2])])
def test_cross_head_basis_spans_the_chosen_heads_only(r: int, chosen: list[int]) -> None:
    G, d_k = normal(16, 20), 4
    P = cross_head_basis(G, d_k, 5, r, chosen)
    assert_close(P.T @ P, torch.eye(r, dtype=torch.float64))
    own = torch.cat([G[:, i * d_k : (i + 1) * d_k] for i in chosen], dim=1)
    best = (torch.linalg.svdvals(own)[r:] ** 2).sum()
    assert_close(((own - low_rank(P, own)) ** 2).sum(), best, atol=1e-10)
    G[:, [c for c in range(20) if c // d_k not in chosen]] *= 7.0  # the other heads have no say
    assert_close(cross_head_basis(G, d_k, 5, r, chosen), P, atol=0)


def test_one_head_gives_the_exact_basis_when_heads_share_their_column_space() -> None:
    G = normal(16, 3, seed=1) @ normal(3, 20, seed=2)  # rank 3, all five heads in one 3-dimensional space
    for i in range(5):
        assert_close(low_rank(cross_head_basis(G, 4, 5, 3, [i]), G), G)  # Eq. 4 without an error


@pytest.mark.parametrize(("r", "chosen"), [(5, [0]), (4, [0, 1]), (8, [1, 1])])
def test_cross_head_basis_refuses_a_wrong_number_of_heads(r: int, chosen: list[int]) -> None:
    with pytest.raises(AssertionError, match="heads"):
        cross_head_basis(normal(16, 20), 4, 5, r, chosen)


# Algorithm 1 against torch.optim.AdamW


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_identity_basis_without_residual_is_adamw(m: int, n: int) -> None:
    W, grads = normal(m, n, seed=5), gradients(m, n, 10)
    expected = torch_adamw(W, grads, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    model = ReferenceCrossLore(
        W, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, refresh_every=3, basis=lambda G, t: torch.eye(m)
    )
    for G, W_t in zip(grads, expected, strict=True):
        assert_close(model.step(G), W_t)


def test_full_rank_basis_is_adamw_in_rotated_coordinates_and_in_no_others() -> None:
    W, grads, Q = normal(12, 20, seed=5), gradients(12, 20, 10), orthonormal(12, 12)
    model = ReferenceCrossLore(W, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, basis=lambda G, t: Q)
    for G in grads:
        model.step(G)
    rotated = torch_adamw(Q.T @ W, [Q.T @ G for G in grads], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)[-1]
    assert_close(Q.T @ model.W, rotated)
    plain = torch_adamw(W, grads, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)[-1]
    assert (model.W - plain).abs().max() > 1e-3


def test_equation_11_is_algorithm_1_for_an_identity_basis_only() -> None:
    R, M, V = normal(4, 20), torch.zeros(4, 20).double(), torch.zeros(4, 20).double()
    N, M, V = ref.adam_low_rank(R, M, V, 1, **ADAM)
    eye, P = torch.eye(4, dtype=torch.float64), orthonormal(4, 4)
    assert_close(ref.reconstructed_update(eye, M, V, 1, floor=ref.clamp_at_zero, **ADAM), eye @ N)
    assert (ref.reconstructed_update(P, M, V, 1, floor=torch.abs, **ADAM) - P @ N).abs().max() > 0.1  # DESIGN 4.3


# Refresh


def test_refresh_happens_at_one_plus_multiples_of_the_interval_and_keeps_the_moments() -> None:
    calls = []

    def basis(G: Tensor, t: int) -> Tensor:
        calls.append(t)
        return svd_basis(G, 5)

    model = ReferenceCrossLore(normal(24, 40), basis=basis, lr=1e-2, betas=(0.9, 0.99), refresh_every=3)
    M, V = torch.zeros(5, 40).double(), torch.zeros(5, 40).double()
    for t, G in enumerate(gradients(24, 40, 8), start=1):
        model.step(G)
        if t in (1, 4, 7):
            assert_close(low_rank(model.P, G), low_rank(svd_basis(G, 5), G))
        R = model.P.T @ G
        M, V = 0.9 * M + 0.1 * R, 0.99 * V + 0.01 * R * R
        assert_close(model.M, M), assert_close(model.V, V)
    assert calls == [1, 4, 7]


@pytest.mark.parametrize("rule", [None, "guarded", "exact"])
def test_signs_of_the_basis_do_not_matter_before_the_first_refresh_and_do_after_it(rule: str | None) -> None:
    """M' is kept at a refresh, in the signs of the old basis: see the head of reference.py."""
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0]).double()

    def flipped(G: Tensor, t: int) -> Tensor:
        return svd_basis(G, 5) * (signs if t == 1 else 1.0)

    options = {"lr": 1e-2, "refresh_every": 4, "residual_rule": rule, "residual_ratio": 0.1}
    one = ReferenceCrossLore(normal(24, 40), rank=5, **options)
    two = ReferenceCrossLore(normal(24, 40), basis=flipped, **options)
    for t, G in enumerate(gradients(24, 40, 5), start=1):
        one.step(G), two.step(G)
        if t <= 4:
            assert_close(one.W, two.W)
    assert (one.W - two.W).abs().max() > 1e-4


# Weight decay, eps, orientation


def test_decay_after_the_update_decays_the_update_too() -> None:
    W, G = normal(24, 40, seed=5), normal(24, 40)
    update = torch.sign(G)  # one step of Adam with eps 0
    for decay, expected in (("before", 0.99 * W - 0.1 * update), ("after", 0.99 * (W - 0.1 * update))):
        model = ReferenceCrossLore(W, basis=lambda G, t: torch.eye(24), lr=0.1, weight_decay=0.1, eps=0, decay=decay)
        assert_close(model.step(G), expected)


def test_eps_is_added_after_or_before_the_bias_correction() -> None:
    for placement, expected in (("corrected", 2 / (2 + 0.5)), ("uncorrected", 0.1 * 0.2 / 0.1 / (0.1 * 2 + 0.5))):
        model = ReferenceCrossLore(
            torch.zeros(1, 1), basis=lambda G, t: torch.eye(1), lr=1.0, betas=(0.9, 0.99), eps=0.5, placement=placement
        )
        assert_close(model.step(torch.tensor([[2.0]])), torch.tensor([[-expected]], dtype=torch.float64))


@pytest.mark.parametrize("rule", [None, "paper", "guarded", "exact"])
def test_right_side_is_the_left_side_of_the_transpose(rule: str | None) -> None:
    options = {"rank": 5, "lr": 1e-2, "refresh_every": 3, "residual_rule": rule, "residual_ratio": 0.1, "scale": 2.0}
    W = normal(24, 40, seed=5)
    right = LinearReference(W, side="right", warmup_steps=2, **options)
    left = LinearReference(W.T, side="left", warmup_steps=2, **options)
    for G in gradients(24, 40, 5):
        assert_close(right.step(G), left.step(G.T).T)
    assert right.paper.P.shape == (40, 5) and right.turn(right.paper.M).shape == (24, 5)
    if rule is not None:
        assert right.kept.shape == (24, 40) and torch.equal(right.kept, left.kept.T)


def test_right_side_basis_of_one_head_comes_from_that_heads_rows_of_a_linear_weight() -> None:
    """Grouped-query K: out = 2 heads of 8, in = 40; the shorter side would be the wrong one."""
    grad = normal(16, 40)
    model = LinearReference(
        normal(16, 40), side="right", lr=1e-2, basis=lambda G, t: cross_head_basis(G, 8, heads=2, r=4, chosen_heads=[1])
    )
    model.step(grad)
    Vh = torch.linalg.svd(grad[8:16], full_matrices=False).Vh
    assert_close(model.paper.P @ model.paper.P.T, Vh[:4].T @ Vh[:4])


# galore-torch 1.0


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "shared_basis", "atol"),
    [
        (torch.float64, True, 1e-12),  # the arithmetic alone: galore-torch fits in float32, whatever the dtype
        (torch.float32, True, 1e-6),
        (torch.float32, False, 1e-6),  # the fit too: our Eq. 2, its columns' signs aligned
    ],
)
def test_galore_torch_equals_the_reference(
    rows: int, cols: int, dtype: torch.dtype, shared_basis: bool, atol: float
) -> None:
    # Imports transformers and bitsandbytes on its way, so other errors than a missing module are possible.
    galore = pytest.importorskip("galore_torch.adamw", exc_type=ImportError)
    weight = torch.nn.Parameter((0.1 * normal(rows, cols, seed=5)).to(dtype))  # small, so that float32 resolves it
    group = {"params": [weight], "rank": 6, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    optimizer = galore.AdamW(
        [group], lr=1e-2, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1, no_deprecation_warning=True
    )
    side = "right" if rows >= cols else "left"  # galore-torch's "std"

    def basis(G: Tensor, t: int) -> Tensor:
        ortho = optimizer.state[weight]["projector"].ortho_matrix.double()
        theirs = ortho.T if side == "right" else ortho
        return theirs if shared_basis else align_signs(svd_basis(G, 6), theirs)

    model = LinearReference(
        weight, side=side, basis=basis, lr=1e-2, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1, scale=0.25,
        refresh_every=3, placement="uncorrected", decay="after",
    )  # fmt: skip
    for grad in gradients(rows, cols, 7):  # refreshes at 1, 4 and 7; |W| moves by about 3e-2 in all
        weight.grad = grad.to(dtype)
        optimizer.step()  # first: the reference reads the basis that it fitted
        model.step(weight.grad)
        assert_close(weight.detach().double(), model.turn(model.paper.W), atol=atol)
