"""What must hold of the closed forms of `peers.py` whatever a package does: identities that a wrong rule breaks."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .peers import Run, apollo, fira, flora, galore_adafactor, golore, ldadam
from .reference import LinearReference, svd_basis
from .samples import SHAPES, assert_close, gradients, normal, orthonormal, torch_adamw

each_shape = pytest.mark.parametrize(("rows", "cols"), SHAPES)
COMMON = {"rank": 4, "lr": 1e-2, "weight_decay": 0.1}
OPTIONS: dict[Callable[..., Run], dict[str, object]] = {
    ldadam: {**COMMON},
    fira: {**COMMON, "scale": 0.25, "every": 3},
    apollo: {**COMMON, "scale": 4.0, "every": 3},
    golore: {**COMMON, "scale": 0.25, "every": 3, "random_after": 4},
    flora: {**COMMON, "every": 3, "beta1": 0.9},
    galore_adafactor: {**COMMON, "scale": 0.25, "every": 3},
}


def start(rows: int, cols: int) -> Tensor:
    return 0.1 * normal(rows, cols, seed=1)


def draw(number: int, size: int = 24, rank: int = 4) -> Tensor:
    return normal(size, rank, seed=40 + number) / math.sqrt(rank)


def same(basis: Tensor) -> Callable[[int], Tensor]:
    """Return a `basis_at` whose refreshes change nothing."""
    return lambda number: basis


def options_of(method: Callable[..., Run], **changes: object) -> dict[str, object]:
    drawn = {"basis_at": draw} if method in (apollo, golore, flora) else {}
    return OPTIONS[method] | drawn | changes


def galore(rows: int, cols: int, *, rank: int, scale: float, every: int, **options: object) -> list[Tensor]:
    """Return GaLore's path, from the reference of the CrossLore paper."""
    fixed = {"placement": "uncorrected", "decay": "after", "eps": 1e-6, "refresh_every": every, "scale": scale}
    side = "left" if rows < cols else "right"
    paper = LinearReference(start(rows, cols), side=side, lr=1e-2, rank=rank, **fixed, **options)
    return [paper.step(grad) for grad in gradients(rows, cols, 7)]


def lift(state: dict[str, Tensor], *, right: bool) -> Tensor:
    """Return P M' (left) or M' P^T (right)."""
    return state["exp_avg"] @ state["basis"].T if right else state["basis"] @ state["exp_avg"]


def average(grads: list[Tensor], beta: float) -> Tensor:
    """Return the exponential moving average of all of them, from zero."""
    return sum((1 - beta) * beta ** (len(grads) - 1 - i) * grad for i, grad in enumerate(grads))


def assert_same_path(actual: list[Tensor], expected: list[Tensor], atol: float = 1e-12) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, atol=atol)


@each_shape
def test_ldadam_of_full_rank_has_no_error_and_loses_nothing_of_its_first_moment(rows: int, cols: int) -> None:
    grads = gradients(rows, cols, 5)
    _, state = ldadam(start(rows, cols), grads, rank=min(rows, cols), lr=1e-2)
    assert_close(state["error"], torch.zeros(rows, cols).double(), atol=1e-10)
    assert_close(lift(state, right=rows > cols), average(grads, 0.908))  # a square one is projected from the left


@each_shape
def test_ldadam_of_full_rank_spreads_its_second_moment_without_loss(rows: int, cols: int) -> None:
    """C o C is doubly stochastic; with beta1 = beta2 no variance is negative, so abs() adds nothing to the sums."""
    grads = gradients(rows, cols, 5)
    _, state = ldadam(start(rows, cols), grads, rank=min(rows, cols), lr=1e-2, betas=(0.9, 0.9))
    across = 1 if rows > cols else 0
    assert_close(state["exp_avg_sq"].sum(across), average([g * g for g in grads], 0.9).sum(across))


@each_shape
@pytest.mark.parametrize("step", [1, 2, 5])
def test_ldadam_error_keeps_what_the_compact_moment_loses(rows: int, cols: int, step: int) -> None:
    """P M + (1 - b1) E after a step = b1 P M before it + (1 - b1)(G + E before it)."""
    grads, b1, right = gradients(rows, cols, step), 0.908, rows > cols
    _, after = ldadam(start(rows, cols), grads, rank=4, lr=1e-2)
    expected = (1 - b1) * grads[-1]
    if step > 1:
        _, before = ldadam(start(rows, cols), grads[:-1], rank=4, lr=1e-2)
        expected = expected + b1 * lift(before, right=right) + (1 - b1) * before["error"]
    assert_close(lift(after, right=right) + (1 - b1) * after["error"], expected, atol=1e-11)
    assert after["error"].abs().max() > 1e-2


