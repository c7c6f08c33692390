"""`crosslore doctor | estimate | init | presets`."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crosslore.presets import PRESETS
from crosslore.tables import print_table

# Returns the exit code, None for 0.
Command = Callable[[argparse.Namespace], int | None]

ESTIMATE_HELP = """Bytes of weights, gradients, state and activations of every method, from config.json alone.

  crosslore estimate LLaMA2-7B                                    what fits on a card of 24 GB
  crosslore estimate LLaMA3-8B --gpu-gb 48 --seq 2048 --batch 4
  crosslore estimate models/SmolLM2-135M-Instruct --dtype fp32 --preset galore --gradients layerwise
  crosslore estimate mistralai/Mistral-7B-v0.1 --json             from the hub, where it can be reached
"""
DOCTOR_HELP = """What of the stack is there and works, and what to do about the rest; a line each.

  crosslore doctor
  crosslore doctor --json
"""
INIT_HELP = """Copy the LLaMA-Factory configurations of the paper's tasks into a folder, to be changed there.

  crosslore init configs
  llamafactory-cli train configs/crosslore_gsm8k.yaml
"""
PRESETS_HELP = """The presets: what each one does in the places where the methods differ.

  crosslore presets
  crosslore presets --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 `doctor` found a problem, 2 unusable input, 130 interrupted, 141 cut off."""
    args = build_parser().parse_args(argv)
    command: Command = args.run
    try:
        code = command(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough; what Python flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; each command adds itself by a function of its own."""
    parser = argparse.ArgumentParser(
        prog="crosslore", description="Full-parameter fine-tuning in low-rank gradient space."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_doctor, add_estimate, add_init, add_presets):
        add(commands)
    return parser


def add_estimate(commands: Any) -> None:  # Any: argparse's own type is private
    """Add `crosslore estimate`."""
    parser = _command(commands, "estimate", estimate, short="what a training run takes on a GPU", text=ESTIMATE_HELP)
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="folder with config.json, a config.json, LLaMA2-7B, LLaMA2-13B, LLaMA3-8B, or a hub id",
    )
    add("--preset", default="crosslore", metavar="NAME", help="see `crosslore presets` (%(default)s)")
    add(
        "--gradients",
        default="compact",
        metavar="MODE",
        help="full, layerwise, compact or compact-layerwise (%(default)s)",
    )
    add("--weights", default="direct", metavar="MODE", help="direct or deferred (%(default)s)")
    add("--rank", type=int, default=128, help="of bases and adapters (%(default)s)")
    add("--optim", default="adamw8bit", metavar="RULE", help="adamw, adamw8bit, adafactor, ... (%(default)s)")
    add("--embeddings", default="full", metavar="HOW", help="full, lowrank or frozen (%(default)s)")
    add("--batch", type=int, default=1, help="sequences of a micro-batch (%(default)s)")
    add("--seq", type=int, default=512, help="tokens of a sequence (%(default)s)")
    add("--accumulation", type=int, default=1, help="micro-batches of a step (%(default)s)")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="gradient checkpointing (on)")
    add("--dtype", default="bf16", metavar="DTYPE", help="bf16 or fp32 (%(default)s)")
    add(
        "--gpu-gb", type=float, default=24.0, metavar="N", help="memory of the card as it is sold, in GiB (%(default)g)"
    )
    add("--cuda-gb", type=float, default=0.8, metavar="N", help="CUDA's own memory, an assumption (%(default)s)")
    add("--json", action="store_true", help="one JSON object, sizes in bytes")


