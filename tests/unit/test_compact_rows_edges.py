"""Embeddings and heads stepped in rows, where something is out of the ordinary."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from crosslore import create_optimizer

from .test_compact_rows import TwoUses, difference, stepper


@pytest.mark.parametrize("tied", [False, True])
def test_no_token_and_one_token_are_batches_too(tied: bool) -> None:
    ends = []
    for mode in ("layerwise", "compact-layerwise"):
        torch.manual_seed(0)
        embed, middle, head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=not tied)
        if tied:
            head.weight = embed.weight
        model = nn.Sequential(embed, middle, head).double()
        options = {"rank": 4, "targets": ["1"], "random_after": 0, "weight_decay": 0.1}
        optimizer = create_optimizer(model, "golore", lr=1e-2, **options, gradients=mode)
        for tokens in (torch.arange(6).view(2, 3), torch.zeros(0, 5, dtype=torch.long), torch.tensor(3)):
            model(tokens).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model)
    assert difference(*ends) < 1e-9


def test_a_product_that_overflows_under_autocast_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    options = {"lr": 1e-3, "rank": 4, "targets": ["0"], "gradients": "compact-layerwise"}
    optimizer = create_optimizer(model, "crosslore_plus", **options)
    for layer in model:
        nn.init.eye_(layer.weight)
    before = model[1].weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.float16):
        y = model(torch.full((4, 8), 1000.0))
    y.backward(torch.full_like(y, 1000.0))  # 4e6 in fp16
    optimizer.step()
    assert "1.weight" in optimizer.nonfinite_skips and torch.equal(before, model[1].weight)


def test_a_norm_beyond_fp32_squares_stops_no_later_step() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    limits = {"max_grad_norm": 1.0, "clip": "stale-global"}
    options = {"lr": 1e-3, "rank": 4, "targets": ["0"], "rule": "sgd", "gradients": "compact-layerwise"}
    optimizer = create_optimizer(model, "crosslore_plus", **options, **limits)
    model[1](torch.full((1, 8), 1e10)).backward(torch.full((1, 8), 1e12))
    optimizer.step()
    assert optimizer.layerwise is not None and optimizer.layerwise.grad_norm() == pytest.approx(8e22)


def test_what_a_broken_pass_has_left_is_no_part_of_the_next() -> None:
    ends = []
    for mode in ("layerwise", "compact-layerwise"):
        torch.manual_seed(0)
        model = TwoUses().double()
        optimizer = create_optimizer(model, "golore", lr=1e-2, rank=4, random_after=0, gradients=mode)
        for breaks in (True, False):
            y = model.embed(torch.arange(6))
            if breaks:
                y.register_hook(lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError) if breaks else nullcontext():
                (model.embed(torch.arange(7)).sum() + y.square().sum()).backward()
        optimizer.step()
        ends.append(model)
    assert difference(*ends) < 1e-9


@pytest.mark.parametrize("padding", [5, -1])
def test_options_that_are_set_later_count(padding: int) -> None:
    ends = []
    for mode in ("layerwise", "compact-layerwise"):
        torch.manual_seed(0)
        model = TwoUses().double()
        model.outside = False
        optimizer = create_optimizer(model, "golore", lr=1e-2, rank=4, random_after=0, gradients=mode)
        model.embed.padding_idx, model.embed.max_norm = padding, 0.5 if padding == 5 else None
        for _ in range(3):
            model(torch.tensor([0, 5, 49, 49, 7])).square().sum().backward()
            optimizer.step()
        ends.append(model)
    assert difference(*ends) < 1e-9


def test_only_a_modules_own_weight_comes_in_rows() -> None:
    model = TwoUses()
    model.linear.register_parameter("more", nn.Parameter(torch.ones(16, 16)))
    optimizer = create_optimizer(model, "crosslore_plus", lr=1e-2, rank=4, gradients="compact-layerwise")
    assert [id(weight) for weight in stepper(optimizer).modules] == [id(model.embed.weight)]
    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        nn.functional.embedding(torch.arange(3), model.embed.weight, sparse=True).sum().backward()