@pytest.mark.parametrize("error_feedback", [True, False])
def test_ldadam_on_a_fixed_line_is_adamw_along_it(error_feedback: bool) -> None:
    """G_t = p c_t^T with rank 1: the basis stays +-p, C = +-1, and AdamW runs on the one row c_t."""
    weight, line = start(24, 40), orthonormal(24, 1)
    rows = [normal(1, 40, seed=60 + t) for t in range(6)]
    common = {"lr": 1e-2, "betas": (0.908, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    path, state = ldadam(weight, [line @ row for row in rows], rank=1, error_feedback=error_feedback, **common)
    along = torch_adamw(torch.zeros(1, 40, dtype=torch.float64), rows, **common)
    expected = [(1 - 1e-2 * 0.1) ** t * weight + line @ row for t, row in enumerate(along, start=1)]
    assert_same_path(path, expected, atol=1e-10)
    assert_close(state["error"], torch.zeros_like(weight), atol=1e-10)


@pytest.mark.parametrize("error_feedback", [True, False])
def test_ldadam_second_basis_is_one_power_step_on_both_gradients(error_feedback: bool) -> None:
    """M of step 1 without its bias is P^T G_1: B = rho P P^T G_1 + (1 - rho)(G_2 + E), and P_2 spans B B^T P."""
    first, second = gradients(24, 40, 2)
    _, state = ldadam(start(24, 40), [first, second], rank=4, lr=1e-2, rho=0.6, error_feedback=error_feedback)
    basis = svd_basis(first, 4)
    kept = basis @ basis.T @ first
    mixed = 0.6 * kept + 0.4 * (second + (first - kept if error_feedback else 0.0))
    span = torch.linalg.svd(mixed @ mixed.T @ basis, full_matrices=False).U
    assert_close(state["basis"] @ state["basis"].T, span @ span.T, atol=1e-10)


@each_shape
def test_fira_of_full_rank_and_scale_one_is_galore(rows: int, cols: int) -> None:
    options = {"rank": min(rows, cols), "scale": 1.0, "every": 3, "weight_decay": 0.1}
    path, _ = fira(start(rows, cols), gradients(rows, cols, 7), lr=1e-2, **options)
    assert_same_path(path, galore(rows, cols, **options), atol=1e-10)


@each_shape
def test_fira_in_the_identity_basis_is_adam_for_scale_one_only(rows: int, cols: int) -> None:
    grads, size = gradients(rows, cols, 7), min(rows, cols)
    options = {"rank": size, "lr": 1e-2, "every": 3, "eps": 1e-30, "basis_at": same(torch.eye(size).double())}
    adam = torch_adamw(start(rows, cols), grads, lr=1e-2, eps=1e-30, weight_decay=0.0)
    assert_same_path(fira(start(rows, cols), grads, scale=1.0, **options)[0], adam, atol=1e-10)
    assert (fira(start(rows, cols), grads, scale=0.25, **options)[0][-1] - adam[-1]).abs().max() > 1e-3


@pytest.mark.parametrize(("rows", "cols"), [(24, 40), (40, 24)])
def test_apollo_on_a_constant_gradient_grows_by_one_percent_a_step(rows: int, cols: int) -> None:
    """Then N = sign(R) bc1 / sqrt(bc2), which grows faster than the limiter lets it, and the update is known."""
    grad, basis = normal(rows, cols), draw(0)
    options = {"rank": 4, "lr": 1e-2, "scale": 4.0, "every": 3, "granularity": "tensor", "eps": 1e-30}
    path, _ = apollo(start(rows, cols), [grad] * 5, basis_at=same(basis), **options)
    low = basis.T @ (grad if rows < cols else grad.T)
    weight, norm = start(rows, cols), math.inf
    for t, after in enumerate(path, start=1):
        bias = (1 - 0.9**t) / math.sqrt(1 - 0.999**t)
        assert bias > 1.01 * norm or t == 1
        norm = bias if t == 1 else 1.01 * norm
        weight = weight - 1e-2 * 2.0 * norm / bias * math.sqrt(low.numel()) / low.norm() * grad
        assert_close(after, weight, atol=1e-9)  # 1e-8 beside |R|


@each_shape
def test_golore_with_one_refresh_is_galore_and_with_more_is_not(rows: int, cols: int) -> None:
    options = {"rank": 4, "scale": 0.25, "weight_decay": 0.1}
    weight, grads = start(rows, cols), gradients(rows, cols, 7)
    once, _ = golore(weight, grads, lr=1e-2, every=7, random_after=99, **options)
    assert_same_path(once, galore(rows, cols, every=7, **options))
    often, _ = golore(weight, grads, lr=1e-2, every=3, random_after=99, **options)
    kept = galore(rows, cols, every=3, **options)
    assert_same_path(often[:3], kept[:3])
    assert (often[3] - kept[3]).abs().max() > 1e-4


@each_shape
def test_golore_of_full_rank_carries_all_of_its_first_moment(rows: int, cols: int) -> None:
    """Over SVD bases at t = 1, 4 and random ones at t = 7, 10, whose draws it makes orthonormal."""
    grads, size = gradients(rows, cols, 11), min(rows, cols)
    options = {"scale": 0.25, "every": 3, "random_after": 4, "basis_at": lambda number: draw(number, size, size)}
    _, state = golore(start(rows, cols), grads, rank=size, lr=1e-2, **options)
    assert_close(state["basis"].T @ state["basis"], torch.eye(size).double(), atol=1e-10)
    assert_close(lift(state, right=rows >= cols), average(grads, 0.9), atol=1e-9)


def test_golore_leaves_an_orthonormal_basis_as_it_is() -> None:
    basis = orthonormal(24, 4)
    options = {"rank": 4, "lr": 1e-2, "scale": 0.25, "every": 3, "random_after": 0, "basis_at": same(basis)}
    path, state = golore(start(24, 40), gradients(24, 40, 7), **options)
    assert_close(state["basis"], basis)
    assert_same_path(path, galore(24, 40, rank=4, scale=0.25, every=3, basis=lambda G, t: basis))


@each_shape
def test_flora_in_orthogonal_square_bases_does_not_depend_on_them(rows: int, cols: int) -> None:
    size = min(rows, cols)
    options = {"rank": size, "lr": 1e-2, "beta1": 0.9, "weight_decay": 0.1}
    weight, grads = start(rows, cols), gradients(rows, cols, 7)
    moved, _ = flora(weight, grads, every=3, basis_at=lambda number: orthonormal(size, size, seed=number), **options)
    still, _ = flora(weight, grads, every=99, basis_at=same(torch.eye(size).double()), **options)
    assert_same_path(moved, still)


@each_shape
def test_flora_without_momentum_is_adafactor_without_projection(rows: int, cols: int) -> None:
    size = min(rows, cols)
    options = {"rank": size, "lr": 1e-2, "every": 3, "weight_decay": 0.1, "basis_at": same(torch.eye(size).double())}
    weight, grads = start(rows, cols), gradients(rows, cols, 7)
    assert_same_path(
        flora(weight, grads, beta1=0.0, **options)[0], galore_adafactor(weight, grads, scale=1.0, **options)[0]
    )


@pytest.mark.parametrize(("clip_threshold", "size"), [(1.0, 1.0), (0.5, 0.5), (2.0, 1.0)])
def test_galore_adafactor_of_rank_one_starts_with_a_sign(clip_threshold: float, size: float) -> None:
    """One row: its factored V is R * R, so that N is sign(R), whose rms is 1, cut to the threshold."""
    basis, grad = orthonormal(24, 1), normal(24, 40)
    options = {"rank": 1, "lr": 1e-2, "scale": 0.25, "every": 3, "basis_at": same(basis)}
    path, _ = galore_adafactor(start(24, 40), [grad], clip_threshold=clip_threshold, **options)
    assert_close(path[0], start(24, 40) - 1e-2 * 0.25 * size * basis @ (basis.T @ grad).sign())


@pytest.mark.parametrize("method", OPTIONS, ids=lambda method: method.__name__)
def test_the_transposed_problem_has_the_transposed_path(method: Callable[..., Run]) -> None:
    weight, grads, options = start(24, 40), gradients(24, 40, 7), options_of(method)
    path, state = method(weight, grads, **options)
    turned, turned_state = method(weight.T, [grad.T for grad in grads], **options)
    assert_same_path([after.T for after in turned], path)
    assert state["basis"].shape == turned_state["basis"].shape == (24, 4)
    assert state["exp_avg_sq"].shape == turned_state["exp_avg_sq"].T.shape


@pytest.mark.parametrize(
    ("method", "changes", "equal_steps"),
    [
        (ldadam, {"error_feedback": False}, 1),
        (ldadam, {"rho": 0.5}, 1),
        (fira, {"every": 4}, 3),
        (apollo, {"granularity": "tensor"}, 0),
        (apollo, {"scale": 1.0}, 0),
        (apollo, {"every": 4}, 3),
        (golore, {"random_after": 2}, 3),
        (golore, {"every": 4}, 3),
        (flora, {"every": 4}, 3),
        (flora, {"clip_threshold": 0.1}, 0),
        (galore_adafactor, {"every": 4}, 3),
        (galore_adafactor, {"clip_threshold": 0.5}, 0),
    ],
)  # fmt: skip
def test_an_option_matters_from_its_first_step_on(
    method: Callable[..., Run], changes: dict[str, object], equal_steps: int
) -> None:
    weight, grads = start(24, 40), gradients(24, 40, 7)
    plain, changed = (method(weight, grads, **options_of(method, **more))[0] for more in ({}, changes))
    distances = [(one - other).abs().max() for one, other in zip(plain, changed, strict=True)]
    assert all(distance <= 1e-12 for distance in distances[:equal_steps])
    assert all(distance > 1e-5 for distance in distances[equal_steps:])
