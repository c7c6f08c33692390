"""Part a: seconds of an optimizer step, over the matrices of one LLaMA2-7B layer and over all of SmolLM2-135M.

No model runs: weights have their real shapes and random gradients of low rank plus noise, both shared by all
contenders, which keep their own states. Method:

- *Ordinary steps*: each contender has an optimizer whose interval is never reached. After three unmeasured steps, in
  every round each contender does one step; the median over rounds counts. A round that was interrupted is done again.
- *Refreshes*: in the first rounds each contender does a cycle too, with a second optimizer whose interval is the
  cycle: the number of steps in which every weight is refreshed exactly once. The cycle is 1 step (all weights at
  once), the window where a basis is fitted to the sketch of several steps, or 14 steps where refreshes are staggered.
  What a cycle takes beyond as many ordinary steps is the cost of all refreshes of an interval, sketches included. Where
  the first step, which fits every basis, takes over 10 s (an exact SVD of every matrix), it counts as the first cycle:
  what else a first step does is nothing beside that.
- *Amortised* over 200 steps: ordinary + (cycle - number of its steps * ordinary) / 200, for a cycle of one step
  (refresh + 199 ordinary) / 200. A method that refreshes at each step (LDAdam) has no other steps.
- *Worst over median*: longest step of a cycle (of its steps' medians over rounds) over the ordinary one. In a
  staggered cycle of 14 steps more weights fall on one step than in 200; `worst_over_median_200` scales the excess by
  the largest number of weights on one step of 200, ceil(weights / 200) / ceil(weights / 14). For the 7 matrices of a
  layer both are the same.

Moments of the embedding of SmolLM2 are at full rank, the presets' default. The first line of each reason is kept for a
contender that cannot run.
"""

import math
import statistics

import contenders as who
from common import Options, Records, Row, grouped, measuring, median, of_environment, seconds, shown, write_rows
from contenders import INTERVAL, Skip
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

NAME = "step_time"
RAW = ("workload", "contender", "measure", "round", "seconds", "steps", "rank", "weights", "cycle", "staggered", "note")
SUMMARY = (
    "workload",
    "contender",
    "status",
    "rank",
    "ordinary_seconds",
    "refresh_step_seconds",
    "refresh_cost_seconds",
    "amortised_seconds",
    "amortised_over_adamw_fused",
    "amortised_over_galore_torch",
    "worst_over_median",
    "worst_over_median_200",
    "interval",
    "cycle",
    "staggered",
    "rounds",
    "cycles",
)
# Seconds of a first step above which it is a measurement of a refresh too.
SLOW = 10.0


def run(options: Options) -> None:
    """Measure what is missing and write OUT/step_time.csv."""
    with measuring(NAME, RAW, options, summarise) as records:
        for workload, sizes in who.workloads(options).items():
            measure(workload, sizes, records, options)


def measure(workload: str, sizes: dict[str, int], records: Records, options: Options) -> None:
    """Measure one set of matrices: in each round one step of everyone, then one cycle of everyone with refreshes."""
    race = Race(workload, records, options)
    rounds = [r for r in range(options.pick(full=5, quick=5, tiny=2)) if r not in race.finished()]
    cycles = {name: race.cycles_left(name) for name in race.names()}
    if not rounds and not any(cycles.values()):
        return
    race.model = who.build_workload(sizes, options)
    race.start(with_steps=bool(rounds), with_cycles=[name for name, left in cycles.items() if left])
    cycles = {name: race.cycles_left(name) for name in race.names()}
    total = len(rounds) * len(race.names()) + sum(map(len, cycles.values()))
    with tqdm(total=total, desc=f"{NAME}: {workload}", disable=None) as bar:
        for index in sorted({*rounds, *(r for left in cycles.values() for r in left)}):
            for name in race.names() if index in rounds else []:
                race.step(name, index)
                bar.update()
            for name in (name for name, left in cycles.items() if index in left):
                race.cycle(name, index)
                bar.update()
    who.check_sane(race.model, race.ordinary | race.cycling)


