"""Part c: what a basis misses of a real gradient, |G - G P P^T| / |G| (the paper's Figure 2b), now and later.

SmolLM2-135M-Instruct on batches of 4 rows of E2E; the weights stay as they are, so that a later batch differs by its
rows alone (at the paper's learning rate of 1e-6 the weights hardly move). Every basis is fitted at the same batches
and evaluated on the batch it was fitted on (lag 0) and on later ones that it has not seen, which is how a basis is
used for 199 of 200 steps. Medians and quartiles are over layers and fits.

| basis | fitted to |
|---|---|
| exact | SVD of the batch's gradient |
| exact, shorter side | the same, on the side that GaLore takes; for the key, where it is the other one |
| randomized | the package's randomized subspace iteration |
| warm start, 1 / 8 old | `power`: one pass from a basis fitted 1 or 8 batches earlier |
| window 1, 2, 4, 8 | `power` with `fit_window`: QR of sum G^T (G P) over the last batches, P fitted 8 batches earlier |
| summed 2, 4, 8 | SVD of the sum of the last gradients |
| one head, random | Eq. 3: SVD of the rows of ceil(r / d_k) heads drawn at random |
| one head, energy | of the heads whose gradient is largest |
| one head, best | of the heads that have the smallest error on the batch (no method can know them for free) |
| random | orthonormal, looks at nothing |

Bases are on the input side ("right"), as heads share it. Query and key of all layers, up_proj of every third layer.
"""

import math
from collections.abc import Iterator

import real_model
import torch
from common import Options, Records, as_measured, measuring, shown
from torch import Tensor
from tqdm import tqdm

from crosslore import LowRankConfig, MatrixLayout
from crosslore.heads import attention_shape
from crosslore.registry import load

NAME = "subspace_error"
FIGURES = ("error_median", "error_lower_quartile", "error_upper_quartile", "count")
RAW = ("weight", "rank", "basis", "lag", "rows", *FIGURES)
HISTORY = 8
KINDS = ("q_proj", "k_proj", "up_proj")
# Every so many layers of the wide kind: its gradients are large.
SPARSE_LAYERS = 3

Gradients = dict[tuple[str, int], list[Tensor]]


def run(options: Options) -> None:
    """Measure what is missing and write OUT/subspace_error.csv."""
    with measuring(NAME, RAW, options, as_measured) as records:
        measure(records, options)


def measure(records: Records, options: Options) -> None:
    """Compute the gradients once, then every kind of weight and rank that is missing."""
    ranks = options.pick(full=(16, 128), quick=(16, 128), tiny=(4, 8))
    lags = options.pick(full=(0, 1, 2, 4), quick=(0, 1), tiny=(0, 1))
    done = {(row["weight"], int(row["rank"])) for row in records.select()}
    missing = [(kind, rank) for kind in KINDS for rank in ranks if (kind, rank) not in done]
    if not missing:
        return
    fits = [HISTORY + i for i in range(options.pick(full=2, quick=1, tiny=1))]
    data, gradients, heads = collect(options, count=fits[-1] + lags[-1] + 1)
    for kind, rank in missing:
        found: dict[tuple[str, int], list[float]] = {}
        layers = {layer: grads for (name, layer), grads in gradients.items() if name == kind}
        for layer, grads in tqdm(layers.items(), desc=f"{NAME}: {kind}, rank {rank}", disable=None):
            for fit in fits:
                for name, basis, side in bases(grads, fit, rank=rank, heads=heads.get(kind, 0), seed=layer):
                    for lag in lags:
                        found.setdefault((name, lag), []).append(error(grads[fit + lag], basis, side))
        for (name, lag), values in found.items():  # all at once: a kind that was interrupted is done again
            quartiles = torch.tensor(values).quantile(torch.tensor([0.5, 0.25, 0.75])).tolist()
            figures = dict(zip(FIGURES, (*map(shown, quartiles), len(values)), strict=True))
            records.append(weight=kind, rank=rank, basis=name, lag=lag, rows=data, **figures)


def collect(options: Options, *, count: int) -> tuple[str, Gradients, dict[str, int]]:
    """Return the name of the data, the gradients by kind and layer, and the heads of query and key."""
    data, rows = real_model.batches(options, count=count, size=4)
    model = real_model.load_model(options)
    shape = attention_shape(model)
    assert shape is not None
    watched = {}
    for name, p in model.named_parameters():
        parts = name.split(".")
        kind = parts[-2] if len(parts) > 1 else ""
        layer = next((int(part) for part in parts if part.isdigit()), 0)
        wanted = kind in KINDS and (kind != "up_proj" or layer % SPARSE_LAYERS == 0)
        p.requires_grad_(wanted)
        if wanted:
            watched[kind, layer] = p
    model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    found: Gradients = {key: [] for key in watched}
    for batch in tqdm(rows, total=count, desc=f"{NAME}: gradients of {data}", disable=None):
        model(**batch).loss.backward()
        for key, p in watched.items():
            assert p.grad is not None
            found[key].append(p.grad.float())
            p.grad = None
    return data, found, {"q_proj": shape.heads, "k_proj": shape.kv_heads}


