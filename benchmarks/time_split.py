"""Part d: where the time of training goes, as in the paper's Figure 2a: SmolLM2-135M, batch 1 x 128 tokens, rank 128.

The contenders train one shared model, each with its own state; in every round each does forward, backward and a step.
Forward and backward are the same work for all, so their median is over all contenders.
Refreshes are measured as in `step_time`: a second optimizer has the cycle as its interval, the steps in which every
weight is refreshed once, and what a phase takes in a cycle beyond as many ordinary steps is the refreshes' share of
it. Amortised over 200 steps: ordinary + (cycle - number of its steps * ordinary) / 200.

| phase | this package | galore-torch |
|---|---|---|
| fit | `refresh_`: projector, moments at a refresh; `sketch_` | `get_orthogonal_matrix` |
| project | `project` | `GaLoreProjector.project` without the fit |
| update | `Rule.update` and `step_weight_` (weights at full rank) | the rest: Adam and the addition to the weight |
| project_back | `add_back_`, the addition to the weight included | `project_back` |
| residual | `apply_`, `prepare` of a residual | |
| other | the rest: check of the gradients, bookkeeping | |

Times are exclusive: what a phase calls is counted in the phase that is called. On CUDA every phase waits for the
device at its ends, which forbids overlaps: the sum is then larger than a step.
"""

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import contenders as who
import real_model
from common import (
    Options,
    Records,
    Row,
    grouped,
    measuring,
    median,
    of_environment,
    seconds,
    shown,
    synchronize,
    write_rows,
)
from contenders import INTERVAL, Contender, Skip
from step_time import SLOW
from torch.optim import Optimizer
from tqdm import tqdm

from crosslore.registry import REGISTRY, load

NAME = "time_split"
PHASES = ("forward", "backward", "fit", "project", "update", "project_back", "residual", "other")
# Those in which a refresh makes a difference; forward and backward differ by noise.
STEP_PHASES = PHASES[2:]
RAW = ("contender", "measure", "round", "rank", "cycle", *PHASES)
SUMMARY = ("contender", "figure", "rank", *PHASES, "total_seconds", "fit_share")
CONTENDERS = ("galore-torch", "galore", "crosslore", "crosslore_plus")
# Methods of the package's classes, by phase; of every registered class that has them.
METHODS = {
    "projector": {"sketch_": "fit", "project": "project", "add_back_": "project_back"},
    "rule": {"update": "update", "update_many": "update", "step_weight_": "update"},
    "residual": {"prepare": "residual", "apply_": "residual"},
}
# Functions, by the module that calls them; those of a version without them are passed over.
FUNCTIONS = {("crosslore.step", "refresh_"): "fit"}
PEER = {"get_orthogonal_matrix": "fit", "project": "project", "project_back": "project_back"}


class Clock:
    """Counts exclusive seconds by phase."""

    def __init__(self, device: str) -> None:
        """Start with nothing counted."""
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside, without what an inner phase counts."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:  # Any: as the function has it
        """Return the function, counted as that phase."""

        def counted(*args: Any, **kwargs: Any) -> Any:  # Any: as the function has it
            with self.phase(name):
                return function(*args, **kwargs)

        return counted


@contextmanager
def probes(clock: Clock) -> Iterator[None]:
    """Count the phases of a step while inside."""
    targets: list[tuple[Any, str, str]] = []  # Any: a class or a module
    for kind, methods in METHODS.items():
        classes = [load(kind, name) for name in REGISTRY[kind]]  # type: ignore[index, arg-type]
        owners = {owner for cls in classes for owner in cls.__mro__}
        targets += [(owner, name, phase) for owner in owners for name, phase in methods.items() if name in vars(owner)]
    for (module, name), phase in FUNCTIONS.items():
        if hasattr(importlib.import_module(module), name):
            targets.append((importlib.import_module(module), name, phase))
    try:
        peer = importlib.import_module("galore_torch.galore_projector").GaLoreProjector
        targets += [(peer, name, phase) for name, phase in PEER.items()]
    except ImportError:
        pass  # then galore-torch is left out by name, with the reason
    with ExitStack() as stack:
        for owner, name, phase in targets:
            stack.enter_context(patch.object(owner, name, clock.timed(vars(owner)[name], phase)))
        yield


def run(options: Options) -> None:
    """Measure what is missing and write OUT/time_split.csv."""
    with measuring(NAME, RAW, options, summarise) as records:
        measure(records, options)


