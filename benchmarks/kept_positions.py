"""Part c, too: which positions a sparse residual should keep.

Share of the energy |dG|^2 of later gradients, dG = G - G P P^T, that the kept 1.2 % of a weight's entries hold, by what
the choice was made on. SmolLM2-135M-Instruct on batches of 4 rows of E2E as in `subspace_error`; P is the exact basis
of the first batch at rank 16; the choice sees 8 batches, the share is of 6 later ones. Medians and quartiles are over
layers.

| choice | ranks positions by |
|---|---|
| moment | the first moment after the 8 batches, projected back: |P M'| (the paper) |
| residual | row sum times column sum of the accumulated |dG|^2: `residual_select="residual"` |
| whole sum | the accumulated |dG|^2 itself, which takes a matrix of the weight's size to hold |
| last step | |dG|^2 of the 8th batch alone |
| random | nothing |
| later | the later energy itself: the most that any choice could hold |
"""

import torch
from common import Options, Records, as_measured, measuring, shown
from subspace_error import collect, exact
from torch import Tensor
from tqdm import tqdm

NAME = "kept_positions"
FIGURES = ("share_median", "share_lower_quartile", "share_upper_quartile", "count")
RAW = ("weight", "rank", "ratio", "choice", "rows", *FIGURES)
KINDS = ("q_proj", "k_proj")
RATIO, BETA1 = 0.012, 0.9
SEEN, LATER = 8, 6


def run(options: Options) -> None:
    """Measure what is missing and write OUT/kept_positions.csv."""
    with measuring(NAME, RAW, options, as_measured) as records:
        measure(records, options)


def measure(records: Records, options: Options) -> None:
    """Compute the gradients once, then every kind of weight that is missing."""
    rank = options.pick(full=16, quick=16, tiny=4)
    missing = [kind for kind in KINDS if not records.select(weight=kind, rank=rank)]
    if not missing:
        return
    data, gradients, _ = collect(options, count=SEEN + LATER)
    for kind in missing:
        found: dict[str, list[float]] = {}
        layers = {layer: grads for (name, layer), grads in gradients.items() if name == kind}
        for layer, grads in tqdm(layers.items(), desc=f"{NAME}: {kind}", disable=None):
            for name, share in shares(grads, rank=rank, seed=layer).items():
                found.setdefault(name, []).append(share)
        for name, values in found.items():  # all at once: a kind that was interrupted is done again
            quartiles = torch.tensor(values).quantile(torch.tensor([0.5, 0.25, 0.75])).tolist()
            figures = dict(zip(FIGURES, (*map(shown, quartiles), len(values)), strict=True))
            records.append(weight=kind, rank=rank, ratio=RATIO, choice=name, rows=data, **figures)


def shares(grads: list[Tensor], *, rank: int, seed: int) -> dict[str, float]:
    """Return the share of the later energy that each choice holds.

    Args:
        grads: one weight's gradients, batch after batch.
        rank: of the basis.
        seed: of the random choice.
    """
    basis = exact(grads[0], rank)
    energies = [(grad - grad @ basis @ basis.mT).square() for grad in grads]
    seen, later = sum(energies[:SEEN], torch.zeros(())), sum(energies[SEEN:], torch.zeros(()))
    moment = torch.zeros(grads[0].shape[0], rank)
    for grad in grads[:SEEN]:
        moment.lerp_(grad @ basis, 1 - BETA1)
    draws = torch.Generator().manual_seed(seed)
    importance = {
        "moment": (moment @ basis.mT).abs(),
        "residual": torch.outer(seen.sum(1), seen.sum(0)),
        "whole sum": seen,
        "last step": energies[SEEN - 1],
        "random": torch.rand(later.shape, generator=draws),
        "later": later,
    }
    kept = max(1, round(RATIO * later.numel()))
    total = float(later.sum())
    return {
        name: float(later.flatten()[values.flatten().topk(kept).indices].sum()) / total
        for name, values in importance.items()
    }
