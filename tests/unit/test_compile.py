"""Compiled steps: the same numbers to rounding, a few compilations for all shapes and steps."""

import pytest
import torch
import torch.utils.cpp_extension  # early: after other tests, Inductor's own import of it (setuptools) has failed
from torch._dynamo.testing import CompileCounter

from crosslore import LowRankOptimizer, create_optimizer
from crosslore.compiled import compiled_step, ordinary_step_

from .models import tiny_decoder, train

OPTIONS = {"lr": 1e-3, "rank": 4, "scale": 2.0, "refresh_every": 8, "weight_decay": 0.1}
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    compiled_step.cache_clear()


@pytest.mark.parametrize("preset", ["galore", "crosslore", "crosslore_plus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_steps_equal_the_loop(preset: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph without inductor, which only reorders the arithmetic: its own test is below."""
    counter = CompileCounter()
    compiled = torch.compile(ordinary_step_, fullgraph=True, dynamic=True, backend=counter)
    monkeypatch.setattr("crosslore.stepping.compiled_step", lambda: compiled)
    models = [tiny_decoder().to(dtype) for _ in range(2)]
    for model, flag in zip(models, (True, False), strict=True):
        optimizer = create_optimizer(model, preset, **OPTIONS, compile=flag)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
        for step in range(12):
            train(model, optimizer, range(step, step + 1))
            scheduler.step()
    # Of six weights, twelve steps and twelve learning rates; by side and squares. Only crosslore_plus compiles a
    # wide matrix on the right, the key's.
    assert 1 <= counter.frame_count <= 4 + (preset == "crosslore_plus")
    tolerance = 1e-5 if dtype == torch.float32 else 5 * 1.6e-2
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_inductors_graph_equals_the_loop() -> None:
    models = [tiny_decoder() for _ in range(2)]
    for model, flag in zip(models, (True, False), strict=True):
        train(model, create_optimizer(model, "galore", **OPTIONS, targets=("up_proj",), compile=flag), range(8))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compiling_the_step_itself_changes_nothing() -> None:
    models = [tiny_decoder() for _ in range(2)]
    optimizers = [create_optimizer(model, **OPTIONS) for model in models]
    optimizers[0].step = torch.compile(optimizers[0].step)
    losses = [train(model, optimizer, range(7)) for model, optimizer in zip(models, optimizers, strict=True)]
    assert losses[0] == losses[1]


def test_more_kinds_of_weights_than_the_compiler_keeps_graphs_for_still_train() -> None:
    """Beyond dynamo's limit of graphs the function runs as it is."""
    for dtype in (torch.float32, torch.bfloat16):
        for rank in (1, 4):
            for basis in ("weight", "float32"):
                model = tiny_decoder().to(dtype)
                compiled = torch.compile(ordinary_step_, dynamic=True, backend="eager")
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("crosslore.stepping.compiled_step", lambda c=compiled: c)
                    options = {**OPTIONS, "rank": rank, "basis_dtype": basis}
                    optimizer = create_optimizer(model, "galore", **options, compile=True)
                    losses = train(model, optimizer, range(4))
                assert all(loss == loss for loss in losses)


def test_the_compiled_decay_of_bf16_weights_is_as_precise_as_the_loops() -> None:
    """lr * weight_decay below bf16's spacing at 1: 100 steps of the decay alone."""
    ends = []
    for flag in (True, False):
        weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 64 * 64).view(64, 64).bfloat16())
        group = {"params": [weight], "rank": 4, "refresh_every": 1000}
        optimizer = LowRankOptimizer([group], lr=3e-3, weight_decay=1.0, compile=flag)
        for step in range(100):
            weight.grad = torch.full_like(weight, 1e-30) if step else torch.randn(64, 64).bfloat16()
            optimizer.param_groups[0]["scale"] = 1e-9
            optimizer.step()
        ends.append(float(weight.detach().double().mean()))
    assert ends[0] == pytest.approx(ends[1], rel=0.01)
