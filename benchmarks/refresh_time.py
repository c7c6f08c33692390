"""Part a: seconds of one refresh of a 4096 x 4096 matrix at rank 128, against torch.linalg.svd of the same matrix.

Every projector of the registry, the warm start, the windowed sketch and cross-head sharing fit the same gradient, of
low rank plus noise; in every round each does one fit. `power` starts from the basis of an older gradient, which
shares three quarters of this one. `power, window 4` is what the optimizer does with `fit_window=4`: four products
G^T (G P), one at each step before the refresh (G P is there anyway), and the QR of their sum; the column
`refresh_step_seconds` is the QR alone, which is all that the refresh step itself takes longer. `error` is
|G - G P P^T| / |G|, so that a fast basis that is no good shows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from common import Options, Records, Row, grouped, measuring, median, of_environment, seconds, shown, write_rows
from contenders import rank_of
from torch import Tensor
from tqdm import tqdm

from crosslore import LowRankConfig, MatrixLayout
from crosslore.registry import REGISTRY, load

NAME = "refresh_time"
RAW = ("contender", "round", "size", "rank", "seconds", "refresh_step_seconds", "error")
SUMMARY = ("contender", "size", "rank", "seconds", "refresh_step_seconds", "svd_over_this", "error", "rounds")
# A basis, and the seconds of the refresh step alone when they are less than those of the whole fit.
Fitted = tuple[Tensor, float | None]
BASELINE = "torch.linalg.svd"
WINDOW = 4


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One gradient, an older one, and the layout of its heads."""

    grad: Tensor
    old: Tensor
    layout: MatrixLayout
    device: str

    def draws(self) -> torch.Generator:
        """Return a generator, the same at each call."""
        return torch.Generator().manual_seed(1)

    def config(self, projector: str, **fields: object) -> LowRankConfig:
        """Return the configuration of a projector; its other fields have their defaults."""
        return LowRankConfig(rank=self.layout.rank, projector=projector, **fields)  # type: ignore[arg-type]

    def error(self, basis: Tensor) -> float:
        """Return |G - G P P^T| / |G|."""
        grad, basis = self.grad.float(), basis.float()
        return float(torch.linalg.norm(grad - grad @ basis @ basis.mT) / torch.linalg.norm(grad))


def problem(options: Options) -> Problem:
    """Return the gradient that all fit; the same on every device."""
    size = options.pick(full=4096, quick=1024, tiny=48)
    heads = options.pick(full=32, quick=8, tiny=4)
    generator = torch.Generator().manual_seed(0)
    inner = min(256, size)
    a, b, other = (torch.randn(size, inner, generator=generator) for _ in range(3))
    noise = torch.randn(size, size, generator=generator).mul_(0.1)
    spectrum = torch.logspace(0, -2, inner)
    shared = 3 * inner // 4  # directions that the older gradient has too
    grads = []
    for right in (b, torch.cat([b[:, :shared], other[:, shared:]], dim=1)):
        grad = (a * spectrum) @ right.mT * inner**-0.5 + 0.1 * noise
        grads.append((1e-3 * grad).to(options.device, options.torch_dtype))
    layout = MatrixLayout(rows=size, cols=size, rank=rank_of(options), side="right", heads=heads)
    return Problem(grad=grads[0], old=grads[1], layout=layout, device=options.device)


def fitters(case: Problem) -> dict[str, Callable[[], Fitted]]:
    """Return what is measured, by name: each call returns the basis, and the seconds of the refresh step if less."""
    plain = replace(case.layout, heads=1)
    start = load("projector", "svd").from_config(case.config("svd"))  # type: ignore[attr-defined]
    old = start.fit(case.old, plain, previous=None, generator=case.draws())

    def baseline() -> Fitted:
        _, _, vh = torch.linalg.svd(case.grad.float(), full_matrices=False)
        return vh[: case.layout.rank].mT, None

    def fitter(name: str, config: LowRankConfig) -> Callable[[], Fitted]:
        projector = load("projector", name).from_config(config)  # type: ignore[attr-defined]
        layout = case.layout if name == "cross_head" else plain
        return lambda: (projector.fit(case.grad, layout, previous=old, generator=case.draws()), None)

    found: dict[str, Callable[[], Fitted]] = {BASELINE: baseline}
    for name in REGISTRY["projector"]:
        if name != "cross_head":
            found["power (warm start)" if name == "power" else name] = fitter(name, case.config(name))
    for inner in ("svd", "randomized"):
        for choice in ("random", "energy"):
            config = case.config(inner, cross_head_targets=("q_proj",), head_choice=choice)
            found[f"cross_head, {inner}, {choice} head"] = fitter("cross_head", config)
    for name, layout in (("power", plain), ("cross_head", case.layout)):
        found[f"{name}, window {WINDOW}"] = partial(
            _windowed, case, layout, old, case.grad @ old.to(case.grad.dtype), name
        )
    return found


def _windowed(case: Problem, layout: MatrixLayout, old: Tensor, low: Tensor, name: str) -> Fitted:
    """Return the basis of a sketch over WINDOW steps, and the seconds of its last part, the QR."""
    config = case.config("power", cross_head_targets=("q_proj",), fit_window=WINDOW)
    projector = load("projector", name).from_config(config)  # type: ignore[attr-defined]
    generator = case.draws()
    sketch = torch.zeros_like(old, dtype=torch.float32)
    for _ in range(WINDOW):
        projector.sketch_(sketch, case.grad, low, layout, generator=generator)
    basis: list[Tensor] = []
    last = seconds(lambda: basis.append(torch.linalg.qr(sketch).Q), case.device)
    return basis[0], last


def run(options: Options) -> None:
    """Measure what is missing and write OUT/refresh_time.csv."""
    with measuring(NAME, RAW, options, summarise) as records:
        case = problem(options)
        found = fitters(case)
        records.drop_partial(list(found), by=("round",))
        done = {int(row["round"]) for row in records.select()}
        rounds = [r for r in range(options.pick(full=5, quick=5, tiny=2)) if r not in done]
        with tqdm(total=len(rounds) * len(found), desc=NAME, disable=None) as bar:
            for index in rounds:
                for name, fit in found.items():
                    records.append(contender=name, round=index, **_measured(fit, case))
                    bar.update()


def _measured(fit: Callable[[], Fitted], case: Problem) -> Row:
    """Return the figures of one fit."""
    results: list[Fitted] = []
    took = seconds(lambda: results.append(fit()), case.device)
    basis, last = results[0]
    row = {"size": case.layout.rows, "rank": case.layout.rank, "seconds": shown(took)}
    return row | {"refresh_step_seconds": shown(took if last is None else last), "error": shown(case.error(basis))}


def summarise(records: Records, options: Options) -> None:
    """Write one row for each way to fit, from the measurements alone."""
    lines = []
    for rows in records.sessions().values():
        by_name = grouped(rows, "contender")
        baseline = median(by_name.get((BASELINE,), []), "seconds")
        for mine in by_name.values():
            figures = {column: shown(median(mine, column)) for column in ("seconds", "refresh_step_seconds", "error")}
            ratio = baseline / float(figures["seconds"]) if baseline and figures["seconds"] else None
            line = {column: mine[-1][column] for column in ("contender", "size", "rank")}
            lines.append({**line, **figures, "svd_over_this": shown(ratio), "rounds": len(mine)} | of_environment(mine))
    write_rows(options.out / f"{NAME}.csv", lines, (*SUMMARY, *records.columns[len(RAW) :]))
