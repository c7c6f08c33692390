"""All cells of a target: skipped where their results are there, run where not, with one progress bar for the rest."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from reproduction.cell_run import Setup, finished, hash_of, is_of, reusable, run_cell
from reproduction.cells import TUNING, Experiment
from reproduction.costs import estimated_seconds
from reproduction.profiles import load_profiles
from reproduction.results import Result, read_result, read_results, result_path, write_result
from reproduction.tuning import TuningError, at_an_end, grid_of, with_lr

# So that a bar moves by cells whose profile knows no times.
START_SECONDS = 10


@dataclass
class Summary:
    """What came of the cells of a run."""

    done: list[Result] = field(default_factory=list)
    skipped: int = 0
    reused: int = 0

    def of_status(self, status: str) -> list[Result]:
        """Return the results of one status."""
        return [result for result in self.done if result.status == status]


def all_results(setup: Setup) -> list[Result]:
    """Return the results that are there, none where there is no folder yet."""
    return read_results(setup.results) if setup.results.is_dir() else []


def rounds(cells: Sequence[Experiment]) -> list[list[Experiment]]:
    """Return the cells in the order of what they need: runs that choose a learning rate come before all others."""
    tuning = [cell for cell in cells if cell.table == TUNING]
    return [part for part in (tuning, [cell for cell in cells if cell.table != TUNING]) if part]


def ready(cells: Sequence[Experiment], setup: Setup) -> list[Experiment]:
    """Return cells with their learning rates.

    Raises:
        TuningError: if runs that a rate is chosen from are not there, or are of other settings or data.
    """
    tuned = [cell for cell in cells if cell.table != TUNING and load_profiles().profile(cell.profile).tuning]
    grids = {result_path(setup.results, run): run for cell in tuned for run in grid_of(cell)}
    for path, run in grids.items():
        if path.is_file() and not is_of(read_result(path), run, setup):
            raise TuningError(
                f"{path} is of other settings or rows than a learning rate is chosen by now. Run: python "
                f"scripts/reproduce.py {TUNING} --profile {run.profile}"
            )
    return [cell if cell.table == TUNING else with_lr(cell, setup.results) for cell in cells]


def those_ready(cells: Sequence[Experiment], setup: Setup) -> tuple[list[Experiment], list[str]]:
    """Return the cells whose learning rates are known, with them, and a line for each grid that knows none.

    Raises:
        TuningError: if no rate is known at all.
    """
    found: list[Experiment] = []
    lacking: dict[tuple[str, str], TuningError] = {}
    for cell in cells:
        try:
            found += ready([cell], setup)
        except TuningError as error:
            lacking.setdefault((cell.base_method, cell.dataset), error)
    if lacking and not found:
        raise next(iter(lacking.values()))
    return found, [f"left out, {method} on {dataset}: {error}" for (method, dataset), error in lacking.items()]


def at_ends(cells: Sequence[Experiment]) -> list[str]:
    """Return a line for each tuned learning rate that is the last of its grid."""
    tuned = [cell for cell in cells if cell.table != TUNING and load_profiles().profile(cell.profile).tuning]
    return list(dict.fromkeys(line for cell in tuned if (line := at_an_end(cell))))


def missing_of(cells: Sequence[Experiment], setup: Setup) -> list[Experiment]:
    """Return the cells that would be run, also those whose learning rate is not chosen yet."""
    found = []
    for cell in cells:
        try:
            (known,) = ready([cell], setup)
        except TuningError:
            found.append(cell)
            continue
        if finished(known, setup) is None:
            found.append(known)
    return found


def of_other_models(cells: Sequence[Experiment], setup: Setup) -> list[str]:
    """Return a line for each model whose results were trained from a folder or name that is another one now."""
    places: dict[tuple[str, str], int] = {}
    for cell in cells:
        result, place = finished(cell, setup), Path(setup.models[cell.model]).name
        before = "" if result is None else Path(str(result.config.get("model_name_or_path", place))).name
        if before not in ("", place):
            places[before, place] = places.get((before, place), 0) + 1
    return [
        f"{count} results that are there were trained from {before}, now {place} is given: they are kept as they are. "
        "To train from the other, name another --out folder."
        for (before, place), count in places.items()
    ]


def run(cells: Sequence[Experiment], setup: Setup, *, jobs: int, say: Callable[[str], None]) -> Summary:
    """Run what is missing of some cells, `jobs` at a time.

    Args:
        cells: with their learning rates (`ready`).
        setup: models, data and folders.
        jobs: cells at a time.
        say: prints a line above the progress bar.

    Raises:
        KeyboardInterrupt: after the running processes were stopped; what they have done stays.
    """
    summary = Summary()
    missing = []
    for cell in cells:
        if finished(cell, setup) is not None:
            summary.skipped += 1
        else:
            missing.append(cell)
    weights = {cell.name + cell.table: START_SECONDS + estimated_seconds(cell) for cell in missing}
    bar = tqdm(
        total=round(sum(weights.values())),
        desc="cells",
        disable=None if sys.stderr.isatty() else False,
        mininterval=1.0 if sys.stderr.isatty() else 30.0,
        bar_format="{desc} {postfix} |{bar}| {percentage:3.0f}% [{elapsed}, {remaining} left]",
    )
    bar.set_postfix_str(f"0/{len(missing)}")
    try:
        for result in _results(missing, setup, jobs):
            summary.done.append(result)
            summary.reused += result.reused_from is not None
            bar.update(round(weights[result.experiment.name + result.experiment.table]))
            bar.set_postfix_str(f"{len(summary.done)}/{len(missing)}")
            say(_line(result))
    finally:
        bar.close()
    return summary


def _results(cells: Sequence[Experiment], setup: Setup, jobs: int) -> Iterator[Result]:
    """Yield results as cells end; whatever interrupts this stops the processes first."""
    # Cells of one configuration wait for each other: the later ones take over what the first one finds.
    turns = {hash_of(cell, setup): threading.Lock() for cell in cells}

    def one(cell: Experiment) -> Result:
        with turns[hash_of(cell, setup)]:
            same = reusable(cell, setup, all_results(setup))
            if same is None:
                return run_cell(cell, setup)
            write_result(setup.results, same)
            return same

    rest = iter(cells)
    with ThreadPoolExecutor(jobs) as pool:
        waiting: set[Future[Result]] = set()
        try:
            while True:
                waiting |= {pool.submit(one, cell) for cell in islice(rest, jobs - len(waiting))}
                if not waiting:
                    return
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ended)
        except BaseException:
            setup.processes.stop()
            raise


def _line(result: Result) -> str:
    cell = result.experiment
    name = f"{cell.table}/{cell.name}"
    if result.status != "ok":
        return f"{name}: {result.status}: {result.reason}"
    shown = [f"{key} {score.value:.4g}" for key, score in result.scores.items() if score.value is not None]
    taken = f", taken over from {result.reused_from}" if result.reused_from else ""
    return f"{name}: {3600 * (result.hours or 0.0):.0f} s of training, {', '.join(shown[:4])}{taken}"
