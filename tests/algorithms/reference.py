"""The slow truth: Eq. 2-12 and Algorithms 1-2 of the CrossLore paper in float64, to be read next to it.

Orientation is the paper's: W is d_in x d_out, G has the shape of W, a basis multiplies from the left:
W, G (m, n); P (m, r) with orthonormal columns; R = P^T G, M', V', N (r, n); dM, dV, L, delta (m, n).
A head is a block of d_k columns. `LinearReference` (at the end) feeds it nn.Linear's (out, in) weights.
Nothing is sparse, nothing is fast, nothing is shared with `src/`.

Signs. A singular vector is fixed up to its sign. Flipping a column of P flips the row of R, of M' and of N, and leaves
V', P M', P N and so W as they were: until the first refresh, comparisons on W do not depend on signs. AT A REFRESH THEY
DO: M' is kept as it is while the new column may come with either sign, so two SVD routines that agree up to sign give
different W after step T + 1. To compare across a refresh, hand both sides the same basis or align the columns' signs
(`align_signs`). Equal singular values, or rank(G) < r, leave more than a sign open: hand over the basis.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["paper", "guarded", "exact"]
Eps = Literal["corrected", "uncorrected"]


def svd_basis(G: Tensor, r: int) -> Tensor:
    """Return P = U[:, :r] of G = U S V, (m, r)."""
    assert 1 <= r <= min(G.shape), f"rank {r} of a gradient {tuple(G.shape)}"
    U, _, _ = torch.linalg.svd(G.double(), full_matrices=False)
    return U[:, :r]  # Eq. 2


def cross_head_basis(G: Tensor, head_width: int, heads: int, r: int, chosen_heads: Sequence[int]) -> Tensor:
    """Return one basis P_i for all heads, from ceil(r / d_k) chosen heads' columns of G (the paper: one head)."""
    m, n = G.shape
    assert n == heads * head_width, f"{n} columns are not {heads} heads of {head_width}"
    assert len(set(chosen_heads)) == len(chosen_heads) == math.ceil(r / head_width), "draw ceil(r/d_k) heads"
    blocks = G.reshape(m, heads, head_width)  # Eq. 1: [W_1, W_2, ..., W_h]
    G_i = torch.cat([blocks[:, i] for i in chosen_heads], dim=1)  # r <= d_k: the gradient of W_i, nothing else
    return svd_basis(G_i, r)  # Eq. 3; Eq. 4 uses it on the whole G


def low_rank(P: Tensor, G: Tensor) -> Tensor:
    """Return P P^T G, the low-rank approximation of G."""
    return P @ (P.T @ G)  # Eq. 2 and 4, right-hand side


def moments(M: Tensor, V: Tensor, G: Tensor, *, b1: float, b2: float) -> tuple[Tensor, Tensor]:
    """Return both moments one step later: Eq. 6 for the gradient, Eq. 7 for R = P^T G."""
    return b1 * M + (1 - b1) * G, b2 * V + (1 - b2) * G * G  # Eq. 6, Eq. 7


def adam_update(
    M: Tensor, V: Tensor, t: int, *, b1: float, b2: float, eps: float, placement: Eps = "corrected"
) -> Tensor:
    """Return Adam's update from the moments after step t.

    Eq. 10 prints eps under the root, Eq. 12, Eq. 23-25 and Algorithm 2 beside it, as every Adam has it: beside it here.
    "uncorrected" adds eps before the bias correction of V, as galore-torch and the old transformers AdamW do.
    """
    if placement == "uncorrected":
        return math.sqrt(1 - b2**t) / (1 - b1**t) * M / (V.sqrt() + eps)
    return (M / (1 - b1**t)) / ((V / (1 - b2**t)).sqrt() + eps)  # Eq. 10


