"""`crosslore-eval predict | score | run | compare | tasks`."""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from crosslore_eval import picture, report
from crosslore_eval.comparison import Comparison, check_same_references, compare_results
from crosslore_eval.errors import EvalError, missing_package
from crosslore_eval.options import build_parser
from crosslore_eval.protocols import Results, find_protocol
from crosslore_eval.scoring import Report, read_corpus, report_of, warnings_of
from crosslore_eval.tasks import TASKS, find_task
from crosslore_eval.tasks.base import Example, Task
from crosslore_eval.tasks.loading import load_rows

DEFAULT_OUT = Path("saves") / "eval"


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 failed, 2 unusable input, 130 interrupted, 141 cut off."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    parser = build_parser()
    args = parser.parse_args(argv)
    commands: dict[str, Callable[[argparse.Namespace], None]] = {
        "predict": predict, "score": score, "run": run, "compare": compare, "tasks": tasks,
    }  # fmt: skip
    try:
        commands[args.command](args)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; what Python flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        message = missing_package(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:  # says how to go on, if rows are under way
        print("\n" + " ".join(["interrupted.", *map(str, stop.args)]), file=sys.stderr)
        return 130
    return 0


def predict(args: argparse.Namespace) -> None:
    """Write a model's outputs."""
    out = _predict(args, args.out)
    print(f"{out}\nNext: crosslore-eval score {args.task} --predictions {out}", file=sys.stderr)


def _predict(args: argparse.Namespace, out: Path) -> Path:
    from crosslore_eval.generate import Decoding
    from crosslore_eval.predict import predict as write_predictions
    from crosslore_eval.settings import Settings

    task = find_task(args.task)
    decoding = Decoding(
        max_new_tokens=task.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
    )
    settings = Settings(
        model=args.model,
        base_model=args.base_model,
        decoding=decoding,
        template=args.template,
        instruction=args.instruction,
        batch_size=args.batch_size,
        engine=args.engine,
        device=args.device,
        dtype=args.dtype,
        max_prompt_tokens=args.max_prompt_tokens,
    )
    return write_predictions(task, _examples(task, args), settings, out, overwrite=args.overwrite)


def _examples(task: Task, args: argparse.Namespace) -> list[Example]:
    examples = task.examples(load_rows(task, task.split(args.split), folder=args.data))
    if args.limit is not None and not 1 <= args.limit <= len(examples):
        raise EvalError(f"--limit must be in [1, {len(examples)}] for {task.name}, got {args.limit}.")
    return examples[: args.limit]


def _check_scoring(args: argparse.Namespace) -> None:
    """Raise for a wrong option of scoring before the long part."""
    find_protocol(find_task(args.task).protocols, args.protocol)
    picture.check_picture(args.plot)


def score(args: argparse.Namespace) -> None:
    """Score outputs."""
    _check_scoring(args)
    _score(args, args.predictions, references_file=args.references, data=args.data)


def _score(args: argparse.Namespace, predictions: Path, *, references_file: Path | None, data: Path | None) -> None:
    task = find_task(args.task)
    corpus = read_corpus(predictions, task=task, references=references_file, data=data, split=args.split)
    protocol = find_protocol(task.protocols, args.protocol)
    results = protocol.score(corpus)
    _warn(results)
    found = report_of(task.name, protocol, corpus, results, samples=args.confidence)
    _show(found, args)
    if args.plot is not None:
        picture.draw({predictions.stem: found}, args.plot)


def _warn(results: Results) -> None:
    for warning in warnings_of(results):
        print(f"warning: {warning}", file=sys.stderr)


def _show(found: Report | Comparison, args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    elif isinstance(found, Report):
        report.print_report(found)
    else:
        report.print_comparison(found)


def run(args: argparse.Namespace) -> None:
    """Predict, then score."""
    _check_scoring(args)
    out = args.out or DEFAULT_OUT / f"{_model_name(args.model)}--{args.task}.jsonl"
    written = _predict(args, out)
    print(written, file=sys.stderr)
    _score(args, written, references_file=None, data=None)


def _model_name(model: str) -> str:
    """Return a file name for a model: the last two parts of its path, so that checkpoints keep their run's name."""
    parts = [part for part in Path(model).parts if part not in ("/", ".", "..")]
    return "--".join(parts[-2:]) or "model"


def compare(args: argparse.Namespace) -> None:
    """Compare two systems on the same examples."""
    task = find_task(args.task)
    protocol = find_protocol(task.protocols, args.protocol)
    picture.check_picture(args.plot)
    a, b = (
        read_corpus(path, task=task, references=args.references, data=args.data, split=args.split)
        for path in (args.a, args.b)
    )
    check_same_references(a, b)
    results = {"A": protocol.score(a), "B": protocol.score(b)}
    _warn(results["A"])
    found = Comparison(
        task=task.name,
        protocol=protocol.name,
        n=len(a.predictions),
        a=str(args.a),
        b=str(args.b),
        samples=args.samples,
        scores=compare_results(protocol, results["A"], results["B"], samples=args.samples),
    )
    _show(found, args)
    if args.plot is not None:
        corpora = {"A": (args.a, a), "B": (args.b, b)}
        reports = {
            f"{letter} {path}": report_of(task.name, protocol, corpus, results[letter], samples=args.samples)
            for letter, (path, corpus) in corpora.items()
        }
        picture.draw(reports, args.plot)


def tasks(args: argparse.Namespace) -> None:
    """List the tasks."""
    if args.json:
        print(json.dumps({name: _described(task) for name, task in TASKS.items()}, indent=2))
        return
    for name, task in TASKS.items():
        print(f"{name}: {task.summary} (version {task.version})")
        for protocol in task.protocols:
            print(f"  --protocol {protocol.name}: {protocol.summary}")
        for short, split in task.splits_by_name.items():
            default = ", the default" if short == task.test_split else ""
            print(f"  --split {short}{default}: {split.file} ({split.rows} rows)")
        print(f"  hub: {task.hub.path if task.hub else 'none'}")


def _described(task: Task) -> dict[str, object]:
    splits = {name: {"file": split.file, "rows": split.rows} for name, split in task.splits_by_name.items()}
    return {
        "summary": task.summary,
        "version": task.version,
        "protocols": {protocol.name: protocol.summary for protocol in task.protocols},
        "splits": splits,
        "default_split": task.test_split,
        "hub": task.hub.path if task.hub else None,
        "max_new_tokens": task.max_new_tokens,
    }
