"""What every registered projector must do; a new one is tested by its registry line alone."""

import pytest
import torch

from crosslore.config import LowRankConfig
from crosslore.layout import MatrixLayout
from crosslore.refresh import draw_generator
from crosslore.registry import REGISTRY, load

# rows, cols, rank, side, heads; a wide spread of shapes, with r = 1, r = min, r > d_k and one row.
SHAPES = [
    (24, 40, 4, "left", 1),
    (40, 24, 4, "right", 1),
    (32, 32, 1, "right", 1),
    (12, 30, 12, "left", 1),
    (1, 9, 1, "right", 1),
    (32, 24, 8, "right", 4),
    (16, 24, 12, "right", 4),
]
PROJECTORS = sorted(REGISTRY["projector"])


def fit(name: str, grad: torch.Tensor, layout: MatrixLayout, seed: int = 0) -> torch.Tensor:
    projector = load("projector", name).from_config(LowRankConfig())
    return projector.fit(grad, layout, previous=None, generator=draw_generator(seed, "w", 0))


@pytest.fixture(params=[(name, shape) for name in PROJECTORS for shape in SHAPES], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[str, torch.Tensor, MatrixLayout]:
    name, (rows, cols, rank, side, heads) = request.param
    if name == "cross_head" and side == "left":
        pytest.skip("cross-head sharing is on the right side")
    grad = torch.randn(rows, cols, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return name, grad, MatrixLayout(rows=rows, cols=cols, rank=rank, side=side, heads=heads)


def test_the_basis_is_orthonormal_of_the_layouts_shape(case: tuple) -> None:
    name, grad, layout = case
    basis = fit(name, grad, layout)
    assert basis.shape == layout.basis_shape
    if not load("projector", name).orthonormal:
        pytest.skip(f"{name} is not orthonormal")
    torch.testing.assert_close(basis.mT @ basis, torch.eye(layout.rank, dtype=torch.float64))
    assert basis.untyped_storage().nbytes() == basis.numel() * basis.element_size()


def test_the_same_draws_give_the_same_basis(case: tuple) -> None:
    name, grad, layout = case
    assert torch.equal(fit(name, grad, layout), fit(name, grad, layout))


def test_projection_back_is_the_adjoint_and_keeps_what_is_in_the_subspace(case: tuple) -> None:
    name, grad, layout = case
    projector = load("projector", name).from_config(LowRankConfig())
    basis = fit(name, grad, layout)
    low = projector.project(grad, basis, layout)
    back = projector.project_back(low, basis, layout)
    if projector.orthonormal:
        torch.testing.assert_close(projector.project(back, basis, layout), low)
    torch.testing.assert_close((back * grad).sum(), low.square().sum())


def test_adding_back_in_place_equals_the_full_product(case: tuple) -> None:
    name, grad, layout = case
    projector = load("projector", name).from_config(LowRankConfig())
    basis = fit(name, grad, layout)
    low, weight = projector.project(grad, basis, layout), torch.ones_like(grad)
    expected = 0.9 * weight - 0.1 * projector.project_back(low, basis, layout)
    projector.add_back_(weight, low, basis, layout, alpha=-0.1, beta=0.9)
    torch.testing.assert_close(weight, expected)


def test_an_unstored_basis_depends_on_the_generator_alone_and_is_the_identity_in_the_mean() -> None:
    layout, gaussian = MatrixLayout(rows=40, cols=24, rank=4, side="right"), load("projector", "gaussian")()
    bases = [
        gaussian.fit(torch.randn(40, 24), layout, previous=None, generator=draw_generator(0, "w", i)).double()
        for i in range(4000)
    ]
    assert torch.equal(bases[0], fit("gaussian", torch.randn(40, 24), layout).double())
    mean = torch.stack([p @ p.mT for p in bases]).mean(0)
    torch.testing.assert_close(mean, torch.eye(24).double(), rtol=0, atol=0.1)


@pytest.mark.parametrize("name", [name for name in PROJECTORS if load("projector", name).fitted])
def test_a_gradient_of_low_rank_is_captured_whole(name: str) -> None:
    """Every head of this gradient spans the same 3 directions, so even one head's basis captures all of it."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(32, 3, generator=generator) @ torch.randn(3, 24, generator=generator)
    layout = MatrixLayout(rows=32, cols=24, rank=4, side="right", heads=4)
    basis = fit(name, grad, layout)
    torch.testing.assert_close(grad @ basis @ basis.mT, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PROJECTORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_give_an_fp32_basis(name: str, dtype: torch.dtype) -> None:
    layout = MatrixLayout(rows=16, cols=12, rank=3, side="right", heads=4)
    assert fit(name, torch.randn(16, 12).to(dtype), layout).dtype == torch.float32


def test_randomized_is_close_to_the_best_basis_and_power_iterations_help() -> None:
    """Captured energy over the best possible, singular values falling like 1/sqrt(i): the worst case for a sketch."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(200, 200)).Q for _ in range(2))
    grad = u @ torch.diag(torch.arange(1, 201).float().rsqrt()) @ v
    layout = MatrixLayout(rows=200, cols=200, rank=16, side="right")
    best = (grad @ fit("svd", grad, layout)).square().sum()
    shares = []
    for iterations in (0, 1, 2):
        projector = load("projector", "randomized")(oversampling=8, power_iterations=iterations)
        basis = projector.fit(grad, layout, previous=None, generator=draw_generator(0, "w", 0))
        shares.append(float((grad @ basis).square().sum() / best))
    assert shares[0] < shares[1] < shares[2] <= 1 + 1e-5
    assert shares[2] > 0.9


def test_cross_head_looks_at_the_drawn_heads_only() -> None:
    from crosslore.projectors.cross_head import drawn

    layout = MatrixLayout(rows=32, cols=24, rank=6, side="right", heads=8)
    heads = drawn(layout, draw_generator(0, "w", 0))
    assert len(set(heads)) == 2  # ceil(6 / 4)
    grad = torch.randn(32, 24)
    other = torch.randn(32, 24)
    for head in heads:
        other[4 * head : 4 * head + 4] = grad[4 * head : 4 * head + 4]
    assert torch.equal(fit("cross_head", grad, layout), fit("cross_head", other, layout))


def test_every_refresh_draws_heads_anew_and_every_head_is_drawn() -> None:
    from crosslore.projectors.cross_head import drawn

    layout = MatrixLayout(rows=32, cols=24, rank=4, side="right", heads=8)
    draws = [drawn(layout, draw_generator(0, "w", number))[0] for number in range(100)]
    assert set(draws) == set(range(8))
