"""Every preset against its closed formula in float64 (peers.py), across refreshes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crosslore import PRESETS, LowRankOptimizer
from crosslore.layout import MatrixLayout, shorter_side
from crosslore.projectors.gaussian import Gaussian
from crosslore.refresh import draw_generator

from . import peers
from .samples import SHAPES, assert_close, gradients, normal

RANK, EVERY, STEPS, LR = 4, 3, 8, 1e-2


def run(name: str, start: Tensor, grads: list[Tensor], **options: object) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of our preset after each step, and the bases of its refreshes."""
    preset = PRESETS[name]
    decay = options.pop("weight_decay", 0.0)
    config = replace(preset.config, **{"rank": RANK, "refresh_every": EVERY, **options})
    p = torch.nn.Parameter(start.clone())
    optimizer = LowRankOptimizer(
        [{"params": [("w", p)], "rank": config.rank}],
        lr=LR, betas=preset.betas, eps=preset.eps, weight_decay=decay, config=config,
    )  # fmt: skip
    path, bases = [], []
    for t, grad in enumerate(grads):
        p.grad = grad.clone()
        optimizer.step()
        path.append(p.detach().clone())
        if t % EVERY == 0 and "basis" in optimizer.state[p]:
            bases.append(optimizer.state[p]["basis"].clone())
    return path, bases


def draws(rows: int, cols: int, rank: int) -> Callable[[int], Tensor]:
    """The Gaussian bases that the optimizer draws for the weight `w`, by number."""
    layout = MatrixLayout(rows=rows, cols=cols, rank=rank, side=shorter_side(rows, cols))
    like = torch.empty(0, dtype=torch.float64)
    return lambda number: Gaussian().fit(like, layout, previous=None, generator=draw_generator(0, "w", number))


def sample(rows: int, cols: int) -> tuple[Tensor, list[Tensor]]:
    return normal(rows, cols, seed=1), gradients(rows, cols, STEPS)


def assert_same_path(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) == STEPS
    assert (ours[-1] - ours[0]).abs().max() > 1e-3
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, atol=1e-9)


cases = pytest.mark.parametrize(
    ("shape", "weight_decay"), [(shape, decay) for shape in SHAPES for decay in (0.0, 0.1)], ids=str
)


@cases
@pytest.mark.parametrize("feedback", [True, False])
def test_ldadam_follows_its_formula(shape: tuple[int, int], weight_decay: float, feedback: bool) -> None:
    start, grads = sample(*shape)
    options = {} if feedback else {"residual": None}
    ours, _ = run("ldadam", start, grads, weight_decay=weight_decay, refresh_every=1, **options)
    theirs, _ = peers.ldadam(start, grads, rank=RANK, lr=LR, weight_decay=weight_decay, error_feedback=feedback)
    assert_same_path(ours, theirs)


@cases
def test_fira_follows_its_formula(shape: tuple[int, int], weight_decay: float) -> None:
    start, grads = sample(*shape)
    ours, bases = run("fira", start, grads, weight_decay=weight_decay)
    theirs, _ = peers.fira(
        start, grads, rank=RANK, lr=LR, scale=0.25, every=EVERY, weight_decay=weight_decay, basis_at=bases.__getitem__
    )
    assert_same_path(ours, theirs)


@cases
@pytest.mark.parametrize("name", ["apollo", "apollo_mini"])
def test_apollo_follows_its_formula(shape: tuple[int, int], weight_decay: float, name: str) -> None:
    start, grads = sample(*shape)
    rank, scale, granularity = (1, 128.0, "tensor") if name == "apollo_mini" else (RANK, 1.0, "channel")
    ours, _ = run(name, start, grads, weight_decay=weight_decay, rank=rank)
    theirs, _ = peers.apollo(
        start, grads, rank=rank, lr=LR, scale=scale, every=EVERY, weight_decay=weight_decay,
        basis_at=draws(*shape, rank), granularity=granularity,
    )  # fmt: skip
    assert_same_path(ours, theirs)


@cases
@pytest.mark.parametrize("random_after", [0, 3, 100])
def test_golore_follows_its_formula(shape: tuple[int, int], weight_decay: float, random_after: int) -> None:
    start, grads = sample(*shape)
    ours, bases = run("golore", start, grads, weight_decay=weight_decay, random_after=random_after)
    theirs, _ = peers.golore(
        start, grads, rank=RANK, lr=LR, scale=0.25, every=EVERY, weight_decay=weight_decay,
        random_after=random_after, basis_at=bases.__getitem__,
    )  # fmt: skip
    assert_same_path(ours, theirs)


@cases
def test_flora_follows_its_formula(shape: tuple[int, int], weight_decay: float) -> None:
    start, grads = sample(*shape)
    ours, _ = run("flora", start, grads, weight_decay=weight_decay)
    theirs, _ = peers.flora(
        start, grads, rank=RANK, lr=LR, every=EVERY, beta1=0.9, weight_decay=weight_decay, basis_at=draws(*shape, RANK)
    )
    assert_same_path(ours, theirs)


@cases
def test_galore_with_adafactor_follows_its_formula(shape: tuple[int, int], weight_decay: float) -> None:
    start, grads = sample(*shape)
    options = {"rule": "adafactor", "decay_order": "before"}
    ours, bases = run("galore", start, grads, weight_decay=weight_decay, **options)
    theirs, _ = peers.galore_adafactor(
        start, grads, rank=RANK, lr=LR, scale=0.25, every=EVERY, weight_decay=weight_decay, basis_at=bases.__getitem__
    )
    assert_same_path(ours, theirs)