def measure(records: Records, options: Options) -> None:
    """In each round one ordinary step of everyone; then, in the first rounds, one cycle of everyone."""
    known = who.contenders(options)
    members = [known[name] for name in CONTENDERS if name in known]
    names = [c.name for c in members]
    records.drop_partial(names, by=("round",), measure="ordinary")
    done = {int(row["round"]) for row in records.select(measure="ordinary")}
    rounds = [r for r in range(options.pick(full=5, quick=3, tiny=2)) if r not in done]
    cycled = {row["contender"] for row in records.select(measure="cycle")}
    cycles = [c for c in members if c.cycle and c.name not in cycled]
    if not rounds and not cycles:
        return
    trainer = Trainer(options)
    with tqdm(total=len(rounds) * len(members) + len(cycles), desc=NAME, disable=None) as bar:
        for index in rounds:
            for contender in members:
                optimizer = trainer.optimizer(contender, cycling=False)
                row = trainer.step(optimizer, stock=not contender.ours)
                records.append(
                    contender=contender.name, measure="ordinary", round=index, **trainer.about(contender, row)
                )
                bar.update()
        for contender in cycles:
            optimizer = trainer.optimizer(contender, cycling=True)
            rows = [trainer.step(optimizer, stock=not contender.ours) for _ in range(contender.cycle)]
            row = {phase: sum(row[phase] for row in rows) for phase in PHASES}
            records.append(contender=contender.name, measure="cycle", round=0, **trainer.about(contender, row))
            bar.update()


class Trainer:
    """The shared model, its batch, and every contender's optimizers."""

    def __init__(self, options: Options) -> None:
        """Load the model and compute first gradients."""
        self.device, self.rank = options.device, who.rank_of(options)
        self.model = real_model.load_model(options)
        self.batch = real_model.random_batch(options)
        self.model(**self.batch).loss.backward()
        self._optimizers: dict[tuple[str, bool], Optimizer] = {}

    def about(self, contender: Contender, figures: Row) -> Row:
        """Return the figures with what they belong to."""
        rounded = {phase: shown(value) for phase, value in figures.items()}
        return {"rank": contender.rank(self.rank), "cycle": contender.cycle} | rounded

    def optimizer(self, contender: Contender, *, cycling: bool) -> Optimizer:
        """Return a contender's optimizer, started at the first call."""
        key = (contender.name, cycling)
        if key not in self._optimizers:
            try:
                made = (contender.cycling if cycling else contender.ordinary)(self.model, self.rank)
                first = seconds(lambda: who.warm_up(made, self.model, contender.name, steps=1), self.device)
                if first < SLOW or not cycling:
                    who.warm_up(made, self.model, contender.name, steps=who.WARM_UP - 1)
            except Skip as reason:
                raise RuntimeError(
                    f"{contender.name} cannot run: {reason}. Leave it out with --contenders."
                ) from reason
            self._optimizers[key] = made
        return self._optimizers[key]

    def step(self, optimizer: Optimizer, *, stock: bool) -> dict[str, float]:
        """Train one step and return the seconds of its phases; the rest of a stock step is its update."""
        clock = Clock(self.device)
        optimizer.zero_grad()
        with clock.phase("forward"):
            loss = self.model(**self.batch).loss
        with clock.phase("backward"):
            loss.backward()
        with probes(clock), clock.phase("update" if stock else "other"):
            optimizer.step()
        return clock.seconds


def summarise(records: Records, options: Options) -> None:
    """Write three rows for each contender: ordinary step, cycle of refreshes, amortised step."""
    lines = []
    for rows in records.sessions().values():
        steps = grouped(rows, "measure").get(("ordinary",), [])
        shared = {phase: median(steps, phase) or 0.0 for phase in PHASES[:2]}
        for mine in grouped(rows, "contender").values():
            by = grouped(mine, "measure")
            ordinary = {phase: median(by.get(("ordinary",), []), phase) or 0.0 for phase in STEP_PHASES} | shared
            figures = {"ordinary": ordinary}
            if ("cycle",) in by:
                count = int(mine[-1]["cycle"])
                cycle = {phase: median(by["cycle",], phase) or 0.0 for phase in PHASES}
                figures[f"cycle of {count} steps"] = cycle
                extra = {phase: max(0.0, cycle[phase] - count * ordinary[phase]) for phase in STEP_PHASES}
                figures["amortised"] = {p: ordinary[p] + extra.get(p, 0.0) / INTERVAL for p in PHASES}
            for name, phases in figures.items():
                total = sum(phases.values())
                line = {phase: shown(value) for phase, value in phases.items()} | of_environment(mine)
                line |= {"contender": mine[-1]["contender"], "figure": name, "rank": mine[-1]["rank"]}
                lines.append(line | {"total_seconds": shown(total), "fit_share": shown(phases["fit"] / total)})
    write_rows(options.out / f"{NAME}.csv", lines, (*SUMMARY, *records.columns[len(RAW) :]))
