"""Two gloo processes with half of the batch each equal one process with all of it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from crosslore import create_optimizer

STEPS, WIDTH, BATCH = 8, 16, 6
OPTIONS = {"lr": 1e-2, "rank": 3, "scale": 1.0, "residual_ratio": 0.1, "warmup_steps": 2, "refresh_every": 3}


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH)).double()


def train(model: nn.Module, rank: int, world: int) -> None:
    optimizer = create_optimizer(model, **OPTIONS, residual_targets=["0", "2"])
    torch.manual_seed(rank)  # the ranks' global generators differ, as in real runs
    for step in range(STEPS):
        data = torch.randn(2 * BATCH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(data[rank::world]) - data[rank::world].sin()).square().mean().backward()
        optimizer.step()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = make()
    train(DistributedDataParallel(model), rank, 2)
    torch.save(model.state_dict(), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_same_global_batch(tmp_path: Path) -> None:
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    alone = make()
    train(alone, 0, 1)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for name, weight in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, rtol=1e-9, atol=1e-11)
    assert not torch.equal(alone[0].weight, make()[0].weight)
