"""What the micro-batches of a step leave behind: compact gradients, and gradients at the kept positions."""

import math
from collections import defaultdict

import torch
from torch import Tensor

from crosslore.residuals.sparse import SparseResidual, kept_positions
from crosslore.rules.base import state_dtype
from crosslore.step import collect_sketch_
from crosslore.stepping import Pending


def norm_of(tensor: Tensor) -> float:
    """Return the norm, computed in fp32 at least; waits for the device. Not finite only if an entry is not."""
    norm = float(torch.linalg.vector_norm(tensor, dtype=state_dtype(tensor)))
    if math.isfinite(norm) or not bool(tensor.isfinite().all()):
        return norm
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))  # the squares of large entries overflow


def norms_of(tensors: list[Tensor]) -> list[float]:
    """Return the norm of each; one transfer from each device in all."""
    if len(tensors) == 1:
        return [norm_of(tensors[0])]
    found: dict[int, float] = {}
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        alike[tensor.device, tensor.dtype].append(i)
    for (_, dtype), those in alike.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        norms = torch._foreach_norm([tensors[i] for i in those], 2, dtype=wide)
        found |= zip(those, torch.stack(norms).tolist(), strict=True)
    return [found[i] if math.isfinite(found[i]) else norm_of(tensor) for i, tensor in enumerate(tensors)]


def keep_compact_parts(pending: Pending) -> None:
    """Replace the gradient by its entries at the kept positions, and collect what the warm-up of a residual needs."""
    ctx, grad = pending.ctx, pending.ctx.grad
    assert grad is not None
    ctx.kept, ctx.grad = compact_parts(pending, grad, ctx.low), None
    ctx.low = ctx.low.to(state_dtype(ctx.low))  # the sum of many is as precise as the moments
    ctx.late = True


def compact_parts(pending: Pending, grad: Tensor, low: Tensor) -> Tensor | None:
    """Return the gradient at the kept positions while the residual is active."""
    residual, ctx = pending.method.residual, pending.ctx
    if not isinstance(residual, SparseResidual):
        return None
    if residual.residual_select == "residual" and ctx.t <= max(1, residual.warmup_steps):
        residual.collect_(grad, low, ctx.basis, ctx.state, ctx.layout)
    if not residual.active(ctx.t):
        return None
    rows, cols = kept_positions(ctx.state, ctx.layout)
    return grad[rows, cols].to(ctx.state["res_avg"].dtype)


def add_gradient_(pending: Pending, whole: Tensor) -> None:
    """Add a further micro-batch to the compact parts."""
    ctx, grad = pending.ctx, pending.block.take(whole)
    low = pending.method.projector.project(grad, ctx.basis, ctx.layout)
    ctx.low += low
    kept = compact_parts(pending, grad, low)
    if kept is not None and ctx.kept is not None:
        ctx.kept += kept
    collect_sketch_(ctx, grad, low, pending.method, name=ctx.name)


def scale_(pending: Pending, factor: float) -> None:
    """Multiply what a step knows of the gradient by a factor."""
    ctx = pending.ctx
    ctx.low.mul_(factor)
    if ctx.kept is not None:
        ctx.kept.mul_(factor)
    elif ctx.grad is not None:
        ctx.grad.mul_(factor)
    if ctx.entries is not None:
        unscaled = ctx.entries
        ctx.entries = lambda rows, cols: unscaled(rows, cols) * factor
