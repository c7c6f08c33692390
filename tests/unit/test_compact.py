"""Compact gradients: the same method as with whole gradients, which are not formed between refreshes."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from crosslore import create_optimizer
from crosslore.compact.factors import GradientFactors
from crosslore.compact.linear import CompactLinear
from crosslore.layout import MatrixLayout

transformers = pytest.importorskip("transformers", reason="needs transformers")

# One unit in the last place may flip the sign of a singular vector. Moments that are rotated into the new basis do not
# feel that; kept ones do, so where they are kept two runs are compared step by step (`in_lockstep`).
OPTIONS = {"lr": 1e-3, "rank": 8, "scale": 1.0, "refresh_every": 7, "warmup_steps": 5, "residual_ratio": 0.05}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "crosslore": ("crosslore", {}),
    "crosslore-no-warmup": ("crosslore", {"warmup_steps": 0}),
    "crosslore-exact": ("crosslore", {"residual_rule": "exact"}),
    "crosslore-exact-no-warmup": ("crosslore", {"residual_rule": "exact", "warmup_steps": 0}),
    "crosslore-select": ("crosslore", {"residual_select": "residual"}),
    "crosslore-all": ("crosslore", {"residual_targets": None}),
    "crosslore-own-bases": ("crosslore", {"cross_head_targets": None}),
    "crosslore-8bit": ("crosslore", {"rule": "adamw8bit"}),
    "crosslore-adafactor": ("crosslore", {"rule": "adafactor"}),
    "crosslore-sgd": ("crosslore", {"rule": "sgd"}),
    "plus": ("crosslore_plus", {}),
    "plus-window": ("crosslore_plus", {"fit_window": 3}),
    "plus-reset": ("crosslore_plus", {"moments": "reset"}),
    "plus-power": ("crosslore_plus", {"projector": "power"}),
    "plus-decay": ("crosslore_plus", {"weight_decay": 0.1}),
    "plus-lowrank-embeddings": ("crosslore_plus", {"embeddings": "lowrank"}),
    "galore": ("galore", {}),
    "golore": ("golore", {"random_after": 10}),
}  # fmt: skip


def options_of(method: str) -> tuple[str, dict[str, Any]]:
    preset, more = METHODS[method]
    options = {"moments": "rotate", **OPTIONS, **more}
    if preset != "crosslore":
        options = {key: value for key, value in options.items() if key not in ("warmup_steps", "residual_ratio")}
    return preset, options


def llama(*, dtype: torch.dtype = torch.float64, **config: Any) -> nn.Module:
    """A Llama of two layers with grouped queries."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
             "num_key_value_heads": 4, "max_position_embeddings": 64, "vocab_size": 97}  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **config}))
    return model.to(dtype).train()


def loss_of(model: nn.Module, batch: int, *, rows: int = 2, length: int = 12) -> torch.Tensor:
    ids = torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(batch))
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range, *, parts: int = 1, **size: int) -> None:
    for step in steps:
        optimizer.zero_grad()
        for part in range(parts):
            (loss_of(model, parts * step + part, **size) / parts).backward()
        optimizer.step()


def both(method: str, *, parts: int = 1, steps: int = 50, checkpointing: bool | None = None, **more: Any) -> float:
    """Return the largest relative difference of a weight after training with whole and with compact gradients."""
    ends = []
    dtype = more.pop("dtype", torch.float64)
    size = more.pop("size", {})
    preset, options = options_of(method)
    for gradients in ("full", "compact"):
        model = llama(dtype=dtype)
        if checkpointing is not None:
            model.config.use_cache = False
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        compact = {"gradients": "compact", "accumulation_steps": parts} if gradients == "compact" else {}
        train(create_optimizer(model, preset, **options, **more, **compact), model, range(steps), parts=parts, **size)
        ends.append([p.detach() for p in model.parameters()])
    return max(float((a - b).norm() / a.norm()) for a, b in zip(*ends, strict=True))


# The same method


@pytest.mark.parametrize("method", METHODS)
def test_compact_equals_full_across_refreshes(method: str) -> None:
    assert both(method) < 1e-9


