"""Compact gradients under what goes wrong or sideways: NaN, autocast, loss scaling, threads, late schedulers."""

import copy
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from crosslore import create_optimizer, stepping

from .test_compact import llama, loss_of, options_of, train

transformers = pytest.importorskip("transformers", reason="needs transformers")
PLUS = {"lr": 1e-2, "rank": 4, "scale": 1.0, "refresh_every": 3}
FULL, COMPACT, DEFERRED = {}, {"gradients": "compact"}, {"gradients": "compact", "weights": "deferred"}


def start(method: str, *, dtype: torch.dtype = torch.float64, **more: Any) -> tuple[nn.Module, Any]:
    model = llama(dtype=dtype)
    preset, options = options_of(method)
    return model, create_optimizer(model, preset, **{**options, **more})


def difference(ours: nn.Module, theirs: nn.Module) -> float:
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def batch(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mode", [{}, {"accumulation_steps": 2}])
def test_under_autocast_state_has_the_precision_of_the_weight(mode: dict[str, Any]) -> None:
    model, optimizer = start("plus", dtype=torch.float32, **COMPACT, **mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(optimizer, model, range(3), parts=2 if mode else 1)
    state = optimizer.state[model.model.layers[0].mlp.up_proj.weight]
    assert {name: tensor.dtype for name, tensor in state.items() if tensor.dtype != torch.float32} == {}


@pytest.mark.parametrize("mode", [COMPACT, DEFERRED])
def test_a_rate_that_changes_between_backward_and_step_counts_for_weights_that_wait(mode: dict[str, Any]) -> None:
    ends = []
    for chosen in (FULL, mode):
        model, optimizer = start("crosslore", weight_decay=0.5, **chosen)
        for step in range(10):
            optimizer.zero_grad()
            (loss_of(model, step) * (0 if step % 7 == 0 else 1)).backward()  # zero where a refresh is due
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 + step)
            optimizer.step()
        ends.append(model)
    assert difference(ends[1], ends[0]) < 1e-9


def test_a_gradient_that_is_not_finite_does_not_switch_clipping_off() -> None:
    model, optimizer = start("plus", rule="sgd", lr=1.0, max_grad_norm=1e-6, **COMPACT)
    train(optimizer, model, range(3))
    optimizer.zero_grad()
    attention = model.model.layers[1].self_attn.q_proj
    hook = attention.register_full_backward_hook(lambda module, grads, outs: (grads[0] * float("nan"),))
    before = copy.deepcopy(model.state_dict())
    loss_of(model, 3).backward()
    hook.remove()
    optimizer.step()
    moved = [float((new - before[name]).norm()) for name, new in model.state_dict().items()]
    assert sum(distance > 0 for distance in moved) > 5  # the weights above the hook
    assert 0 < max(moved) < 1e-5


def test_a_later_backward_that_is_not_finite_stays_out_of_the_sketch() -> None:
    model, optimizer = start("plus-window", **COMPACT, accumulation_steps=2)
    layer = model.model.layers[1].mlp.down_proj
    for step in range(9):
        optimizer.zero_grad()
        loss_of(model, 2 * step).backward()
        poison = layer.register_forward_hook(lambda m, i, o: o * float("nan")) if step in (5, 6) else None
        loss_of(model, 2 * step + 1).backward()
        if poison:
            poison.remove()
        optimizer.step()
    assert all(bool(t.isfinite().all()) for state in optimizer.state.values() for t in state.values())
    assert optimizer.nonfinite_skips


class Outside(nn.Module):
    """A layer whose weight is read outside it too, and whose own output counts k times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16).double()

    def forward(self, x: torch.Tensor, k: float) -> torch.Tensor:
        return k * self.layer(x) + x @ self.layer.weight.T


def test_a_weight_whose_layer_says_nothing_steps_once_by_its_other_gradient() -> None:
    ends = []
    for mode in (FULL, COMPACT):
        model = Outside()
        optimizer = create_optimizer(model, "crosslore_plus", **PLUS, weight_decay=5.0, **mode)
        for step in range(6):
            optimizer.zero_grad()
            model(batch(step, 8, 16), 0.0 if step % 3 == 0 else 1.0).square().mean().backward()
            optimizer.step()
        ends.append(model)
    assert difference(ends[1], ends[0]) < 1e-9


def test_a_weight_that_is_skipped_does_not_step_by_its_other_gradient() -> None:
    model = Outside()
    optimizer = create_optimizer(model, "crosslore_plus", **PLUS, weight_decay=5.0, **COMPACT)
    for k in (1.0, float("nan")):
        before = model.layer.weight.detach().clone()
        optimizer.zero_grad()
        x = batch(0, 8, 16)
        ((k * model.layer(x)).sum() + (x @ model.layer.weight.T).square().mean()).backward()
        optimizer.step()
    assert torch.equal(model.layer.weight, before)


@pytest.mark.parametrize("method", ["crosslore", "crosslore-no-warmup", "crosslore-select", "plus-window"])
def test_gradients_that_wait_in_host_memory_are_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU; here both memories are the same one.
    monkeypatch.setattr("crosslore.compact.begin.PARKED", ("cpu",))
    ends, held = [], []
    for mode in (FULL, {**COMPACT, "accumulation_steps": 3}):
        model, optimizer = start(method, **mode)
        train(optimizer, model, range(9), parts=3)
        for part in range(2):
            (loss_of(model, part) / 3).backward()
        if mode:
            held = [one for one in optimizer.compact._held.values() if one.whole is not None]
            assert all(one.factors is None for one in optimizer.compact._held.values())
        ends.append(model)
    assert held  # the weights whose refresh is due
    assert difference(ends[1], ends[0]) < 1e-9


def test_threads_that_call_backward_at_once_lose_nothing() -> None:
    ends = []
    for mode in (FULL, COMPACT):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).double()
        optimizer = create_optimizer(model, "crosslore_plus", **{**PLUS, "refresh_every": 1000}, **mode)
        for step in range(40):
            optimizer.zero_grad()
            losses = [model(batch(8 * step + part, 8, 64)).square().mean() for part in range(8 if step else 1)]
            threads = [threading.Thread(target=loss.backward) for loss in losses]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            optimizer.step()
        ends.append(model)
    assert difference(ends[1], ends[0]) < 1e-9


def test_loss_scaling_that_cannot_be_undone_is_refused() -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 16, bias=False))
    optimizer = create_optimizer(linear, "crosslore_plus", lr=1e-3, rank=4, **COMPACT)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(linear(torch.randn(4, 16)).square().mean()).backward()
    with pytest.raises(RuntimeError, match="all trained weights have compact ones. Train another weight too"):
        scaler.step(optimizer)
    model, momentum = start("plus", dtype=torch.float32, fit_momentum=0.5, **COMPACT)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match="fit_momentum > 0"):
        scaler.step(momentum)


def test_between_backward_and_step_only_values_wait_and_no_positions() -> None:
    model, optimizer = start("crosslore", warmup_steps=0, **COMPACT)
    train(optimizer, model, range(2))
    loss_of(model, 2).backward()
    waiting = [pending.ctx for held in optimizer.compact._held.values() for pending in held.pendings]
    values = [ctx for ctx in waiting if ctx.kept is not None]
    assert values and all(ctx.positions is None for ctx in values)


def test_the_updates_of_a_group_are_gone_before_the_next_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = start("plus", **COMPACT)
    train(optimizer, model, range(2))
    loss_of(model, 2).backward()
    monkeypatch.setitem(stepping.AT_ONCE, "cpu", 1)  # a group for each weight
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    rule = type(next(iter(optimizer.compact._held.values())).pendings[0].method.rule)
    update_many = rule.update_many

    def watched(*args: Any) -> list[torch.Tensor]:
        alive.append(sum(update() is not None for update in made))
        updates = update_many(*args)
        made.extend(weakref.ref(update) for update in updates)
        return updates

    monkeypatch.setattr(rule, "update_many", watched)
    optimizer.step()
    assert len(made) > 2 and alive == [0] * len(alive)


@pytest.mark.parametrize(("expected", "passes", "warns"), [(1, 2, True), (1, 1, False), (2, 2, False), (2, 4, False)])
def test_passes_that_a_basis_is_not_fitted_to_are_warned_of_once(
    expected: int, passes: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = start("plus", accumulation_steps=expected, **COMPACT)
    train(optimizer, model, range(4), parts=passes)
    found = [record for record in caplog.records if "is used in another backward pass" in record.message]
    assert len(found) == warns