class Race:
    """All contenders on one set of weights and gradients."""

    model: nn.Module

    def __init__(self, workload: str, records: Records, options: Options) -> None:
        """Look at what has been measured already; a round without everyone in it is dropped."""
        self.records, self.options = records, options
        self.workload, self.rank = workload, who.rank_of(options)
        self.chosen = who.contenders(options)
        self.ordinary: dict[str, Optimizer] = {}
        self.cycling: dict[str, Optimizer] = {}
        records.drop_partial(self.names(), by=("round",), workload=workload, measure="ordinary")

    def names(self) -> list[str]:
        """Return who takes part; those who cannot run are known by their row."""
        skipped = {row["contender"] for row in self.records.select(workload=self.workload, measure="skipped")}
        return [name for name in self.chosen if name not in skipped]

    def finished(self) -> set[int]:
        """Return the rounds of ordinary steps that are complete."""
        rows = self.records.select(workload=self.workload, measure="ordinary")
        return {int(row["round"]) for row in rows if row["contender"] in self.names()}

    def cycles_left(self, name: str) -> list[int]:
        """Return the cycles of a contender that are still to be measured."""
        rows = self.records.select(workload=self.workload, measure="cycle", contender=name)
        if not self.chosen[name].cycle:
            return []
        wanted = range(self.options.pick(full=3, quick=2, tiny=1))
        return [r for r in wanted if r not in {int(row["round"]) for row in rows}]

    def start(self, *, with_steps: bool, with_cycles: list[str]) -> None:
        """Build the optimizers and do their first steps."""
        for name in tqdm(self.names(), desc=f"{NAME}: first steps, {self.workload}", disable=None):
            try:
                if with_steps:
                    self.ordinary[name] = self.chosen[name].ordinary(self.model, self.rank)
                    who.warm_up(self.ordinary[name], self.model, name)
                if name in with_cycles:
                    self._start_cycling(name)
            except Skip as reason:
                for started in (self.ordinary, self.cycling):
                    started.pop(name, None)
                self._append(name, "skipped", note=str(reason))
                tqdm.write(f"{name} is left out: {reason}")

    def _start_cycling(self, name: str) -> None:
        optimizer = self.cycling[name] = self.chosen[name].cycling(self.model, self.rank)
        first = seconds(lambda: who.warm_up(optimizer, self.model, name, steps=1), self.options.device)
        if first < SLOW or self.chosen[name].cycle > 1:
            who.warm_up(optimizer, self.model, name, steps=who.WARM_UP - 1)
        elif 0 in self.cycles_left(name):
            self._append(name, "cycle", round=0, seconds=shown(first), steps=shown(first), note="first step")

    def step(self, name: str, index: int) -> None:
        """Measure one ordinary step."""
        took = shown(seconds(self.ordinary[name].step, self.options.device))
        self._append(name, "ordinary", round=index, seconds=took)

    def cycle(self, name: str, index: int) -> None:
        """Measure the steps in which every weight is refreshed once."""
        step = self.cycling[name].step
        took = [seconds(step, self.options.device) for _ in range(self.chosen[name].cycle)]
        steps = " ".join(str(shown(value)) for value in took)
        self._append(name, "cycle", round=index, seconds=shown(sum(took)), steps=steps)

    def _append(self, name: str, measure: str, **values: object) -> None:
        contender = self.chosen[name]
        about: Row = {"rank": contender.rank(self.rank), "cycle": contender.cycle, "staggered": contender.staggered}
        about |= {"workload": self.workload, "weights": who.low_rank_weights(self.model), "note": ""}
        self.records.append(contender=name, measure=measure, **about | values)


def summarise(records: Records, options: Options) -> None:
    """Write one row for each contender, from the measurements alone."""
    found = []
    for rows in records.sessions().values():
        for same in grouped(rows, "workload").values():
            lines = [_summary(mine) for mine in grouped(same, "contender").values()]
            amortised = {line["contender"]: line["amortised_seconds"] for line in lines if line["amortised_seconds"]}
            for line in lines:
                for peer, column in (("torch AdamW fused", "adamw_fused"), ("galore-torch", "galore_torch")):
                    both = line["contender"] in amortised and peer in amortised
                    ratio = amortised[line["contender"]] / amortised[peer] if both else None
                    line[f"amortised_over_{column}"] = shown(ratio)
            found += lines
    write_rows(options.out / f"{NAME}.csv", found, (*SUMMARY, *records.columns[len(RAW) :]))


def _summary(rows: list[Row]) -> Row:
    """Return the figures of one contender on one set of matrices."""
    by = grouped(rows, "measure")
    last = rows[-1]
    line = {column: last.get(column, "") for column in ("workload", "contender", "rank", "cycle", "staggered")}
    line |= of_environment(rows)
    ordinary_rows, cycle_rows = by.get(("ordinary",), []), by.get(("cycle",), [])
    ordinary = median(ordinary_rows, "seconds")
    if ordinary is None:
        skips = by.get(("skipped",), [])
        return line | {"status": f"skipped: {skips[-1]['note']}" if skips else "unfinished", "amortised_seconds": ""}
    cycle, weights = int(last["cycle"]), int(last["weights"])
    total, worst = median(cycle_rows, "seconds"), _worst(cycle_rows)
    if cycle and (total is None or worst is None):
        return line | {"status": "unfinished", "ordinary_seconds": ordinary, "amortised_seconds": ""}
    cost = max(0.0, total - cycle * ordinary) if total is not None else 0.0
    ratio = (ordinary if worst is None else worst) / ordinary
    steps = INTERVAL if str(last["staggered"]) == "True" else cycle or 1
    share = math.ceil(weights / steps) / math.ceil(weights / max(1, cycle))
    return line | {
        "status": "ok",
        "ordinary_seconds": ordinary,
        "refresh_step_seconds": shown(worst),
        "refresh_cost_seconds": shown(cost),
        "amortised_seconds": float(f"{ordinary + cost / INTERVAL:.6g}"),
        "worst_over_median": shown(ratio),
        "worst_over_median_200": shown(1 + (ratio - 1) * share),
        "interval": INTERVAL if cycle else 1,
        "rounds": len(ordinary_rows),
        "cycles": len(cycle_rows),
    }


def _worst(rows: list[Row]) -> float | None:
    """Return the longest step of a cycle; each step is the median over cycles, whose steps correspond."""
    cycles = [[float(value) for value in str(row["steps"]).split()] for row in rows]
    return max(statistics.median(step) for step in zip(*cycles, strict=True)) if cycles else None
