"""Saving and loading the state."""

import copy
import io
import logging
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from crosslore import create_optimizer

from .models import tiny_decoder, train

OPTIONS = {"lr": 1e-3, "rank": 4, "scale": 2.0, "warmup_steps": 3, "residual_ratio": 0.5, "refresh_every": 4}


def saved(optimizer: torch.optim.Optimizer) -> dict:
    """Through a file, as a checkpoint goes, with tensors and plain values only."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("select", ["moment", "residual"])
@pytest.mark.parametrize("stop", [2, 4, 6], ids=["in warm-up", "at a refresh", "after a refresh"])
def test_resuming_is_bitwise(stop: int, select: str, dtype: torch.dtype) -> None:
    options = {**OPTIONS, "residual_select": select}
    model = tiny_decoder().to(dtype)
    optimizer = create_optimizer(model, **options)
    train(model, optimizer, range(stop))
    resumed = tiny_decoder(seed=1).to(dtype)
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer = create_optimizer(resumed, **options)
    resumed_optimizer.load_state_dict(saved(optimizer))
    assert train(model, optimizer, range(stop, 12)) == train(resumed, resumed_optimizer, range(stop, 12))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_the_round_trip_restores_every_dtype_bitwise() -> None:
    """torch casts state to the weight's dtype: an int32 index 257 would come back as bf16 256."""
    model = tiny_decoder(width=64).bfloat16()
    optimizer = create_optimizer(model, **OPTIONS)
    train(model, optimizer, range(5))
    fresh = create_optimizer(model, **OPTIONS)
    fresh.load_state_dict(saved(optimizer))
    weight = model.self_attn.q_proj.weight
    assert optimizer.state[weight]["res_index"].max() > 257
    assert optimizer.state[weight]["res_index"].dtype == torch.int32
    for p, state in optimizer.state.items():
        assert set(state) == set(fresh.state[p])
        for key, value in state.items():
            assert torch.equal(value, fresh.state[p][key]) and value.dtype == fresh.state[p][key].dtype, key


def test_two_optimizers_do_not_share_state_after_loading() -> None:
    model = tiny_decoder()
    optimizer, fresh = create_optimizer(model, **OPTIONS), create_optimizer(model, **OPTIONS)
    train(model, optimizer, range(2))
    fresh.load_state_dict(optimizer.state_dict())
    before = fresh.state[model.up_proj.weight]["exp_avg"].clone()
    train(model, optimizer, range(1))
    assert torch.equal(fresh.state[model.up_proj.weight]["exp_avg"], before)


def test_state_holds_tensors_only_and_groups_plain_values() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS)
    train(model, optimizer, range(5))
    keys = {"step", "basis", "exp_avg", "exp_avg_sq", "res_index", "res_avg", "res_avg_sq"}
    for state in optimizer.state.values():
        assert set(state) <= keys and all(isinstance(v, torch.Tensor) for v in state.values())
    plain = (int, float, str, bool, type(None), tuple, list)
    assert all(isinstance(v, plain) for group in optimizer.state_dict()["param_groups"] for v in group.values())


def test_another_rank_is_refused_by_name() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS)
    train(model, optimizer, range(2))
    other = create_optimizer(model, **{**OPTIONS, "rank": 3})
    with pytest.raises(
        ValueError, match=r"self_attn\.q_proj\.weight was saved as 32 x 32 rank 4 right.*asks for.*rank 3"
    ):
        other.load_state_dict(saved(optimizer))
    assert not other.state


def test_a_state_of_another_optimizer_is_refused() -> None:
    model = tiny_decoder()
    with pytest.raises(ValueError, match="not of LowRankOptimizer"):
        create_optimizer(model, **OPTIONS).load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


def test_changed_options_are_named_when_the_checkpoint_wins(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS)
    train(model, optimizer, range(2))
    other = create_optimizer(model, **{**OPTIONS, "scale": 7.0})
    with caplog.at_level(logging.WARNING, logger="crosslore"):
        other.load_state_dict(saved(optimizer))
    assert "scale 2.0 (asked for: 7.0)" in caplog.text
    assert other.param_groups[0]["scale"] == 2.0


