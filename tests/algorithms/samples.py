"""Seeded float64 samples and comparisons for the tests of the reference and of what is held against it."""

import torch
from torch import Tensor

SHAPES = [(24, 40), (40, 24), (32, 32)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(m: int, r: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(m, r, seed=seed)).Q


def gradients(m: int, n: int, steps: int) -> list[Tensor]:
    """Gradients with something in common, as real ones have, so that the moments do not average to nothing."""
    common = normal(m, 3, seed=90) @ normal(3, n, seed=91)
    return [common + normal(m, n, seed=100 + t) for t in range(steps)]


def torch_adamw(weight: Tensor, grads: list[Tensor], **options: float) -> list[Tensor]:
    """Return the weight after each step of torch.optim.AdamW."""
    p = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([p], **options)
    path = []
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        path.append(p.detach().clone())
    return path


def assert_close(actual: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