def adam_low_rank(
    R: Tensor, M: Tensor, V: Tensor, t: int, *, b1: float, b2: float, eps: float, placement: Eps = "corrected"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return N_t, M'_t, V'_t from R_t = P_t^T G_t and the moments of step t - 1."""
    M, V = moments(M, V, R, b1=b1, b2=b2)  # Eq. 7
    return adam_update(M, V, t, b1=b1, b2=b2, eps=eps, placement=placement), M, V  # Alg. 1, line 7


def moment_residuals(M: Tensor, V: Tensor, P: Tensor, M_low: Tensor, V_low: Tensor) -> tuple[Tensor, Tensor]:
    """Return the true dM_t, dV_t, of which Eq. 9 is a recursion; needs the full moments, so only tests use it."""
    return M - P @ M_low, V - P @ V_low  # Eq. 8


def reconstructed_update(
    P: Tensor, M: Tensor, V: Tensor, t: int, *, b1: float, b2: float, eps: float, floor: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return Eq. 11, eps beside the root and radicand floored. Algorithm 1 applies P N instead, and so do we."""
    return (P @ M / (1 - b1**t)) / (floor(P @ V / (1 - b2**t)).sqrt() + eps)  # Eq. 11


def row_by_column(energy: Tensor) -> Tensor:
    """Return the outer product of the row and the column sums: ours, what ranks positions for "residual"."""
    return torch.outer(energy.sum(1), energy.sum(0))


def select_positions(P: Tensor, M: Tensor, ratio: float) -> Tensor:
    """Return L as a boolean (m, n): the top share `ratio` of |P M'|."""
    return top_share((P @ M).abs(), ratio)  # Section 4.2.2, warm-up


def top_share(scores: Tensor, ratio: float) -> Tensor:
    """Return a boolean mask of the round(ratio * m * n) largest scores, at least one when ratio > 0.

    Ties go to the lower index in this orientation: do not build a comparison on them.
    """
    count = max(round(ratio * scores.numel()), 1) if ratio > 0 else 0
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().sort(descending=True, stable=True).indices[:count]] = True
    return mask.reshape(scores.shape)


def clamp_at_zero(radicand: Tensor) -> Tensor:
    """Return the radicand with its negative entries set to 0: the smallest repair that lets "paper" run."""
    return radicand.clamp(min=0)


def radicand(P: Tensor, V_low: Tensor, dV: Tensor, t: int, *, b2: float, residual_rule: Rule) -> Tensor:
    """Return what stands under the root of Algorithm 2, line 8, before any floor."""
    dV_hat = dV / (1 - b2**t)  # Alg. 2, line 7
    if residual_rule == "guarded":  # DESIGN 4.1: (P*P) V' and EMA(dG*dG) cannot be negative
        return (P * P) @ V_low / (1 - b2**t) + dV_hat
    return P @ V_low / (1 - b2**t) + dV_hat  # Alg. 2, line 8; Eq. 12, second line


