"""What every preset must do with every rule: the habits of torch's own optimizer tests."""

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.unit.models import loss_of, tiny_decoder, train
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from crosslore import LowRankConfig, create_optimizer
from crosslore.memory import state_bytes

from .methods import METHODS, NAMES, PLAIN, build, config_of, optimizer_for

methods = pytest.mark.parametrize(("preset", "rule"), METHODS, ids=["-".join(m) for m in METHODS])
plain = pytest.mark.parametrize(("preset", "rule"), PLAIN, ids=["-".join(m) for m in PLAIN])


def through_a_file(optimizer: torch.optim.Optimizer) -> dict:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_equal_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


@methods
def test_it_trains_and_every_weight_moves(preset: str, rule: str) -> None:
    model, optimizer = build(preset, rule, lr=3e-3)
    before = copy.deepcopy(model)
    losses = train(model, optimizer, range(12))
    assert all(loss == loss for loss in losses) and sum(losses[-3:]) < sum(losses[:3])
    for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(a, b), name


@methods
@pytest.mark.parametrize("stop", [2, 4, 7], ids=["in warm-up", "at a refresh", "after a refresh"])
def test_resuming_is_bitwise(preset: str, rule: str, stop: int) -> None:
    model, optimizer = build(preset, rule)
    train(model, optimizer, range(stop))
    resumed, fresh = build(preset, rule, seed=1)
    resumed.load_state_dict(model.state_dict())
    fresh.load_state_dict(through_a_file(optimizer))
    assert train(model, optimizer, range(stop, 12)) == train(resumed, fresh, range(stop, 12))
    assert_equal_weights(model, resumed)


@plain
@pytest.mark.parametrize("rounding", [False, True], ids=["nearest", "stochastic"])
def test_resuming_in_bf16_is_bitwise(preset: str, rule: str, rounding: bool) -> None:
    options = {"dtype": torch.bfloat16, "stochastic_rounding": rounding}
    model, optimizer = build(preset, rule, **options)
    train(model, optimizer, range(5))
    resumed, fresh = build(preset, rule, seed=1, **options)
    resumed.load_state_dict(model.state_dict())
    fresh.load_state_dict(through_a_file(optimizer))
    assert train(model, optimizer, range(5, 10)) == train(resumed, fresh, range(5, 10))
    assert_equal_weights(model, resumed)


@pytest.mark.parametrize("preset", NAMES)
@pytest.mark.parametrize("rule", ["adamw8bit", "paged_adamw8bit"])
def test_resuming_with_8bit_moments_is_bitwise(preset: str, rule: str) -> None:
    """Wide enough that compact gradients have 4096 entries, so that the moments are codes."""
    if preset in ("flora", "apollo_mini"):
        pytest.skip("no compact moments of 4096 entries")
    options = {"rank": 32, "width": 128, "dtype": torch.bfloat16}
    model, optimizer = build(preset, rule, **options)
    train(model, optimizer, range(5))
    assert any(v.dtype == torch.uint8 for v in optimizer.state[model.up_proj.weight].values())
    resumed, fresh = build(preset, rule, seed=1, **options)
    resumed.load_state_dict(model.state_dict())
    fresh.load_state_dict(through_a_file(optimizer))
    assert train(model, optimizer, range(5, 10)) == train(resumed, fresh, range(5, 10))


@methods
@pytest.mark.parametrize("steps", [2, 6], ids=["in warm-up", "after it"])
def test_a_distributed_checkpoint_restores_every_tensor(preset: str, rule: str, steps: int, tmp_path: Path) -> None:
    """torch.distributed.checkpoint allocates a fresh state by one step with zero gradients, then loads into it."""
    models, optimizers = zip(*(build(preset, rule, seed=seed) for seed in (0, 1)), strict=True)
    train(models[0], optimizers[0], range(steps))
    dcp.save({"optimizer": get_optimizer_state_dict(models[0], optimizers[0])}, checkpoint_id=tmp_path)
    models[1].load_state_dict(models[0].state_dict())
    slots = get_optimizer_state_dict(models[1], optimizers[1])
    dcp.load({"optimizer": slots}, checkpoint_id=tmp_path)
    set_optimizer_state_dict(models[1], optimizers[1], slots)
    assert train(models[0], optimizers[0], range(steps, 9)) == train(models[1], optimizers[1], range(steps, 9))


@methods
def test_the_foreach_path_equals_the_loop(preset: str, rule: str) -> None:
    models, optimizers = zip(*(build(preset, rule, foreach=foreach) for foreach in (True, False)), strict=True)
    losses = [train(model, optimizer, range(9)) for model, optimizer in zip(models, optimizers, strict=True)]
    assert losses[0] == losses[1]
    assert_equal_weights(*models)