def test_a_checkpoint_without_a_newer_option_gets_its_default() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS)
    train(model, optimizer, range(2))
    state = saved(optimizer)
    for group in state["param_groups"]:
        del group["decay_order"], group["seed"]
    fresh = create_optimizer(model, **OPTIONS)
    fresh.load_state_dict(state)
    assert fresh.param_groups[0]["decay_order"] == "before"
    train(model, fresh, range(1))


def test_weights_in_another_order_are_refused_by_name() -> None:
    layers = {name: torch.nn.Linear(8, 8) for name in "ab"}
    first, second = (torch.nn.ModuleDict({n: layers[n] for n in order}) for order in ("ab", "ba"))
    state = create_optimizer(first, lr=1e-3, rank=2, cross_head_targets=None).state_dict()
    with pytest.raises(ValueError, match=r"has the weight a\.weight where this run has b\.weight"):
        create_optimizer(second, lr=1e-3, rank=2, cross_head_targets=None).load_state_dict(state)


@pytest.mark.parametrize("steps", [2, 6], ids=["in warm-up", "after it"])
def test_a_distributed_checkpoint_restores_every_tensor(steps: int, tmp_path: Path) -> None:
    """torch.distributed.checkpoint allocates a fresh state by one step with zero gradients, then loads into it."""
    models = [tiny_decoder(), tiny_decoder(seed=1)]
    optimizers = [create_optimizer(m, **OPTIONS) for m in models]
    train(models[0], optimizers[0], range(steps))
    dcp.save({"optimizer": get_optimizer_state_dict(models[0], optimizers[0])}, checkpoint_id=tmp_path)
    models[1].load_state_dict(models[0].state_dict())
    slots = get_optimizer_state_dict(models[1], optimizers[1])
    dcp.load({"optimizer": slots}, checkpoint_id=tmp_path)
    set_optimizer_state_dict(models[1], optimizers[1], slots)
    assert train(models[0], optimizers[0], range(steps, 9)) == train(models[1], optimizers[1], range(steps, 9))


def test_hooks_that_change_the_loaded_state_are_honoured() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS)
    train(model, optimizer, range(2))
    fresh = create_optimizer(model, **OPTIONS)

    def forget_moments(_: object, state_dict: dict) -> dict:
        state = {i: {k: torch.zeros_like(v) for k, v in s.items()} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    fresh.register_load_state_dict_pre_hook(forget_moments)
    fresh.load_state_dict(saved(optimizer))
    assert all((v == 0).all() for state in fresh.state.values() for v in state.values())


@pytest.mark.parametrize("change", [{"refresh_every": 5}, {"refresh_stagger": False}], ids=str)
def test_another_interval_is_taken_from_the_checkpoint(change: dict, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS)
    train(model, optimizer, range(2))
    other = create_optimizer(model, **{**OPTIONS, **change})
    with caplog.at_level(logging.WARNING, logger="crosslore"):
        other.load_state_dict(saved(optimizer))
    assert next(iter(change)) in caplog.text
    assert other.param_groups[0]["blocks"] == optimizer.param_groups[0]["blocks"]


def test_a_copy_keeps_its_options_and_counts() -> None:
    optimizer = create_optimizer(tiny_decoder(), **OPTIONS, foreach=False, compile=True)
    optimizer.nonfinite_skips["a"] = 2
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (twin.foreach, twin.compile, twin.nonfinite_skips) == (False, True, {"a": 2})


@pytest.mark.parametrize(
    "change", [{"rank": 3}, {"rule": "adamw8bit"}, {"fit_window": 2}, {"residual_ratio": 0.1}], ids=str
)
def test_options_that_shape_the_state_cannot_change_on_the_way(change: dict) -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS)
    train(model, optimizer, range(2))
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match=f"{next(iter(change))} cannot change while the optimizer runs"):
        train(model, optimizer, range(2, 3))


def test_a_configuration_that_no_group_uses_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    from crosslore import LowRankConfig, LowRankOptimizer

    with caplog.at_level(logging.WARNING, logger="crosslore"):
        LowRankOptimizer([torch.nn.Parameter(torch.ones(8, 8))], config=LowRankConfig(rank=2))
    assert "No group has a `rank`" in caplog.text
