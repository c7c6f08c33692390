"""Reproduce a table, figure or ablation of the paper: train and score every cell of it, then write tables and report.

python scripts/reproduce.py table1 --profile smoke                       # does everything run? minutes on 2 cores
python scripts/reproduce.py tuning table1 --profile small --data DIR --jobs 2 --threads 1
python scripts/reproduce.py table1 --model llama2-7b=DIR                 # profile paper: docs/reproduction.md
python scripts/reproduce.py table2 --only method=crosslore,rank=128 --dry-run

A cell whose result is there for the same settings and data is not run again, so an interrupted command goes on when it
is given again; at most the cells that were running are lost.
"""

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from prepare_data import DataError
from reproduction import needs
from reproduction.cell_run import Setup
from reproduction.cells import Experiment
from reproduction.experiments import experiments
from reproduction.memory_need import memory_lines
from reproduction.outcome import CellFailed
from reproduction.outputs import of_other_settings, of_several_commits, write_outputs
from reproduction.paper import load_paper
from reproduction.probe import speed_factor
from reproduction.processes import FolderBusy, Processes, only_one
from reproduction.reading import PaperDataError
from reproduction.results import ResultError, results_folder
from reproduction.runner import Summary, all_results, at_ends, missing_of, of_other_models, rounds, run, those_ready
from reproduction.samples import prepare_profile_data
from reproduction.selection import needed, select
from reproduction.tables import PROFILES
from reproduction.tiny_model import make_tiny_model
from reproduction.tuning import TuningError
from tqdm import tqdm

from crosslore_eval.errors import EvalError