def residual_step(
    G: Tensor, P: Tensor, N: Tensor, V_low: Tensor, L: Tensor, dM: Tensor, dV: Tensor, t: int, *, since: int,
    b1: float, b2: float, eps: float, residual_rule: Rule, floor: Callable[[Tensor], Tensor] = clamp_at_zero,
    placement: Eps = "corrected",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return delta_t, dM_t, dV_t: Algorithm 2 at step t.

    V_low is V'_t, of this step. `since` counts the steps since the end of warm-up, this one included; only "exact" uses
    it, and there dM and dV hold the moments of G itself at the kept positions. `placement` is for "exact" only as well:
    it subtracts two Adam updates, which must be of one kind; "paper" and "guarded" have Algorithm 2's eps.
    """
    if residual_rule == "exact":
        dM, dV = moments(dM, dV, G * L, b1=b1, b2=b2)  # Eq. 6 at the kept positions
        W_update = adam_update(dM, dV, since, b1=b1, b2=b2, eps=eps, placement=placement)  # Eq. 10
        return torch.where(L, W_update - P @ N, 0.0), dM, dV  # Eq. 12, first line; P N is what Alg. 1 applies
    G_hat = P @ (P.T @ G)  # Alg. 2, line 2
    dG = (G - G_hat) * L  # Alg. 2, line 3; Eq. 5
    dM = b1 * dM + (1 - b1) * dG  # Alg. 2, line 4; Eq. 9
    if residual_rule == "guarded":
        dV = b2 * dV + (1 - b2) * dG * dG  # DESIGN 4.1
    else:
        dV = b2 * dV + 2 * (1 - b2) * G_hat * dG  # Alg. 2, line 5; Eq. 9
    dM_hat = dM / (1 - b1**t)  # Alg. 2, line 6
    under_root = radicand(P, V_low, dV, t, b2=b2, residual_rule=residual_rule)  # Alg. 2, line 7
    root = (floor(under_root) if residual_rule == "paper" else under_root).sqrt()
    return torch.where(L, dM_hat / (root + eps), 0.0), dM, dV  # Alg. 2, lines 8-9; Eq. 12


class ReferenceCrossLore:
    """Algorithm 1 for one weight. Every attribute is plain and public: read them in tests, change `lr` for a schedule.

    `basis(G, t)` returns P for the refresh at step t, from the gradient in the paper's orientation (default: Eq. 2).
    `residual_rule=None` is GaLore. `energy` is the sum of dG * dG over the warm-up.
    """

    def __init__(
        self, W: Tensor, *, lr: float, rank: int = 0, basis: Callable[[Tensor, int], Tensor] | None = None,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, scale: float = 1.0,
        refresh_every: int = 200, residual_rule: Rule | None = None, residual_ratio: float = 0.0,
        residual_select: Literal["moment", "residual"] = "moment", warmup_steps: int = 0, placement: Eps = "corrected",
        decay: Literal["before", "after"] = "before", floor: Callable[[Tensor], Tensor] = clamp_at_zero,
    ) -> None:  # fmt: skip
        self.W = W.detach().double().clone()
        self.basis = basis if basis is not None else lambda G, t: svd_basis(G, rank)
        self.lr, self.weight_decay, self.scale = lr, weight_decay, scale
        (self.b1, self.b2), self.eps, self.placement = betas, eps, placement
        self.refresh_every, self.decay, self.floor = refresh_every, decay, floor
        self.residual_rule, self.residual_ratio, self.residual_select = residual_rule, residual_ratio, residual_select
        self.k = warmup_steps
        self.t = 0
        self.P: Tensor | None = None
        self.M: Tensor | None = None  # M', (r, n)
        self.V: Tensor | None = None  # V', (r, n)
        self.N: Tensor | None = None
        self.L: Tensor | None = None  # set at the end of the warm-up and never again
        self.dM, self.dV, self.delta, self.energy = (torch.zeros_like(self.W) for _ in range(4))

    def step(self, G: Tensor) -> Tensor:
        """Return W after one step with gradient G (m, n)."""
        G, self.t = G.detach().double(), self.t + 1
        t, adam = self.t, {"b1": self.b1, "b2": self.b2, "eps": self.eps, "placement": self.placement}
        if (t - 1) % self.refresh_every == 0:  # t = 1, T+1, 2T+1, ...; no moment is touched
            self.P = self.basis(G, t).detach().double().clone()  # Alg. 1, line 5; Eq. 2-4
        P = self.P
        R = P.T @ G  # Alg. 1, line 5
        if self.M is None:
            self.M, self.V = torch.zeros_like(R), torch.zeros_like(R)
        self.N, self.M, self.V = adam_low_rank(R, self.M, self.V, t, **adam)  # Alg. 1, line 7; Eq. 7
        self._select(G, t)
        self.delta = torch.zeros_like(self.W)  # "During the warm-up stage, the residuals are set to 0"
        if self.residual_rule is not None and t > self.k:
            self.delta, self.dM, self.dV = residual_step(  # Alg. 1, line 9; Alg. 2
                G, P, self.N, self.V, self.L, self.dM, self.dV, t,
                since=t - self.k, residual_rule=self.residual_rule, floor=self.floor, **adam,
            )  # fmt: skip
        update = self.scale * (P @ self.N + self.delta)  # Alg. 1, line 11; alpha on both, DESIGN 4.4
        if self.decay == "before":  # AdamW, torch.optim
            self.W = (1 - self.lr * self.weight_decay) * self.W - self.lr * update  # Alg. 1, line 12
        else:  # galore-torch, old transformers
            self.W = self.W - self.lr * update
            self.W = self.W - self.lr * self.weight_decay * self.W
        return self.W

    def _select(self, G: Tensor, t: int) -> None:
        """Record L once, at the end of step t = k (k = 0: in step 1, before its residual). Section 4.2.2."""
        if self.residual_rule is None or self.L is not None:
            return
        self.energy = self.energy + (G - low_rank(self.P, G)) ** 2  # k = 0: of step 1 alone
        if t == max(self.k, 1):
            if self.residual_select == "moment":
                self.L = select_positions(self.P, self.M, self.residual_ratio)
            else:  # DESIGN 4.2
                self.L = top_share(row_by_column(self.energy), self.residual_ratio)


class LinearReference:
    """ReferenceCrossLore for an nn.Linear weight (out, in): side "right" works on the transpose, "left" as it is.

    P needs no transposing: it is (in, r) for "right" and (out, r) for "left", as in `state["basis"]`. The callable
    `basis(G, t)` still gets the gradient in the paper's orientation, so `cross_head_basis` fits it for "right".
    """

    def __init__(self, weight: Tensor, *, side: Literal["left", "right"], **options: object) -> None:
        self.side = side
        self.paper = ReferenceCrossLore(self.turn(weight), **options)

    def turn(self, x: Tensor) -> Tensor:
        """Return x in the other orientation (its own inverse): for W, G, L, dM, dV, delta, and for R, N, M', V'."""
        return x.T if self.side == "right" else x

    def step(self, grad: Tensor) -> Tensor:
        """Return the weight (out, in) in float64 after one step."""
        return self.turn(self.paper.step(self.turn(grad)))

    @property
    def kept(self) -> Tensor | None:
        """The kept positions as a boolean (out, in), None before they are chosen."""
        return None if self.paper.L is None else self.turn(self.paper.L)


def align_signs(P: Tensor, like: Tensor) -> Tensor:
    """Return P with each column's sign chosen to agree with `like`'s: see "Signs" above."""
    return torch.where((P * like.to(P.dtype)).sum(dim=0) < 0, -P, P)