def estimate(args: argparse.Namespace) -> None:
    """Print what every method takes, and what fits."""
    from crosslore.checks import check_float
    from crosslore.estimate import GIB, Estimator, Setting, chosen_method, load_config, report, side_by_side

    check_float("gpu-gb", args.gpu_gb, low=0.0, low_open=True, hint="24 is that of an RTX 4090.")
    setting = Setting(
        batch=args.batch,
        seq=args.seq,
        checkpointing=args.checkpointing,
        dtype=args.dtype,
        rank=args.rank,
        rule=args.optim,
        accumulation=args.accumulation,
        embeddings=args.embeddings,
        cuda_gb=args.cuda_gb,
    )
    chosen = chosen_method(args.preset, args.gradients, args.weights)
    estimator = Estimator(load_config(args.model))
    estimator.estimate(chosen, setting)  # what was asked for must be possible; of the others it is a row
    gpu_bytes = round(args.gpu_gb * GIB)
    rows = [report.row(estimator, method, setting, gpu_bytes) for method in side_by_side(chosen)]
    if args.json:
        print(json.dumps(report.as_json(args.model, setting, args.gpu_gb, rows=rows, chosen=chosen.name), indent=1))
        return
    print(*report.header(args.model, estimator, setting, args.gpu_gb), "", sep="\n")
    print_table(report.COLUMNS, report.table(rows, chosen.name), right=report.NUMBERS)
    refused = [f"{one['method']} is left out: {one['reason']}" for one in rows if one["status"] != "ok"]
    mine = next(one for one in rows if one["method"] == chosen.name)
    print("", *report.details(mine), *refused, sep="\n")


def add_doctor(commands: Any) -> None:  # Any: argparse's own type is private
    """Add `crosslore doctor`."""
    parser = _command(commands, "doctor", doctor, short="what of the stack works here", text=DOCTOR_HELP)
    parser.add_argument("--json", action="store_true", help="one JSON object with a list of findings")


def doctor(args: argparse.Namespace) -> int:
    """Print what was found; return 1 if there is a problem."""
    from crosslore.doctor import examine

    found = examine()
    if args.json:
        print(json.dumps({"findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        print_table(("part", "", "found"), [[one.name, one.level, one.text] for one in found])
        fixes = [f"{one.name}: {one.fix}" for one in found if one.fix]
        print(*(["", *fixes] if fixes else []), sep="\n")
    return int(any(one.level == "problem" for one in found))


def add_init(commands: Any) -> None:  # Any: argparse's own type is private
    """Add `crosslore init`."""
    parser = _command(commands, "init", init, short="copy the configurations into a folder", text=INIT_HELP)
    parser.add_argument("folder", type=Path, metavar="DIR", help="created if need be; no file there is replaced")


def init(args: argparse.Namespace) -> None:
    """Copy the configurations, all or none.

    Raises:
        ValueError: if the folder has one of the files, or is none.
    """
    package = Path(__file__).parent
    source = next(place for place in (package / "templates", package.parents[1] / "yaml_configs") if place.is_dir())
    files = sorted(source.glob("*.yaml"))
    there = [file.name for file in files if os.path.lexists(args.folder / file.name)]  # a broken link is a file too
    if there:
        raise ValueError(f"{args.folder} has {', '.join(there)} already. Name another folder, or remove them.")
    if args.folder.exists() and not args.folder.is_dir():
        raise ValueError(f"DIR must be a folder, got the file {args.folder}. Name another one.")
    args.folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    try:
        for file in files:
            with (args.folder / file.name).open("xb") as copy:
                made.append(args.folder / file.name)
                copy.write(file.read_bytes())
    except OSError:
        for path in made:
            path.unlink()
        raise
    print(*made, sep="\n")


def add_presets(commands: Any) -> None:  # Any: argparse's own type is private
    """Add `crosslore presets`."""
    parser = _command(commands, "presets", presets, short="the methods, and what each one does", text=PRESETS_HELP)
    parser.add_argument("--json", action="store_true", help="one JSON object with every option")


def presets(args: argparse.Namespace) -> None:
    """Print the presets."""
    if args.json:
        print(json.dumps({name: asdict(preset) for name, preset in PRESETS.items()}, indent=1))
        return
    columns = ("preset", "projector", "refresh", "moments", "residual", "rule", "paper")
    rows = []
    for name, preset in PRESETS.items():
        config = preset.config
        shared = f", heads of {', '.join(config.cross_head_targets)} share one" if config.cross_head_targets else ""
        staggered = ", staggered" if config.refresh_stagger else ""
        kept = f" {config.residual_ratio:.1%}" if config.residual_ratio else ""
        rows.append([
            name, config.first_projector + shared, f"{config.refresh_every}{staggered}", config.moments,
            f"{config.residual or 'none'}{kept}", config.rule, preset.paper,
        ])  # fmt: skip
    print_table(columns, rows)


def _command(commands: Any, name: str, run: Command, *, short: str, text: str) -> argparse.ArgumentParser:
    """Return a new command's parser; `run` is what it does."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=short, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
