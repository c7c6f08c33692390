"""The optimizer behaves as users of torch.optim expect."""

import copy
import logging
import math
import pickle

import pytest
import torch

from crosslore import LowRankOptimizer, create_optimizer

from .models import loss_of, tiny_decoder, train

OPTIONS = {"lr": 1e-3, "rank": 4, "scale": 2.0, "warmup_steps": 2, "residual_ratio": 0.1, "refresh_every": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["galore", "crosslore"])
def test_training_lowers_the_loss(preset: str, dtype: torch.dtype) -> None:
    model = tiny_decoder().to(dtype)
    losses = train(model, create_optimizer(model, preset, lr=5e-3, rank=4, scale=2.0, warmup_steps=5), range(60))
    assert losses[-1] < 0.7 * losses[0]


def test_the_same_run_twice_is_bitwise_equal_whatever_the_global_generator_did() -> None:
    weights = []
    for seed in (1, 2):
        model = tiny_decoder()
        optimizer = create_optimizer(model, **OPTIONS)
        torch.manual_seed(seed)
        train(model, optimizer, range(10))
        weights.append([p.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_another_seed_draws_other_heads_and_sketches() -> None:
    weights = []
    for seed in (1, 2):
        model = tiny_decoder()
        train(model, create_optimizer(model, **OPTIONS, seed=seed), range(3))
        weights.append(model.self_attn.q_proj.weight.detach().clone())
    assert not torch.equal(*weights)


def test_a_copy_goes_on_as_the_original() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS)
    train(model, optimizer, range(6))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert train(model, optimizer, range(6, 12)) == train(twin, twin_optimizer, range(6, 12))


def test_pickling_keeps_groups_and_state() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS)
    train(model, optimizer, range(3))
    again = pickle.loads(pickle.dumps(optimizer))
    assert len(again.state) == len(optimizer.state)
    assert again.param_groups[0]["rank"] == 4


def test_repr_is_short_and_names_the_method() -> None:
    text = repr(create_optimizer(tiny_decoder(), **OPTIONS))
    assert "rank 4" in text and "6 low-rank" in text and len(text) < 900


def test_weights_without_a_gradient_are_left_alone() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS, weight_decay=0.1)
    loss_of(model).backward()
    model.up_proj.weight.grad = None
    before = model.up_proj.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.up_proj.weight, before)
    assert model.up_proj.weight not in optimizer.state


def test_a_zero_gradient_spoils_no_basis_and_only_decays() -> None:
    """As torch's distributed checkpointing does it: one step with zero gradients before anything else."""
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS, weight_decay=0.1)
    before = model.up_proj.weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = optimizer.state[model.up_proj.weight]
    assert state["step"] == 0 and not any(value.any() for value in state.values())
    torch.testing.assert_close(model.up_proj.weight.detach(), before * (1 - 1e-3 * 0.1))


def test_a_zero_gradient_at_a_refresh_keeps_the_basis_and_the_refresh_due() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **{**OPTIONS, "refresh_every": 2})
    train(model, optimizer, range(2))
    weight = model.up_proj.weight
    basis = optimizer.state[weight]["basis"].clone()
    loss_of(model).backward()
    weight.grad.zero_()
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["basis"], basis)
    train(model, optimizer, range(1))
    assert not torch.equal(optimizer.state[weight]["basis"], basis)


def test_a_zero_gradient_between_refreshes_moves_by_momentum_as_adam_does() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS, refresh_stagger=False)
    train(model, optimizer, range(2))
    before = model.up_proj.weight.detach().clone()
    model.up_proj.weight.grad.zero_()
    optimizer.step()
    assert not torch.equal(model.up_proj.weight, before)


def test_fp16_gradients_near_the_largest_number_do_not_overflow_in_the_projection() -> None:
    p = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.float16))
    optimizer = LowRankOptimizer([{"params": [p], "rank": 4}], lr=1e-3)
    for _ in range(2):
        p.grad = torch.full_like(p, 2e4)
        optimizer.step()
    assert p.isfinite().all() and p.any()


