"""The slow truth of the neighbours, in float64: LDAdam, Fira, APOLLO, GoLore, Flora and GaLore-Adafactor.

Written from the update rules in the design notes (PEERS B1-B4, B7, B10), not from the packages and not from `src/`.

Each function takes `weight0` (m, n), `grads` (a list of (m, n)) and hyper-parameters, and returns two things: the
weights after each step, and the state after the last one. Steps count from t = 1; the basis is refreshed at t = 1,
1 + T, 1 + 2T, ... with T = `every`, unless the function says otherwise. `basis_at(number)`, number = 0, 1, 2, ..., is
the basis of that refresh, (d, r) with d = m on the left side and d = n on the right: hand in the draws of what is
compared. Where it is optional and absent, the basis is the truncated SVD of that step's gradient. A singular vector is
fixed up to its sign, and a method that keeps M over a refresh depends on that sign from step T + 1 on (`fira`): hand
over the basis there. `ldadam` and `golore` carry M over to the new basis and do not depend on it, `galore_adafactor`
has no M.

The bodies are written in left form (R = P^T G); a weight projected from the right comes in transposed. In the returned
state only "basis" keeps its shape (d, r); the rest is turned back: compact ones are (r, n) left and (m, r) right.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .reference import moments, svd_basis

BasisAt = Callable[[int], Tensor]
Run = tuple[list[Tensor], dict[str, Tensor]]


def in_left_form(*, square: Literal["left", "right"]) -> Callable[[Callable[..., Run]], Callable[..., Run]]:
    """Return a decorator that transposes m > n (and squares, where they are projected from the right)."""

    def decorate(method: Callable[..., Run]) -> Callable[..., Run]:
        @functools.wraps(method)
        def turned(weight0: Tensor, grads: list[Tensor], **options: object) -> Run:
            m, n = weight0.shape
            if m < n or (m == n and square == "left"):
                return method(weight0, grads, **options)
            path, state = method(weight0.T, [G.T for G in grads], **options)
            return [W.T for W in path], {name: x if name == "basis" else x.T for name, x in state.items()}

        return turned

    return decorate


def basis_of(G: Tensor, rank: int, number: int, basis_at: BasisAt | None) -> Tensor:
    """Return the basis of refresh `number`, (m, rank): handed over, else the left singular vectors of G."""
    P = svd_basis(G, rank) if basis_at is None else basis_at(number)
    assert P.shape == (G.shape[0], rank), f"basis {tuple(P.shape)} for rank {rank} of a gradient {tuple(G.shape)}"
    return P


def limit_growth(S: Tensor, previous: Tensor | None) -> Tensor:
    """Return S with its norm at most 1.01 times the norm of the step before (Fira's limiter; none at t = 1)."""
    if previous is None:
        return S
    return S * 1.01 / max(S.norm() / (previous + 1e-8), 1.01)


def factored_v(row: Tensor, col: Tensor, G: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return Adafactor's row and column averages after step t and the V they stand for: eps1 1e-30, decay rate -0.8."""
    b2 = 1 - t**-0.8  # 0 at t = 1
    row = b2 * row + (1 - b2) * (G * G + 1e-30).mean(dim=1)
    col = b2 * col + (1 - b2) * (G * G + 1e-30).mean(dim=0)
    return row, col, torch.outer(row, col) / row.mean()


def clip_rms(U: Tensor, threshold: float) -> Tensor:
    """Return U with its root mean square at most `threshold` (Adafactor)."""
    return U / max(U.pow(2).mean().sqrt() / threshold, 1.0)


@in_left_form(square="left")
def ldadam(
    weight0: Tensor, grads: list[Tensor], *, rank: int, lr: float, betas: tuple[float, float] = (0.908, 0.99),
    rho: float = 0.908, eps: float = 1e-8, weight_decay: float = 0.0, error_feedback: bool = True,
) -> Run:  # fmt: skip
    """Return LDAdam's path: a new basis each step, both moments carried over to it, the error fed back. Decay first.

    Source: PEERS B2 (IST-DASLab/LDAdam at f3c5daf; arXiv 2410.16103). Square matrices go LEFT, unlike all others here.
    The package keeps E in p.grad: `model.zero_grad()` wipes it (then it equals error_feedback=False) and clipping the
    gradient clips it too. The two-sided form and the rotation of V in our seed paper are not what the package does.
    """
    W, path, (b1, b2) = weight0, [], betas
    M = V = torch.zeros(rank, W.shape[1], dtype=W.dtype)
    E = torch.zeros_like(W)
    for k, G in enumerate(grads):  # k = t - 1 steps are done
        A = G + E
        if k == 0:
            P = P_old = svd_basis(A, rank)  # M = 0: what P_old is does not matter
        else:
            P_old = P
            B = rho * P_old @ M / (1 - b1**k) + (1 - rho) * A
            P = torch.linalg.qr(B @ (B.T @ P_old)).Q  # one block power step
        C = P.T @ P_old
        R, M_turned = P.T @ A, C @ M
        if error_feedback:
            E = A - P @ R + b1 / (1 - b1) * (P_old @ M - P @ M_turned)
        if k > 0:
            c1, c2 = 1 - b1**k, 1 - b2**k
            V = (c2 * (C**2 @ (V / c2 - (M / c1) ** 2) + (M_turned / c1) ** 2)).abs()
        M, V = moments(M_turned, V, R, b1=b1, b2=b2)
        N = (M / (1 - b1 ** (k + 1))) / ((V / (1 - b2 ** (k + 1))).sqrt() + eps)
        W = (1 - lr * weight_decay) * W - lr * P @ N
        path.append(W)
    return path, {"basis": P, "exp_avg": M, "exp_avg_sq": V, "error": E}


@in_left_form(square="right")
def fira(
    weight0: Tensor, grads: list[Tensor], *, rank: int, lr: float, scale: float, every: int,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0,
    basis_at: BasisAt | None = None,
) -> Run:  # fmt: skip
    """Return Fira's path: GaLore plus what the projection leaves out, scaled per column of the left form. Decay after.

    Source: PEERS B3 (fira 1.0.2; arXiv 2410.01623). The package subtracts scale * P P^T G, where the paper subtracts
    P P^T G, so the residual is orthogonal to the basis for scale 1 only: here as in the package. phi divides by N and R
    without bias correction; the limiter's norms come without it as well. M and V are kept at a refresh.
    """
    W, path, (b1, b2), previous = weight0, [], betas, None
    M = V = torch.zeros(rank, W.shape[1], dtype=W.dtype)
    for t, G in enumerate(grads, start=1):
        if (t - 1) % every == 0:
            P = basis_of(G, rank, (t - 1) // every, basis_at)
        R = P.T @ G
        M, V = moments(M, V, R, b1=b1, b2=b2)
        N = M / (V.sqrt() + eps)
        phi = N.norm(dim=0) / (R.norm(dim=0) + 1e-8)
        S = limit_growth((G - scale * P @ R) * phi, previous)
        previous = S.norm()
        W = W - lr * math.sqrt(1 - b2**t) / (1 - b1**t) * (scale * P @ N + S)
        W = W - lr * weight_decay * W
        path.append(W)
    return path, {"basis": P, "exp_avg": M, "exp_avg_sq": V, "residual": S}


@in_left_form(square="right")
def apollo(
    weight0: Tensor, grads: list[Tensor], *, rank: int, lr: float, scale: float, every: int, basis_at: BasisAt,
    granularity: Literal["channel", "tensor"] = "channel", betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6, weight_decay: float = 0.0,
) -> Run:  # fmt: skip
    """Return APOLLO's path: the gradient itself, scaled by |N| / |R| of the compact one, times sqrt(scale).

    Source: PEERS B4 (apollo-torch 1.0.3, scale_front=False; arXiv 2412.05270). A basis is a Gaussian draw / sqrt(rank),
    not orthonormal. The limiter comes before sqrt(scale), the decay after the update; M and V are kept at a refresh.
    LLaMA-Factory's `apollo_scale_front` never reaches the class, which reads an attribute and not the group.
    pytorch_optimizer's APOLLO is another algorithm (an update of low rank).
    """
    W, path, (b1, b2), previous = weight0, [], betas, None
    M = V = torch.zeros(rank, W.shape[1], dtype=W.dtype)
    for t, G in enumerate(grads, start=1):
        if (t - 1) % every == 0:
            P = basis_of(G, rank, (t - 1) // every, basis_at)
        R = P.T @ G
        M, V = moments(M, V, R, b1=b1, b2=b2)
        N = M / (V.sqrt() + eps)
        if granularity == "channel":
            phi = N.norm(dim=0) / (R.norm(dim=0) + 1e-8)
        else:
            phi = N.norm() / (R.norm() + 1e-8)
        S = limit_growth(G * phi, previous)
        previous = S.norm()
        W = W - lr * math.sqrt(1 - b2**t) / (1 - b1**t) * math.sqrt(scale) * S
        W = W - lr * weight_decay * W
        path.append(W)
    return path, {"basis": P, "exp_avg": M, "exp_avg_sq": V}


@in_left_form(square="right")
def golore(
    weight0: Tensor, grads: list[Tensor], *, rank: int, lr: float, scale: float, every: int, random_after: int,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0,
    basis_at: BasisAt | None = None,
) -> Run:  # fmt: skip
    """Return GoLore's path as intended: GaLore, M carried over to each new basis, random ones late. Decay after.

    A refresh at t <= random_after takes the SVD of G. At t > random_after it takes `basis_at(number)`, a Gaussian Z or
    a finished P, and makes P = Z (Z^T Z)^{-1/2} of it, which leaves a finished one as it is; random_after=0 takes all
    of them from there. V is kept.

    Source: PEERS B10 (pkumelon/GoLore; arXiv 2410.11289). The package's bug is NOT here: there the rotated M is a local
    variable, used for that one step and lost with that step's gradient, so its state M misses a step per refresh.
    PEERS gives "random from step rand_epoch on"; with a counter from 0, as GaLore's, random_after = rand_epoch.
    """
    W, path, (b1, b2), P = weight0, [], betas, None
    M = V = torch.zeros(rank, W.shape[1], dtype=W.dtype)
    for t, G in enumerate(grads, start=1):
        if (t - 1) % every == 0:
            Z = basis_of(G, rank, (t - 1) // every, basis_at if t > random_after else None)
            U, _, Vh = torch.linalg.svd(Z, full_matrices=False)
            P_old, P = P, U @ Vh  # Z (Z^T Z)^(-1/2), without squaring Z's condition
            M = M if P_old is None else P.T @ P_old @ M
        R = P.T @ G
        M, V = moments(M, V, R, b1=b1, b2=b2)
        N = M / (V.sqrt() + eps)
        W = W - lr * math.sqrt(1 - b2**t) / (1 - b1**t) * scale * P @ N
        W = W - lr * weight_decay * W
        path.append(W)
    return path, {"basis": P, "exp_avg": M, "exp_avg_sq": V}


@in_left_form(square="right")
def flora(
    weight0: Tensor, grads: list[Tensor], *, rank: int, lr: float, every: int, beta1: float, basis_at: BasisAt,
    weight_decay: float = 0.0, clip_threshold: float = 1.0,
) -> Run:  # fmt: skip
    """Return Flora's path: Adafactor on the whole gradient, its momentum kept compact. Decay before, with the same lr.

    Basis 0 serves until t = T: then, after that step's update is formed and before its momentum is added, M moves to
    basis 1, and so on at 2T, 3T. A basis is a Gaussian draw / sqrt(rank), not orthonormal: moving M is no rotation.

    Source: PEERS B7 (flora-opt 0.0.3; arXiv 2402.03293) with scale_parameter=False, relative_step=False, beta1 given.
    In the package beta1 defaults to None: no momentum, no projection, plain Adafactor. It projects the momentum only
    where max(m, n) <= 4 min(m, n) and min(m, n) >= rank; here always.
    """
    W, path, P = weight0, [], basis_of(weight0, rank, 0, basis_at)
    M = torch.zeros(rank, W.shape[1], dtype=W.dtype)
    row, col = torch.zeros_like(W[:, 0]), torch.zeros_like(W[0])
    for t, G in enumerate(grads, start=1):
        row, col, V = factored_v(row, col, G, t)
        U = G / V.sqrt()
        update = clip_rms((1 - beta1) * U + beta1 * P @ M, clip_threshold)
        if t % every == 0:
            P_old, P = P, basis_of(G, rank, t // every, basis_at)
            M = P.T @ P_old @ M
        M = beta1 * M + (1 - beta1) * P.T @ U
        W = (1 - lr * weight_decay) * W - lr * update
        path.append(W)
    return path, {"basis": P, "exp_avg": M, "exp_avg_sq": V}


@in_left_form(square="right")
def galore_adafactor(
    weight0: Tensor, grads: list[Tensor], *, rank: int, lr: float, scale: float, every: int,
    weight_decay: float = 0.0, clip_threshold: float = 1.0, basis_at: BasisAt | None = None,
) -> Run:  # fmt: skip
    """Return GaLore-Adafactor's path: Adafactor without momentum on R, then back times scale. Decay before, same lr.

    Source: PEERS B1, "Adafactor" (galore-torch 1.0 with scale_parameter=False, relative_step=False, beta1=None). The
    clip is on the compact update, before scale. The averages are kept at a refresh, whatever basis they were made in.
    """
    W, path = weight0, []
    row, col = torch.zeros(rank, dtype=W.dtype), torch.zeros(W.shape[1], dtype=W.dtype)
    for t, G in enumerate(grads, start=1):
        if (t - 1) % every == 0:
            P = basis_of(G, rank, (t - 1) // every, basis_at)
        R = P.T @ G
        row, col, V = factored_v(row, col, R, t)
        N = clip_rms(R / V.sqrt(), clip_threshold)
        W = (1 - lr * weight_decay) * W - lr * scale * P @ N
        path.append(W)
    return path, {"basis": P, "exp_avg_sq": V}
