"""`crosslore-eval predict | score | run | compare | tasks`."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from crosslore_eval import bootstrap, report
from crosslore_eval.errors import EvalError
from crosslore_eval.inputs import read_outputs
from crosslore_eval.options import build_parser
from crosslore_eval.protocols import Missing, find_protocol
from crosslore_eval.scoring import Report, compare_corpora, corpus_of, references_of, score_corpus
from crosslore_eval.tasks import TASKS, find_task
from crosslore_eval.tasks.base import Example, Task
from crosslore_eval.tasks.loading import load_rows

SCORING_PACKAGES = ("numpy", "sacrebleu", "nltk", "rouge_score", "rouge_chinese", "jieba", "pycocoevalcap", "rich")
GENERATION_PACKAGES = ("torch", "transformers", "tqdm")
MOST_SAMPLES = 1_000_000
DEFAULT_OUT = Path("saves") / "eval"


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 failed, 2 unusable input, 130 interrupted."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    parser = build_parser()
    args = parser.parse_args(argv)
    commands: dict[str, Callable[[argparse.Namespace], None]] = {
        "predict": predict, "score": score, "run": run, "compare": compare, "tasks": tasks,
    }  # fmt: skip
    try:
        commands[args.command](args)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in (*SCORING_PACKAGES, *GENERATION_PACKAGES, "matplotlib"):
            raise
        print(f'error: {package} is not installed. Install with: pip install "crosslore[eval]"', file=sys.stderr)
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


def _check_samples(name: str, samples: int) -> None:
    if not (0 if name == "confidence" else 1) <= samples <= MOST_SAMPLES:
        raise EvalError(f"--{name} must be a number of bootstrap samples in [1, {MOST_SAMPLES}], got {samples}.")


def _check_scoring(args: argparse.Namespace) -> None:
    """Raise for a wrong option of scoring before the long part."""
    find_protocol(find_task(args.task).protocols, args.protocol)
    _check_samples("confidence", args.confidence)
    report.check_picture(args.plot)


def score(args: argparse.Namespace) -> None:
    """Score outputs."""
    _check_scoring(args)
    _score(args, args.predictions, references_file=args.references, data=args.data)


def _score(args: argparse.Namespace, predictions: Path, *, references_file: Path | None, data: Path | None) -> None:
    task = find_task(args.task)
    outputs = read_outputs(predictions)
    references = references_of(outputs, task=task, file=references_file, data=data, split=args.split)
    protocol = find_protocol(task.protocols, args.protocol)
    found = score_corpus(task, protocol, corpus_of(outputs, references, task=task), samples=args.confidence)
    for result in found.scores:
        if result.value is None:
            print(f"warning: {result.name} was not computed: {result.reason}", file=sys.stderr)
    _show(found, args)
    if args.plot is not None:
        report.draw({predictions.stem: found}, args.plot)


def _show(found: Report, args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        report.print_report(found)


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
    _check_samples("samples", args.samples)
    report.check_picture(args.plot)
    corpora = []
    for path in (args.a, args.b):
        outputs = read_outputs(path)
        references = references_of(outputs, task=task, file=args.references, data=args.data, split=args.split)
        corpora.append(corpus_of(outputs, references, task=task))
    found = compare_corpora(protocol, *corpora, samples=args.samples)
    title = f"{task.name}, protocol {protocol.name}, {len(corpora[0].predictions)} examples, A {args.a}, B {args.b}"
    if args.json:
        scores = {
            name: {"value": None, "error": result.reason}
            if isinstance(result, Missing)
            else {
                "a": result.value_a,
                "b": result.value_b,
                "difference": result.value_b - result.value_a,
                "confidence_95": [result.interval.low, result.interval.high],
                "p_value": result.p_value,
            }
            for name, result in found.items()
        }
        bootstrapped = {"samples": args.samples, "seed": bootstrap.DEFAULT_SEED}
        fields = {"task": task.name, "protocol": protocol.name, "n": len(corpora[0].predictions)}
        print(json.dumps({**fields, "bootstrap": bootstrapped, "scores": scores}, indent=2))
    else:
        report.print_comparison(title, found)
    if args.plot is not None:
        systems = zip((args.a, args.b), corpora, strict=True)
        named = {f"{letter} {path.stem}": (path, corpus) for letter, (path, corpus) in zip("AB", systems, strict=True)}
        reports = {name: score_corpus(task, protocol, c, samples=args.samples) for name, (_, c) in named.items()}
        report.draw(reports, args.plot)


def tasks(args: argparse.Namespace) -> None:
    """List the tasks."""
    described = {
        name: {
            "summary": task.summary,
            "version": task.version,
            "protocols": {protocol.name: protocol.summary for protocol in task.protocols},
            "splits": {split.name: split.rows for split in task.splits},
            "files": [split.file for split in task.splits],
            "hub": task.hub.path if task.hub else None,
            "max_new_tokens": task.max_new_tokens,
        }
        for name, task in TASKS.items()
    }
    if args.json:
        print(json.dumps(described, indent=2))
        return
    for name, task in TASKS.items():
        print(f"{name}: {task.summary} (version {task.version})")
        for protocol in task.protocols:
            print(f"  --protocol {protocol.name}: {protocol.summary}")
        print(f"  data: {', '.join(f'{split.file} ({split.rows} rows)' for split in task.splits)}")
        print(f"  hub: {task.hub.path if task.hub else 'none'}")
