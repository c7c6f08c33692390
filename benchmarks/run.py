"""The benchmark suite: times, memory, errors and the split of training time, as CSV files, pictures and a page of docs.

    make benchmark                                   # everything; about an hour on two idle cores
    python benchmarks/run.py --only a,c --quick      # parts a and c, in minutes
    python benchmarks/run.py --device cuda --dtype bfloat16

    a  step_time, refresh_time   seconds of an optimizer step, and of one refresh against an SVD
    b  memory                    bytes of state, and temporary bytes of a step
    c  subspace_error            what a basis misses of real gradients (the paper's Figure 2b)
       kept_positions            which positions the sparse residual should keep
    d  time_split                forward, backward and the phases of the optimizer (the paper's Figure 2a)
    e  train_step                whole training steps and their memory beside LoRA, DoRA, AdamW, GaLore and APOLLO
       step_ratio                the same beside LoRA and AdamW, step for step in one process

Every measurement is on the disk when it is finished: stop with Ctrl-C, and the same command goes on from there. What
was measured with the same sources, versions, device, threads and sizes is not measured again unless --fresh.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import plots
import real_model
import tables
import torch
from common import Options

PARTS = {
    "a": ("step_time", "refresh_time"),
    "b": ("memory",),
    "c": ("subspace_error", "kept_positions"),
    "d": ("time_split",),
    "e": ("train_step", "step_ratio"),
}
# Parts that run the embedded model.
WITH_MODEL = ("subspace_error", "kept_positions", "time_split", "train_step", "step_ratio")


def chosen(text: str | None) -> list[str]:
    """Return the modules of the parts that `--only` names, by letter or by name, in their order; all for None.

    Raises:
        ValueError: if one is unknown; lists what there is.
    """
    everything = [module for modules in PARTS.values() for module in modules]
    if text is None:
        return everything
    wanted: set[str] = set()
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in PARTS and name not in everything:
            known = "; ".join(f"{letter}: {', '.join(modules)}" for letter, modules in PARTS.items())
            raise ValueError(f"unknown part {name!r}. Known, by letter or name: {known}. E.g. --only a,refresh_time.")
        wanted.update(PARTS.get(name, (name,)))
    if not wanted:
        raise ValueError("--only names no part. Leave it out for all of them, or give letters: --only a,b.")
    return [module for module in everything if module in wanted]


def parse(arguments: Sequence[str] | None) -> tuple[list[str], Options]:
    """Return the parts and the options that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PARTS", help="letters or names with commas, e.g. a,c (default: all)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", dest="profile", const="quick", help="smaller sizes, few rounds")
    size.add_argument("--tiny", action="store_const", dest="profile", const="tiny", help="seconds; for tests")
    parser.add_argument("--out", type=Path, default=tables.RESULTS, metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and gradients")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with e2e rows (default: CROSSLORE_DATA_DIR)")
    parser.add_argument("--contenders", metavar="NAMES", help="with commas; presets and peers (default: all)")
    given = parser.parse_args(arguments)
    try:
        parts = chosen(given.only)
        names = tuple(name.strip() for name in given.contenders.split(",")) if given.contenders else None
        options = Options(
            out=given.out,
            profile=given.profile or "full",
            device=given.device,
            dtype=given.dtype,
            threads=given.threads,
            fresh=given.fresh,
            data=given.data,
            contenders=names,
        )
        check(parts, options)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    return parts, options


def check(parts: Sequence[str], options: Options) -> None:
    """Raise a ValueError or FileNotFoundError for what would stop the run an hour later."""
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {options.threads}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here. Use --device cpu.")
    if options.contenders and not set(parts) <= {"train_step", "step_ratio"}:  # which have contenders of their own
        importlib.import_module("contenders").contenders(options)
    if options.profile != "tiny" and set(parts) & set(WITH_MODEL):
        real_model.check_model()
        if {"subspace_error", "kept_positions"} & set(parts):
            real_model.find_rows(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts one after another and draw their pictures."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parts, options = parse(arguments)
    try:
        for part in parts:
            importlib.import_module(part).run(options)
    except KeyboardInterrupt:
        print(f"\nStopped. What was finished is in {options.out / 'raw'}; the same command goes on from there.")
        return 130
    for path in [*(options.out / f"{part}.csv" for part in parts), *plots.draw_all(options.out, parts)]:
        print(path)
    return tables.main([]) if options.out.resolve() == tables.RESULTS else 0


if __name__ == "__main__":
    sys.exit(main())
