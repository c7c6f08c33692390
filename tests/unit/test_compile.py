"""Compiled steps: the same numbers to rounding, a few compilations for all shapes and steps."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from crosslore import create_optimizer
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
    assert 1 <= counter.frame_count <= 4  # of six weights, twelve steps and twelve learning rates; by side and squares
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
