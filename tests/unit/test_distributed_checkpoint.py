"""torch.distributed.checkpoint in every way in which gradients come; presets and rules: tests/contract."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from crosslore import create_optimizer
from crosslore.factory import MODES


def start(mode: str, *, seed: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    options = {"rank": 4, "scale": 1.0, "refresh_every": 3, "residual_ratio": 0.1, "warmup_steps": 2}
    residual = {"residual_targets": ["1"], "cross_head_targets": None}
    return model, create_optimizer(model, "crosslore", lr=1e-2, gradients=mode, **options, **residual)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(11, (6,), generator=torch.Generator().manual_seed(step))
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("mode", MODES)
def test_a_fresh_optimizer_has_no_state_and_goes_on_as_the_saved_one_does(mode: str, tmp_path: Path) -> None:
    model, optimizer = start(mode, seed=0)
    train(model, optimizer, range(4))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    again, fresh = start(mode, seed=1)
    assert not fresh.state
    weights, state = get_state_dict(again, fresh)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    set_state_dict(again, fresh, model_state_dict=weights, optim_state_dict=state)
    train(model, optimizer, range(4, 9))
    train(again, fresh, range(4, 9))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
