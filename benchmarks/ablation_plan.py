"""In which order the ablation runs: what the finished runs say about learning rates, winners, and what is left to do.

Every variant looks for its learning rate on one grid with the first seed: at the rates of `FIRST_LRS`, then at the next
one outwards as long as the best so far has an untried neighbour. The best one, and those within `LR_MARGIN` of it, are
then run with the other seeds, and the lowest mean held-out loss at the end decides. Stage 2 reads the winners from
stage 1's results, so nothing is edited between the two; its rows have the learning rate of `best`. Two cells with the
same configuration are one run, whatever their names.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ablation_matrix import (
    FACTORS,
    FIRST_LRS,
    LR_MARGIN,
    LRS,
    PAPER,
    TASKS,
    TOGETHER,
    TOGETHER_NAME,
    Cell,
    Result,
    Task,
    Variant,
    combined,
    stage1,
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all stages have in common."""

    # sha256 by task name: model, and the task's files.
    inputs: Mapping[str, Mapping[str, str]]
    tasks: Sequence[Task] = TASKS
    lrs: Sequence[float] = LRS
    first_lrs: Sequence[float] = FIRST_LRS
    lr_margin: float = LR_MARGIN
    seeds: int = 3

    def cell(self, task: Task, variant: Variant, lr: float, seed: int) -> Cell:
        """Return one run."""
        return Cell(task=task, variant=variant, lr=lr, seed=seed, inputs=self.inputs[task.name])

    def search(self, task: Task, variant: Variant, results: Mapping[str, Result]) -> list[Cell]:
        """Return the first seed's runs that choose the learning rate, as far as they can be named."""
        if variant.like is not None:
            return [self.cell(task, variant, lr, 0) for lr in self.rates(task, variant, results)]
        tried = list(self.first_lrs)
        while True:
            cells = [self.cell(task, variant, lr, 0) for lr in tried]
            best = lowest(cells, results)
            outwards = [] if best is None else self._untried_neighbours(tried, best.lr)
            if not outwards:
                return cells
            tried += outwards

    def _untried_neighbours(self, tried: Sequence[float], lr: float) -> list[float]:
        """Return the rates of the grid next to `lr` that nobody has tried."""
        i = self.lrs.index(lr)
        return [near for near in (*self.lrs[max(0, i - 1) : i], *self.lrs[i + 1 : i + 2]) if near not in tried]

    def rates(self, task: Task, variant: Variant, results: Mapping[str, Result]) -> list[float]:
        """Return the learning rates that are run with all seeds; none before the search is at its end."""
        if variant.like is not None:
            lr = self.best_lr(task, variant.like, results)
            return [] if lr is None else [lr]
        search = self.search(task, variant, results)
        best = lowest(search, results)
        bound = final_loss(results[best.hash]) + self.lr_margin if best else math.inf
        return [cell.lr for cell in search if final_loss(results[cell.hash]) <= bound] if bound < math.inf else []

    def best_lr(self, task: Task, variant: Variant, results: Mapping[str, Result]) -> float | None:
        """Return the learning rate with the lowest final loss; None if a run is missing or none ended well."""
        rates = self.rates(task, variant, results)
        if len(rates) == 1:
            return rates[0]
        means = {}
        for lr in rates:
            hashes = [self.cell(task, variant, lr, seed).hash for seed in range(self.seeds)]
            if any(h not in results for h in hashes):
                return None
            means[lr] = statistics.fmean(final_loss(results[h]) for h in hashes)
        return min(means, key=lambda lr: means[lr]) if means else None

    def cells(self, task: Task, variant: Variant, results: Mapping[str, Result]) -> list[Cell]:
        """Return the runs of one place in the table that can be named so far: the search, then the other seeds."""
        rates = self.rates(task, variant, results)
        others = [self.cell(task, variant, lr, seed) for lr in rates for seed in range(1, self.seeds)]
        return self.search(task, variant, results) + others

    def ready(self, variants: Iterable[Variant], results: Mapping[str, Result]) -> list[Cell]:
        """Return the runs that are to be done and can be named, in order, without duplicates."""
        cells = [c for v in variants for task in self.tasks for c in self.cells(task, v, results)]
        return list({cell.hash: cell for cell in cells if cell.hash not in results}.values())

    def left(self, task: Task, variant: Variant, results: Mapping[str, Result]) -> int:
        """Return how many runs of one place in the table are to be done, those that cannot be named yet included."""
        search = self.search(task, variant, results)
        missing = sum(cell.hash not in results for cell in self.cells(task, variant, results))
        if not search:
            missing = self.seeds
        elif lowest(search, results) is None:
            # Of two neighbours inside the grid either one leads to a third.
            missing += self.seeds - 1 + (len(search) == len(self.first_lrs) < len(self.lrs))
        return missing

    def remaining(self, variants: Iterable[Variant], results: Mapping[str, Result]) -> Counter[tuple[str, str]]:
        """Return the same by task and variant name."""
        pairs = [(task, variant) for variant in variants for task in self.tasks]
        return Counter({(task.name, variant.name): self.left(task, variant, results) for task, variant in pairs})

    def losses(self, task: Task, variant: Variant, results: Mapping[str, Result]) -> dict[int, float]:
        """Return the final loss by seed at the variant's learning rate; inf for a run that diverged or failed."""
        lr = self.best_lr(task, variant, results)
        cells = [] if lr is None else [self.cell(task, variant, lr, seed) for seed in range(self.seeds)]
        return {cell.seed: final_loss(results[cell.hash]) for cell in cells if cell.hash in results}

    def differences(
        self, task: Task, variant: Variant, results: Mapping[str, Result], *, base: Variant = PAPER
    ) -> list[float]:
        """Return the paired differences to `base`, one for each seed that both have."""
        mine, other = self.losses(task, variant, results), self.losses(task, base, results)
        return [mine[seed] - other[seed] for seed in mine if seed in other]

    def gain(self, values: Mapping[str, str], results: Mapping[str, Result]) -> tuple[float, float]:
        """Return the mean difference to the paper's setting over tasks and seeds, and its standard error.

        The mean is inf if a task has no difference, or one that is not finite.
        """
        variant = combined("candidate", values)
        found = [self.differences(task, variant, results) for task in self.tasks]
        if not all(found) or not all(math.isfinite(d) for task in found for d in task):
            return math.inf, 0.0
        mean = statistics.fmean(statistics.fmean(d) for d in found)
        squares = sum(statistics.variance(d) / len(d) for d in found if len(d) > 1)
        return mean, math.sqrt(squares) / len(found)

    def winners(self, results: Mapping[str, Result]) -> dict[str, str]:
        """Return for each factor its best value if that beats the paper's value by more than the standard error."""
        chosen = {}
        for factor, values in FACTORS.items():
            gains = {value: self.gain({factor: value}, results) for value in values}
            best = min(gains, key=lambda value: gains[value])  # noqa: B023
            if sum(gains[best]) < 0:
                chosen[factor] = best
        alone = [self.gain({f: chosen[f]}, results)[0] for f in chosen.keys() & TOGETHER]
        mean, error = self.gain(TOGETHER, results)
        if mean < min([-error, *alone]):
            chosen |= TOGETHER
        if chosen.get("residual") == "off":
            chosen.pop("select", None)  # without a residual there is nothing to select
        return {factor: chosen[factor] for factor in FACTORS if factor in chosen}

    def stage2(self, results: Mapping[str, Result]) -> list[Variant]:
        """Return `best` and a variant for each other value of each factor; none if the paper's values won all.

        Raises:
            LookupError: if stage 1 is not finished; says how many runs are missing.
        """
        missing = self.ready(stage1(), results)
        if missing:
            raise LookupError(
                f"stage 2 starts from stage 1's results, and {len(missing)} of its runs are missing, the first one is "
                f"{missing[0].file_name}. Run: python benchmarks/ablation.py --stage 1"
            )
        chosen = self.winners(results)
        if not chosen:
            return []
        best = combined("best", chosen)
        others = {f"best-without-{f}": {g: v for g, v in chosen.items() if g != f} for f in chosen}
        for factor, values in FACTORS.items():
            others |= {f"best-{factor}-{v}": chosen | {factor: v} for v in values if chosen.get(factor) != v}
        others[f"best-{TOGETHER_NAME}"] = chosen | TOGETHER
        return [best, *(combined(name, values, like=best) for name, values in others.items() if values != chosen)]


def lowest(cells: Sequence[Cell], results: Mapping[str, Result]) -> Cell | None:
    """Return the cell with the lowest final loss, the first of equals; None if one has no result, or for no cells."""
    if not cells or any(cell.hash not in results for cell in cells):
        return None
    return min(cells, key=lambda cell: final_loss(results[cell.hash]))


def final_loss(result: Result) -> float:
    """Return the held-out loss at the end of a run, inf unless it ended well."""
    return float(result["held_out"]["end"]) if result["status"] == "ok" else math.inf