ROOT = Path(__file__).resolve().parents[1]
DATA_VARIABLE = "CROSSLORE_DATA_DIR"
INTERRUPTED = 130
# Cells of the profile smoke at a time, at most: each takes a gibibyte.
SMOKE_JOBS = 8
ERRORS = (
    needs.NotReady,
    DataError,
    FolderBusy,
    PaperDataError,
    ResultError,
    TuningError,
    EvalError,
    ValueError,
    OSError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0; 1: a cell failed or was left out; 2: something is missing or wrong; 130: interrupted."""
    signal.signal(signal.SIGTERM, _as_interrupt)
    options = _parser().parse_args(arguments)
    try:
        return _reproduce(options)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what has ended is kept. The same command goes on from there.", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="table1 ... table10, figure1 ... figure4, "
                        "ablations, ablation-NAME, tuning, all")  # fmt: skip
    parser.add_argument("--profile", choices=PROFILES, default="paper", help="default: paper")
    parser.add_argument(
        "--model", action="append", default=[], metavar="[NAME=]DIR", help="a model's folder or hub name"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help=f"the data sets (default: ${DATA_VARIABLE}, or the hub)"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 1 to N (default: the profile's)")
    parser.add_argument(
        "--only", default="", metavar="K=V,...", help="some cells: method=crosslore,rank=16,dataset=e2e"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="cells at a time (default: 1; smoke: one a core)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of a cell (default: cores / jobs)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results folder (default: results, or saves for smoke)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where cells work (default: saves/reproduce/PROFILE)")
    parser.add_argument("--keep", action="store_true", help="keep trained models after they were scored")
    parser.add_argument("--probe", action="store_true", help="time a few steps first (always done in profile paper)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and what is missing")
    return parser


def _reproduce(options: argparse.Namespace) -> int:
    wanted = [
        cell for target in options.targets for cell in experiments(target, profile=options.profile, seeds=options.seeds)
    ]
    once = list({(cell.table, cell.name): cell for cell in wanted}.values())
    cells = needed(select(once, options.only), options.targets)
    if options.jobs is None:  # tiny cells are start-up for the most part, on one core
        options.jobs = min(SMOKE_JOBS, os.cpu_count() or 1) if options.profile == "smoke" else 1
    if options.jobs < 1 or (options.threads is not None and options.threads < 1):
        raise ValueError(f"--jobs and --threads must be 1 or more, got {options.jobs} and {options.threads}.")
    models = needs.models_of(options.profile, options.model, cells)
    work = (options.work or ROOT / "saves" / "reproduce" / options.profile).resolve()
    source = options.data or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    options.data = None if source is None else source.resolve()
    options.out = (options.out or results_folder(options.profile)).resolve()
    for folder, option in ((work, "--work"), (options.out, "--out")):
        needs.check_folder(folder, option)
    with only_one(work):
        if options.profile == "smoke":
            models = _with_tiny_models(models, work)
        os.chdir(ROOT)  # models and bundled data are named from there
        for line in memory_lines(cells):
            print(line, file=sys.stderr)
        needs.check(cells, models, options.data)
        setup = _setup(options, cells, models, work)
        failed = _run_rounds(cells, setup, options)
        if not options.dry_run:
            results = all_results(setup)
            for path in write_outputs(
                load_paper(),
                results,
                setup.results,
                profile=options.profile,
                targets=options.targets,
                seeds=options.seeds,
            ):
                print(path)
            said = of_other_settings(results, setup.results, profile=options.profile, seeds=options.seeds)
            for line in [*said, *of_several_commits(results, profile=options.profile)]:
                print(line, file=sys.stderr)
    return 1 if failed else 0


def _with_tiny_models(models: dict[str, str], work: Path) -> dict[str, str]:
    """Return places of models, with random ones made for those that are not there."""
    found = {}
    for name, place in models.items():
        is_there = (ROOT / place / "config.json").is_file()
        if not is_there and not (work / name / "config.json").is_file():
            part = work / f".{name}.part"  # whole or not there, should this be interrupted
            shutil.rmtree(part, ignore_errors=True)
            make_tiny_model(part)
            shutil.rmtree(work / name, ignore_errors=True)
            part.rename(work / name)
        found[name] = place if is_there else str(work / name)
    return found


def _setup(options: argparse.Namespace, cells: Sequence[Experiment], models: dict[str, str], work: Path) -> Setup:
    files = prepare_profile_data(cells, options.data, work / "data") if cells else {}
    return Setup(
        models=models,
        data=work / "data",
        files=files,
        work=work,
        results=options.out,
        threads=options.threads or max(1, (os.cpu_count() or 1) // options.jobs),
        keep=options.keep,
        processes=Processes(),
    )


def _run_rounds(cells: Sequence[Experiment], setup: Setup, options: argparse.Namespace) -> bool:
    """Run the cells; return whether one failed."""
    failed = False
    for part in rounds(cells):
        chosen, lacking = (part, []) if options.dry_run else those_ready(part, setup)
        failed = failed or bool(lacking)
        missing = missing_of(part if options.dry_run else chosen, setup)
        factor = _probed(missing, setup, options)
        needed = needs.of(missing, all_results(setup), setup.models, jobs=options.jobs, factor=factor)
        disk = needs.enough_disk(needed, setup.work)
        others = [] if options.dry_run else [*of_other_models(chosen, setup), *at_ends(chosen)]
        for line in [*needed.lines(), *needs.warnings(missing), *lacking, *others, *([disk] if disk else [])]:
            print(line, file=sys.stderr)
        if options.dry_run:
            for cell in missing:
                print(f"{cell.table}/{cell.name}")
            continue
        summary = run(chosen, setup, jobs=options.jobs, say=lambda line: tqdm.write(line, file=sys.stderr))
        _say_summary(summary)
        failed = failed or bool(summary.of_status("failed"))
    return failed


def _probed(missing: Sequence[Experiment], setup: Setup, options: argparse.Namespace) -> float | None:
    """Return how fast this machine is, None where nobody needs to know or it cannot be found out."""
    known = any(result.experiment.profile == options.profile for result in all_results(setup))
    if options.dry_run or known or not missing or (options.profile != "paper" and not options.probe):
        return None
    print("probe: a few steps, to tell how long the rest takes", file=sys.stderr)
    try:
        return speed_factor(missing, setup)
    except CellFailed as error:
        print(f"probe: {error}", file=sys.stderr)
        return None


def _say_summary(summary: Summary) -> None:
    counts = [f"{len(summary.of_status(status))} {word}" for status, word in
              (("ok", "ok"), ("oom", "out of memory"), ("failed", "failed"))]  # fmt: skip
    print(f"{', '.join(counts)}; {summary.skipped} were there, {summary.reused} taken over", file=sys.stderr)


def _as_interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