def test_bf16_weights_with_decay_are_rounded_once() -> None:
    """A norm or an embedding: decay and update in fp32, then one rounding."""
    start, grad = torch.randn(512).bfloat16(), torch.randn(512).bfloat16()
    p = torch.nn.Parameter(start.clone())
    p.grad = grad
    LowRankOptimizer([p], lr=1e-2, weight_decay=0.1).step()
    expected = (start.float() * (1 - 1e-3) - 1e-2 * grad.float() / (grad.float().abs() + 1e-8)).bfloat16()
    assert (p != expected).float().mean() < 0.01


def test_the_default_device_does_not_move_draws_or_counters() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS)
    loss_of(model).backward()
    torch.set_default_device("meta")
    try:
        optimizer.step()
    finally:
        torch.set_default_device("cpu")
    assert optimizer.state[model.self_attn.q_proj.weight]["step"].device.type == "cpu"


def test_a_misspelt_group_option_is_refused() -> None:
    with pytest.raises(TypeError, match="unknown group option 'rnak'. Did you mean 'rank'"):
        LowRankOptimizer([{"params": [torch.nn.Parameter(torch.randn(4, 4))], "rnak": 2}], lr=1e-2)


def test_a_tensor_learning_rate_is_taken_from_the_start() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    LowRankOptimizer([p], lr=torch.tensor(0.5)).step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("when", [0, 3])
def test_a_nonfinite_gradient_skips_that_weight_only(bad: float, when: int, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **{**OPTIONS, "refresh_every": 2})
    train(model, optimizer, range(when))
    optimizer.zero_grad()
    loss_of(model).backward()
    weight, other = model.up_proj.weight, model.down_proj.weight
    weight.grad[3, 5] = bad
    before, other_before = weight.detach().clone(), other.detach().clone()
    state = {k: v.clone() for k, v in optimizer.state[weight].items()}
    with caplog.at_level(logging.WARNING, logger="crosslore"):
        optimizer.step()
        optimizer.step()
    assert torch.equal(weight, before) and not torch.equal(other, other_before)
    assert all(torch.equal(optimizer.state[weight][k], v) for k, v in state.items())
    assert len(optimizer.state[weight]) == len(state)
    assert optimizer.nonfinite_skips == {"up_proj.weight": 2}
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "1 weights" in caplog.text and "up_proj.weight" in caplog.text


def test_a_closure_is_evaluated_with_gradients_and_its_loss_comes_back() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first is not None and optimizer.step(closure) < first


def test_a_scheduler_sets_the_real_learning_rate() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step >= 2 else 1.0)
    for step in range(4):
        before = model.up_proj.weight.detach().clone()
        train(model, optimizer, range(1))
        scheduler.step()
        assert torch.equal(model.up_proj.weight, before) == (step >= 2)


def test_tensor_learning_rates_work() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, **OPTIONS)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(1e-3)
    assert train(model, optimizer, range(3))


def test_added_groups_are_low_rank_if_they_have_a_rank() -> None:
    matrix, other = torch.nn.Parameter(torch.randn(8, 6)), torch.nn.Parameter(torch.randn(8, 6))
    optimizer = LowRankOptimizer([torch.nn.Parameter(torch.randn(3))], lr=1e-2)
    optimizer.add_param_group({"params": [matrix], "rank": 2})
    optimizer.add_param_group({"params": [other]})
    for p in (matrix, other):
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.state[matrix]["exp_avg"].shape == (8, 2)
    assert optimizer.state[other]["exp_avg"].shape == (8, 6)


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    optimizer = LowRankOptimizer([torch.nn.Parameter(torch.randn(3))], lr=1e-2)
    with pytest.raises(ValueError, match=r"rank must be in \[1, 6\] for a 8 x 6 matrix, got 7"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.randn(8, 6))], "rank": 7})
    with pytest.raises(ValueError, match="takes matrices"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.randn(8))], "rank": 2})
    assert len(optimizer.param_groups) == 1