@methods
def test_layerwise_equals_the_whole_step(preset: str, rule: str) -> None:
    models, optimizers = zip(*(build(preset, rule, layerwise=flag) for flag in (True, False)), strict=True)
    losses = [train(model, optimizer, range(9)) for model, optimizer in zip(models, optimizers, strict=True)]
    assert losses[0] == losses[1]
    assert_equal_weights(*models)


@plain
def test_a_deep_copy_goes_its_own_way(preset: str, rule: str) -> None:
    model, optimizer = build(preset, rule)
    train(model, optimizer, range(3))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    losses = train(model, optimizer, range(3, 8))
    assert losses == train(twin, twin_optimizer, range(3, 8))
    assert_equal_weights(model, twin)


@methods
def test_the_state_takes_the_bytes_of_the_formula(preset: str, rule: str) -> None:
    model, optimizer = build(preset, rule, width=128, rank=min(32, config_of(preset).rank))
    train(model, optimizer, range(5))
    held = sum(v.untyped_storage().nbytes() for state in optimizer.state.values() for v in state.values())
    assert held == state_bytes(optimizer)


@plain
def test_a_nonfinite_gradient_skips_its_weight_and_nothing_else(preset: str, rule: str) -> None:
    model, optimizer = build(preset, rule)
    train(model, optimizer, range(3))
    weight, other = model.up_proj.weight, model.down_proj.weight
    before = {key: value.clone() for key, value in optimizer.state[weight].items()}
    kept, moved = weight.detach().clone(), other.detach().clone()
    optimizer.zero_grad()
    loss_of(model).backward()
    weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert torch.equal(weight, kept) and not torch.equal(other, moved)
    assert all(torch.equal(value, before[key]) for key, value in optimizer.state[weight].items())
    assert optimizer.nonfinite_skips == {"up_proj.weight": 1}


@plain
def test_a_scheduler_drives_every_group(preset: str, rule: str) -> None:
    model, optimizer = build(preset, rule)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    train(model, optimizer, range(1))
    scheduler.step()
    before = copy.deepcopy(model)
    train(model, optimizer, range(1, 3))
    assert_equal_weights(model, before)


@plain
def test_a_closure_is_evaluated_with_gradients_on(preset: str, rule: str) -> None:
    models, optimizers = zip(*(build(preset, rule) for _ in range(2)), strict=True)

    def closure() -> torch.Tensor:
        optimizers[0].zero_grad()
        loss = loss_of(models[0])
        loss.backward()
        return loss

    assert optimizers[0].step(closure).item() == train(models[1], optimizers[1], range(1))[0]
    assert_equal_weights(*models)


@plain
def test_an_older_checkpoint_without_newer_options_gets_their_defaults(preset: str, rule: str) -> None:
    model, optimizer = build(preset, rule)
    train(model, optimizer, range(3))
    state, default = through_a_file(optimizer), LowRankConfig()
    for group in state["param_groups"]:
        for name in [n for n in vars(default) if group[n] == getattr(default, n)]:
            del group[name]
        for block in (b for plan in group["blocks"] for b in plan):
            for name in [n for n in ("transposed", "refresh_offset") if not block[n]]:
                del block[name]
    newer = {"sketch", "res_row_sq", "res_col_sq", "res_norm"}
    for tensors in state["state"].values():
        for key in newer & tensors.keys():
            del tensors[key]
    fresh = optimizer_for(model, preset, rule)
    fresh.load_state_dict(state)
    train(model, fresh, range(3, 5))
    assert all(set(fresh.state[p]) == set(optimizer.state[p]) for p in model.parameters())


@pytest.mark.parametrize("rule", ["adamw", "adagrad", "sgd"])
def test_an_identity_basis_is_the_optimizer_of_torch(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With P = I nothing is projected away: every weight moves as under torch's own rule."""
    from crosslore.projectors.base import Projector
    from crosslore.projectors.randomized import Randomized

    def identity(self: Projector, grad: torch.Tensor, layout: object, **_: object) -> torch.Tensor:
        return torch.eye(*layout.basis_shape, dtype=grad.dtype)

    monkeypatch.setattr(Randomized, "fit", identity)
    models = [tiny_decoder(kv_heads=4) for _ in range(2)]
    ours = create_optimizer(
        models[0], "crosslore", lr=1e-2, rank=32, scale=1.0, rule=rule, residual=None, cross_head_targets=None,
        weight_decay=0.1 if rule == "adamw" else 0.0, refresh_stagger=False, eps=1e-8,
    )  # fmt: skip
    decaying = [p for p in models[1].parameters() if p.dim() > 1]
    others = [p for p in models[1].parameters() if p.dim() == 1]
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    theirs = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=1e-2),
        "adagrad": lambda: torch.optim.Adagrad(models[1].parameters(), lr=1e-2, eps=1e-8),
        "sgd": lambda: torch.optim.SGD(models[1].parameters(), lr=1e-2, momentum=0.9),
    }[rule]()
    for step in range(6):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            train(model, optimizer, range(step, step + 1))
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-4, atol=1e-5)