def error(grad: Tensor, basis: Tensor, side: str) -> float:
    """Return |G - G P P^T| / |G|, or |G - P P^T G| / |G| on the left; from norms, since P is orthonormal."""
    low = grad @ basis if side == "right" else basis.mT @ grad
    rest = 1 - (torch.linalg.norm(low.double()) / torch.linalg.norm(grad.double())).square()
    return math.sqrt(max(0.0, float(rest)))


def exact(grad: Tensor, rank: int) -> Tensor:
    """Return the first right singular vectors."""
    vh: Tensor = torch.linalg.svd(grad, full_matrices=False)[2]
    return vh[:rank].mT


def bases(grads: list[Tensor], fit: int, *, rank: int, heads: int, seed: int) -> Iterator[tuple[str, Tensor, str]]:
    """Yield name, basis and side of everything that can be fitted at batch `fit`.

    Args:
        grads: one weight's gradients, batch after batch.
        fit: index of the last batch that a basis sees.
        rank: vectors of a basis; at most the columns of the gradient.
        heads: heads among the rows; 0: there are none.
        seed: of what is drawn.
    """
    grad = grads[fit]
    rows, cols = grad.shape
    # A head has fewer rows than the rank may be; a layout wants the rank to fit the whole matrix only.
    layout = MatrixLayout(rows=rows, cols=cols, rank=rank, side="right")
    generator = torch.Generator().manual_seed(1000 * seed + fit)

    def fitted(projector: str, previous: Tensor | None = None) -> Tensor:
        made = load("projector", projector).from_config(_config(projector, rank))  # type: ignore[attr-defined]
        basis: Tensor = made.fit(grad, layout, previous=previous, generator=generator)
        return basis

    yield "exact", exact(grad, rank), "right"
    if rows < cols and rank <= rows:
        yield "exact, shorter side", exact(grad.mT, rank), "left"
    yield "randomized", fitted("randomized"), "right"
    for age in (1, HISTORY):
        yield f"warm start, {age} old", fitted("power", exact(grads[fit - age], rank)), "right"
    yield from _summed(grads, fit, rank=rank, layout=layout)
    yield "random", fitted("random"), "right"
    if heads:
        yield from _one_head(grad, rank=rank, heads=heads, generator=generator)


def _config(projector: str, rank: int) -> LowRankConfig:
    """Return a projector's configuration; the warm start is one pass, as in LDAdam."""
    special = {"oversampling": 0, "power_iterations": 1} if projector == "power" else {}
    return LowRankConfig(rank=rank, projector=projector, **special)  # type: ignore[arg-type]


def _summed(grads: list[Tensor], fit: int, *, rank: int, layout: MatrixLayout) -> Iterator[tuple[str, Tensor, str]]:
    """Yield the bases that see the last gradients together."""
    projector = load("projector", "power").from_config(_config("power", rank))  # type: ignore[attr-defined]
    old = exact(grads[fit - HISTORY], rank)
    for window in (1, 2, 4, 8):
        sketch = torch.zeros_like(old)
        for grad in grads[fit - window + 1 : fit + 1]:
            projector.sketch_(sketch, grad, grad @ old, layout, generator=torch.Generator())
        yield f"window {window}", torch.linalg.qr(sketch).Q, "right"
        if window > 1:
            yield f"summed {window}", exact(torch.stack(grads[fit - window + 1 : fit + 1]).sum(0), rank), "right"


def _one_head(grad: Tensor, *, rank: int, heads: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor, str]]:
    """Yield the bases of Eq. 3, from ceil(r / d_k) heads chosen in three ways."""
    parts = grad.unflatten(0, (heads, -1))
    count = min(heads, math.ceil(rank / parts.shape[1]))
    chosen = {
        "random": torch.randperm(heads, generator=generator)[:count],
        "energy": parts.norm(dim=(1, 2)).topk(count).indices,
    }
    alone = torch.tensor([error(grad, exact(part, rank), "right") for part in parts])
    chosen["best"] = alone.topk(count, largest=False).indices
    for how, index in chosen.items():
        basis = exact(parts[index.to(parts.device)].flatten(0, 1), rank)
        yield f"one head, {how}", basis, "right"