def test_noncontiguous_weights_and_gradients_give_the_same_result() -> None:
    torch.manual_seed(0)
    start, grad = torch.randn(12, 10), torch.randn(12, 10)
    results = []
    for layout in (lambda x: x.clone(), lambda x: x.T.contiguous().T):
        p = torch.nn.Parameter(layout(start))
        optimizer = LowRankOptimizer(
            [{"params": [p], "rank": 3, "residual": "sparse", "residual_ratio": 0.2, "warmup_steps": 1}], lr=1e-2
        )
        for _ in range(4):
            p.grad = layout(grad)
            optimizer.step()
        results.append(p.detach().clone())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("rows", "cols", "rank"), [(1, 7, 1), (7, 1, 1), (1, 1, 1), (5, 9, 5), (9, 5, 5), (6, 6, 1)])
def test_odd_shapes_work(rows: int, cols: int, rank: int) -> None:
    p = torch.nn.Parameter(torch.randn(rows, cols))
    group = {"params": [p], "rank": rank, "residual": "sparse", "residual_ratio": 0.5, "warmup_steps": 0}
    optimizer = LowRankOptimizer([group], lr=1e-2)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    assert p.isfinite().all()


def test_sparse_gradients_are_refused() -> None:
    p = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = LowRankOptimizer([p], lr=1e-2)
    p.grad = torch.eye(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()


def test_complex_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="complex weights are not supported. Use torch.view_as_real"):
        LowRankOptimizer([torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])


def test_a_sparse_gradient_is_refused_before_anything_changes() -> None:
    weights = [torch.nn.Parameter(torch.zeros(4, 3)) for _ in range(2)]
    optimizer = LowRankOptimizer(weights, lr=1.0)
    weights[0].grad, weights[1].grad = torch.ones(4, 3), torch.eye(4, 3).to_sparse()
    with pytest.raises(RuntimeError, match=r"sparse gradients are not supported. Use nn.Embedding\(sparse=False\)"):
        optimizer.step()
    assert not weights[0].any()


def test_groups_that_a_scheduler_has_touched_make_another_optimizer() -> None:
    layer = torch.nn.Linear(4, 4)
    optimizer = LowRankOptimizer(layer.parameters(), lr=1e-3)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)
    LowRankOptimizer([dict(group) for group in optimizer.param_groups], lr=1e-3)


def test_the_warm_up_of_a_running_group_cannot_be_moved() -> None:
    """Moved past its end it would never choose positions, and all residuals would go to the first one."""
    model = tiny_decoder()
    optimizer = create_optimizer(model, **{**OPTIONS, "warmup_steps": 10})
    train(model, optimizer, range(5))
    optimizer.param_groups[0]["warmup_steps"] = 3
    with pytest.raises(ValueError, match="warmup_steps cannot change while the optimizer runs, got 3 after 10"):
        train(model, optimizer, range(1))


@pytest.mark.parametrize("foreach", [True, False])
def test_a_gradient_that_turns_bad_between_refreshes_changes_nothing(foreach: bool) -> None:
    """Found in the compact gradients, on the right and on the left side, before any state changes."""
    model = tiny_decoder()
    optimizer = create_optimizer(model, **{**OPTIONS, "refresh_every": 100}, foreach=foreach)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    loss_of(model).backward()
    names = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "down_proj.weight"]
    bad = {name: dict(model.named_parameters())[name] for name in names}
    for weight, value in zip(bad.values(), (math.inf, -math.inf, math.nan), strict=True):
        weight.grad[1, 2] = value
    before = {n: (w.detach().clone(), {k: v.clone() for k, v in optimizer.state[w].items()}) for n, w in bad.items()}
    optimizer.step()
    assert set(optimizer.nonfinite_skips) == set(names)
    for name, weight in bad.items():
        kept, state = before[name]
        assert torch.equal(weight, kept)
        assert all(torch.equal(optimizer.state[weight][key], value) for key, value in state.items())