@pytest.mark.parametrize("method", ["crosslore", "crosslore-no-warmup", "crosslore-select", "plus-window"])
@pytest.mark.parametrize("parts", [2, 4])
def test_compact_equals_full_with_accumulation(method: str, parts: int) -> None:
    # The sum of four products and the product of all their tokens differ by a rounding error, which the fit of a basis
    # multiplies by the inverse of a gap between singular values: 9e-9 on one processor, 2e-14 on another.
    assert both(method, parts=parts, steps=20) < 1e-7


@pytest.mark.parametrize("reentrant", [False, True])
def test_compact_equals_full_under_gradient_checkpointing(reentrant: bool) -> None:
    assert both("crosslore", parts=2, steps=20, checkpointing=reentrant) < 1e-9


@pytest.mark.parametrize("method", ["crosslore", "crosslore-exact", "plus"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_compact_equals_full_in_fp32(method: str, parts: int) -> None:
    # Batches of 96 tokens: gradients of full rank, whose bases one rounding error does not turn.
    assert both(method, parts=parts, dtype=torch.float32, size={"rows": 4, "length": 24}) < 1e-5


def in_lockstep(method: str, *, steps: int) -> float:
    """Return the largest relative difference of a weight's update when both start every step from the same state."""
    preset, options = options_of(method)
    options["moments"] = "keep"
    models = [llama(dtype=torch.float32) for _ in range(2)]
    whole = create_optimizer(models[0], preset, **options)
    compact = create_optimizer(models[1], preset, **options, gradients="compact")
    worst = 0.0
    for step in range(steps):
        if step:
            models[1].load_state_dict(models[0].state_dict())
            compact.load_state_dict(copy.deepcopy(whole.state_dict()))
        before = [p.detach().clone() for p in models[0].parameters()]
        for optimizer, model in zip((whole, compact), models, strict=True):
            train(optimizer, model, range(step, step + 1))
        for old, a, b in zip(before, *(model.parameters() for model in models), strict=True):
            worst = max(worst, float((a - b).norm() / (a - old).norm()))
    return worst


@pytest.mark.parametrize("method", ["crosslore", "crosslore-no-warmup", "crosslore-select", "plus-window", "galore"])
def test_every_step_equals_that_of_whole_gradients_with_kept_moments(method: str) -> None:
    # Without accumulation the gradient of a refresh is the same product, bit for bit, and so is its basis.
    assert in_lockstep(method, steps=22) < 1e-4


def test_foreach_equals_the_loop() -> None:
    assert both("crosslore", foreach=True, steps=20) < 1e-9


# What is not there


@pytest.mark.parametrize("method", ["crosslore", "plus"])
def test_no_whole_gradient_is_left_and_none_is_formed_between_refreshes(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    preset, options = options_of(method)
    optimizer = create_optimizer(model, preset, **{**options, "refresh_every": 100}, gradients="compact")
    formed: list[tuple[int, ...]] = []
    dense = GradientFactors.dense

    def counted(self: GradientFactors) -> torch.Tensor:
        formed.append(tuple(self.outputs.shape))
        return dense(self)

    monkeypatch.setattr(GradientFactors, "dense", counted)
    for step in range(7):
        formed.clear()
        loss_of(model, step).backward()
        names = [name for name, p in model.named_parameters() if p.grad is not None]
        assert not any(name.split(".")[-2] in LINEAR for name in names)
        assert any("embed_tokens" in name for name in names) and any("norm" in name for name in names)
        optimizer.step()
        optimizer.zero_grad()
        # The first step fits 14 bases; later ones those whose turn it is, of 14 in 100 steps.
        assert len(formed) == 14 if step == 0 else len(formed) <= 1


def test_forward_is_that_of_an_ordinary_layer() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    x = torch.randn(3, 5, 32)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = layer(x)
    create_optimizer(nn.Sequential(layer), "crosslore_plus", lr=1e-3, rank=4, gradients="compact")
    assert isinstance(layer, CompactLinear)
    assert torch.equal(layer(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), rounded)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("frozen_input", [True, False])
def test_gradients_of_inputs_and_biases_are_those_of_an_ordinary_layer(
    bias: bool, autocast: bool, frozen_input: bool
) -> None:
    grads = []
    for compact in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 16, bias=bias))
        options = {"gradients": "compact"} if compact else {}
        optimizer = create_optimizer(
            model, "crosslore_plus", lr=1e-3, rank=4, **options
        )  # held: without it all is ordinary
        x = torch.randn(3, 5, 32, requires_grad=not frozen_input)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model(x).square().sum().backward()
        assert (model[0].weight.grad is None) == compact == (optimizer.compact is not None)
        grads.append([t.grad for t in (x, model[0].bias) if t is not None])
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-2 if autocast else 1e-6, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_factors_stand_for_the_gradient(side: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = (torch.randn(1, 4, n, generator=generator, dtype=torch.float64) for n in (12, 7))
    factors = GradientFactors.of(outputs, inputs)
    dense = torch.einsum("bto,bti->oi", outputs, inputs)
    torch.testing.assert_close(factors.dense(), dense)
    layout = MatrixLayout(rows=12, cols=7, rank=3, side=side)
    basis = torch.randn(layout.basis_shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(factors.project(basis, layout), basis.mT @ dense if side == "left" else dense @ basis)
    rows, cols = torch.tensor([0, 11, 3]), torch.tensor([6, 0, 3])
    torch.testing.assert_close(factors.entries(rows, cols), dense[rows, cols])
    torch.testing.assert_close(factors.joined(factors).dense(), 2 * dense)
    assert not factors.larger_than_dense and factors.joined(factors).larger_than_dense


# Clipping, loss scale, broken gradients


def test_clipping_is_by_the_global_norm_of_what_is_applied() -> None:
    model = llama()
    preset, options = options_of("plus")
    optimizer = create_optimizer(model, preset, **{**options, "rule": "sgd"}, gradients="compact", max_grad_norm=0.01)
    train(optimizer, model, range(3))
    loss_of(model, 3).backward()
    assert optimizer.compact is not None
    norm = optimizer.compact.grad_norm()
    lows = [pending.ctx.low for held in optimizer.compact._held.values() for pending in held.pendings]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(lows) == 14
    expected = torch.stack([t.norm() for t in [*lows, *grads]]).norm()
    assert norm == pytest.approx(float(expected))
    kept = [t.clone() for t in lows]
    optimizer.step()
    for before, after in zip(kept, lows, strict=True):
        torch.testing.assert_close(after, before * (0.01 / (norm + 1e-6)))
    optimizer.zero_grad()
    assert optimizer.compact.grad_norm() == pytest.approx(norm)  # of the last step, before clipping


def test_a_large_limit_clips_nothing() -> None:
    assert both("plus", steps=10) < 1e-9
    ends = []
    for limit in (None, 1e9):
        model = llama()
        preset, options = options_of("plus")
        train(create_optimizer(model, preset, **options, gradients="compact", max_grad_norm=limit), model, range(10))
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_loss_scaling_is_undone_and_an_overflow_skips_the_step() -> None:
    ends = []
    for scaled in (False, True):
        model = llama()
        preset, options = options_of("crosslore")
        optimizer = create_optimizer(model, preset, **{**options, "eps": 1e-2}, gradients="compact", max_grad_norm=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled, growth_interval=3)
        for step in range(9):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
        if scaled:
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            scaler.scale(loss_of(model, 9) * torch.tensor(float("inf"))).backward()
            scaler.step(optimizer)
            scaler.update()
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        ends.append([p.detach() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_unscaling_before_the_step_is_refused() -> None:
    model = llama()
    optimizer = create_optimizer(model, "crosslore_plus", lr=1e-3, rank=8, gradients="compact")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="GradScaler.unscale_ was called, but compact gradients"):
        scaler.step(optimizer)


@pytest.mark.parametrize("step", [0, 3])
def test_a_gradient_that_is_not_finite_skips_its_weight(step: int, caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    optimizer = create_optimizer(model, "crosslore", **OPTIONS, gradients="compact")
    train(optimizer, model, range(step))
    weight = model.model.layers[1].mlp.down_proj.weight
    before = weight.detach().clone()
    optimizer.zero_grad()
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, i, o: o * float("nan"))
    loss_of(model, step).backward()
    handle.remove()
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.nonfinite_skips["model.layers.1.mlp.down_proj.weight"] == 1
    train(optimizer, model, range(step + 1, step + 3))
    assert not torch.equal(weight, before) and bool(weight.isfinite().all())
