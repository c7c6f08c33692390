"""Items are looked up, not rebuilt: what is found is what a new look at the group would give."""

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import nn

from crosslore import LowRankOptimizer
from crosslore.items import Items


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape))


def optimizer_of(*shapes: tuple[int, int]) -> LowRankOptimizer:
    """Two groups, the first in low rank; one step is done."""
    groups = [{"params": [matrix(*shape) for shape in shapes], "rank": 2}, {"params": [matrix(3, 3), matrix(5)]}]
    optimizer = LowRankOptimizer(groups, lr=1e-2, betas=[0.9, 0.999])  # type: ignore[arg-type]
    step(optimizer)
    return optimizer


def step(optimizer: LowRankOptimizer) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.ones_like(weight)
    optimizer.step()


def replace_a_weight(optimizer: LowRankOptimizer) -> None:
    optimizer.param_groups[0]["params"][1] = matrix(8, 6)


def reset_the_state(optimizer: LowRankOptimizer) -> None:
    optimizer.state = defaultdict(dict)


def change_a_list_in_place(optimizer: LowRankOptimizer) -> None:
    optimizer.param_groups[0]["betas"][0] = 0.5


def change_a_tensor_in_place(optimizer: LowRankOptimizer) -> None:
    for _ in range(2):
        optimizer.param_groups[0].setdefault("rate", torch.tensor(0.0)).add_(0.5)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["rate"]
        optimizer.item(0, 0)


def take_a_weight_out(optimizer: LowRankOptimizer) -> None:
    optimizer.items.place(optimizer.param_groups[0]["params"][1])
    for key in ("params", "blocks"):
        del optimizer.param_groups[0][key][0]


def exchange_weights(optimizer: LowRankOptimizer) -> None:
    for key in ("params", "blocks"):
        optimizer.param_groups[0][key].reverse()


def remove_a_group(optimizer: LowRankOptimizer) -> None:
    del optimizer.param_groups[0]


def exchange_groups(optimizer: LowRankOptimizer) -> None:
    optimizer.param_groups.reverse()


def load(optimizer: LowRankOptimizer) -> None:
    saved = optimizer.state_dict()
    saved["param_groups"][0]["scale"] = 0.125
    optimizer.load_state_dict(saved)


def of_both(**options: object) -> Callable[[LowRankOptimizer], None]:
    def change(optimizer: LowRankOptimizer) -> None:
        for group in optimizer.param_groups:
            group.update(options)

    change.__name__ = str(options)
    return change


CHANGES = [
    replace_a_weight, reset_the_state, change_a_list_in_place, change_a_tensor_in_place, take_a_weight_out,
    exchange_weights, remove_a_group, exchange_groups, load, of_both(lr=0.5), of_both(lr=torch.tensor(0.5)),
    of_both(betas=(0.5, 0.6)), of_both(weight_decay=0.5), of_both(eps=0.5), of_both(scale=0.5), of_both(seed=7),
    of_both(stochastic_rounding=True), of_both(decay_order="after"), of_both(refresh_every=3), of_both(moments="reset"),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_found_is_what_is_there(change: Callable[[LowRankOptimizer], None]) -> None:
    optimizer = optimizer_of((6, 4), (8, 6))
    change(optimizer)
    for g, group in enumerate(optimizer.param_groups):
        for i, weight in enumerate(group["params"]):
            found, anew = optimizer.items.get(g, i), Items(optimizer).get(g, i)
            assert found.weight is weight and found.state is anew.state is optimizer.state[weight]
            assert optimizer.items.place(weight) == (g, i) and optimizer.items.of(weight) is optimizer.items.get(g, i)
            for key in ("blocks", "methods", "config", "hp", "name", "group"):
                assert getattr(found, key) == getattr(anew, key), key
            assert all(block.take(weight).shape == (block.layout.rows, block.layout.cols) for block in found.blocks)
    step(optimizer)


def test_what_was_taken_out_is_not_found() -> None:
    optimizer = optimizer_of((6, 4), (8, 6))
    gone = optimizer.param_groups[0]["params"][0], optimizer.param_groups[0]["params"][1]
    assert optimizer.items.place(gone[1]) == (0, 1)
    take_a_weight_out(optimizer)
    assert optimizer.items.place(gone[1]) == (0, 0)
    remove_a_group(optimizer)
    for weight in gone:
        with pytest.raises(KeyError, match="is in no group of this optimizer"):
            optimizer.items.of(weight)


@pytest.mark.parametrize("option", [{"rank": 3}, {"rule": "sgd"}, {"projector": "svd"}])
def test_what_the_state_depends_on_is_refused_again_and_again(option: dict[str, object]) -> None:
    optimizer = optimizer_of((6, 4), (8, 6))
    optimizer.param_groups[0].update(option)
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot change while the optimizer runs"):
            step(optimizer)


def test_weights_of_a_removed_group_and_a_model_are_freed() -> None:
    optimizer = optimizer_of((6, 4), (8, 6))
    found = [weakref.ref(weight) for group in optimizer.param_groups for weight in group["params"]]
    gc.disable()  # no cycle holds them
    try:
        for weight in optimizer.param_groups[1]["params"]:
            del optimizer.state[weight]
        del optimizer.param_groups[1], weight
        step(optimizer)
        assert [weight() is None for weight in found] == [False, False, True, True]
        del optimizer
        assert all(weight() is None for weight in found)
    finally:
        gc.enable()


def test_an_observer_that_comes_later_is_seen() -> None:
    optimizer = optimizer_of((6, 4), (8, 6))
    observers = optimizer.item(0, 0).observers
    optimizer.observers.append(object())  # type: ignore[arg-type]
    assert observers is optimizer.item(0, 0).observers is optimizer.observers


def resize(weight: nn.Parameter, moments: dict[str, torch.Tensor]) -> None:
    weight.data = torch.ones(300, 3)


def shorten_moments(weight: nn.Parameter, moments: dict[str, torch.Tensor]) -> None:
    moments["exp_avg_sq"] = moments["exp_avg_sq"][:1]


@pytest.mark.parametrize("change", [resize, shorten_moments])
def test_moments_of_another_size_are_refused_not_written_past_their_end(change: Callable[..., None]) -> None:
    optimizer = LowRankOptimizer([matrix(3, 3)], lr=1e-2)
    step(optimizer)
    (weight,) = optimizer.param_groups[0]["params"]
    weight.grad = None
    change(weight, optimizer.state[weight])
    with pytest.raises(ValueError, match="Build a new optimizer after a weight was resized or moved"):
        step(optimizer)


def test_moments_with_other_strides_take_the_same_step() -> None:
    ends = []
    for strides in (False, True):
        weight = nn.Parameter(torch.arange(12.0).view(3, 4))
        optimizer = LowRankOptimizer([weight], lr=1e-2)
        for t in range(3):
            weight.grad = torch.linspace(-1, 1, 12).view(3, 4) * (t + 1) ** 2
            optimizer.step()
            if strides:
                for key in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[weight][key] = optimizer.state[weight][key].mT.contiguous().mT
        ends.append(weight.detach())
    torch.testing.assert_close(*ends)
