"""Fine-tune the embedded model with the stock LLaMA-Factory command line and show what that changed.

Scores held-out rows of the bundled data, runs `llamafactory-cli train yaml_configs/crosslore_demo.yaml`, scores the
same rows again, prints a table, and leaves everything in one folder: `demo.json`, `loss.png`, `train.log`, the
outputs (`before_<task>.jsonl`, `after_<task>.jsonl`), and the trained model (`train/`).

    python scripts/get_model.py                  # once
    python scripts/demo.py                       # minutes on 2 CPU cores; uses a GPU when there is one
    python scripts/demo.py --skip-training       # score the model of an earlier run again
"""

import argparse
import hashlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from demo_report import draw_losses, print_report, read_losses
from demo_training import INSTALL_LINE, REPO_ROOT, DemoError, is_finished, peak_rss_gib, train

DEFAULT_CONFIG = REPO_ROOT / "yaml_configs" / "crosslore_demo.yaml"
DEFAULT_OUTPUT = REPO_ROOT / "saves" / "demo"
# Both evaluations together took 92 + 71 s on 2 CPU cores that were not quite idle.
DEFAULT_ROWS = 40
BATCH_SIZE = 40
PACKAGES = ("llamafactory", "transformers", "sacrebleu", "pycocoevalcap", "rich", "matplotlib", "yaml")


# The bundled tasks of `crosslore-eval`, and the score of each that the table shows.
TASKS = {"restaurants": "BLEU", "arithmetic": "accuracy_strict"}


def read_config(path: Path) -> dict[str, Any]:
    """Return the LLaMA-Factory configuration, with model and data folders resolved and checked."""
    import yaml

    if not path.is_file():
        raise DemoError(f"--config must be a YAML file, got {path}, which is not there.")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    absent = [key for key in ("model_name_or_path", "dataset_dir") if not isinstance(config, dict) or key not in config]
    if absent:
        raise DemoError(f"{path} must set {' and '.join(absent)}. Take {DEFAULT_CONFIG} as the pattern.")
    model, data = (REPO_ROOT / str(config[key]) for key in ("model_name_or_path", "dataset_dir"))
    if not (model / "config.json").is_file():
        raise DemoError(f"no model in {model}. Make it with: python scripts/get_model.py")
    for task in TASKS:
        if not held_out_file(data, task).is_file():
            raise DemoError(f"no {held_out_file(data, task)}. Make it with: python scripts/make_bundled_data.py")
    return {**config, "model_name_or_path": model, "dataset_dir": data}


def held_out_file(data: Path, task: str) -> Path:
    """Return the path of a task's held-out rows."""
    return data / f"{task}_test.json"


def check_rows(data: Path, count: int) -> None:
    """Raise `DemoError` unless every task has that many held-out rows."""
    for task in TASKS:
        held = len(json.loads(held_out_file(data, task).read_text(encoding="utf-8")))
        if not 1 <= count <= held:
            raise DemoError(f"--rows must be in [1, {held}] for {held_out_file(data, task).name}, got {count}.")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def model_key(folder: Path) -> str:
    """Return what identifies a model: the stamp of `get_model.py`, or its files' names, sizes and times."""
    stamp = folder / "crosslore_model.json"
    if stamp.is_file():
        return sha256_of(stamp)
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())
    return hashlib.sha256(repr(files).encode()).hexdigest()


def evaluate(model: Path, data: Path, rows: int, *, stem: Path) -> dict[str, Any]:
    """Return scores, seconds and peak memory of one model on the first held-out rows of each task.

    Its outputs are in `<stem>_<task>.jsonl`, as `crosslore-eval predict` writes them.
    """
    from crosslore_eval.inputs import read_outputs
    from crosslore_eval.protocols import find_protocol
    from crosslore_eval.scoring import corpus_of, references_of, score_corpus
    from crosslore_eval.tasks import find_task

    started = time.perf_counter()
    result: dict[str, Any] = {"scores": {}, "predictions": {}}
    for name, metric in TASKS.items():
        task = find_task(name)
        out = write_outputs(name, model, data, rows, out=stem.with_name(f"{stem.name}_{name}.jsonl"))
        outputs = read_outputs(out)
        references = references_of(outputs, task=task, file=None, data=None, split=None)
        report = score_corpus(task, find_protocol(task.protocols, None), corpus_of(outputs, references, task=task))
        scores = report.as_json()["scores"]
        result["scores"][name] = {"metric": metric, **scores[metric], "rows": report.n, "all": scores}
        result["predictions"][name] = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    result["seconds"] = time.perf_counter() - started
    result["peak_rss_gib"] = peak_rss_gib(resource.RUSAGE_SELF)
    return result


def write_outputs(name: str, model: Path, data: Path, rows: int, *, out: Path) -> Path:
    """Return the file of a model's outputs for the first held-out rows of a task, written or continued."""
    from crosslore_eval.errors import EvalError
    from crosslore_eval.generate import Decoding
    from crosslore_eval.predict import Settings, predict
    from crosslore_eval.tasks import find_task
    from crosslore_eval.tasks.loading import load_rows

    task = find_task(name)
    examples = task.examples(load_rows(task, task.split(None), folder=data))[:rows]
    decoding = Decoding(max_new_tokens=task.max_new_tokens)
    settings = Settings(model=str(model), decoding=decoding, template="chatml", batch_size=BATCH_SIZE)
    try:
        return predict(task, examples, settings, out)
    except EvalError:  # outputs of an earlier demo, of another model: what else is wrong is raised again
        return predict(task, examples, settings, out, overwrite=True)


def evaluate_cached(file: Path, key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the evaluation that `file` holds for exactly `key`, or compute it and write the file."""
    try:
        held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if held["key"] == key:
            print(f"already scored: {file}")
            return held
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no usable file: score now
    result = {"key": key, **compute()}
    write_json(file, result)
    return result


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is complete or not there."""
    part = file.with_name(file.name + ".part")
    text = json.dumps(content, indent=2, ensure_ascii=False).replace(f"{REPO_ROOT}{os.sep}", "")  # no machine's paths
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, file)


def evaluation_key(model: str, data: Path, rows: int) -> dict[str, Any]:
    """Return all that an evaluation's scores depend on."""
    from crosslore_eval import __version__

    files = [file for task in TASKS for file in sorted(data.glob(f"{task}_test*"))]
    hashes = {file.name: sha256_of(file) for file in files}
    return {"model": model, "data_sha256": hashes, "rows": rows, "crosslore_eval": __version__}


def git_commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" when files differ from it, or None outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def summarise(config: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """Return the content of `demo.json`: settings, versions, and what `parts` measured."""
    names = ("torch", "transformers", "llamafactory", "sacrebleu")
    return {
        "status": "ok",
        "method": str(config.get("finetuning_type")),
        "config": {key: value if isinstance(value, int | float | str) else str(value) for key, value in config.items()},
        "commit": git_commit(),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in names}},
        **parts,
    }


def run_demo(*, config_file: Path, folder: Path, rows: int, skip_training: bool) -> dict[str, Any]:
    """Return the summary of the whole demo: evaluate, train, evaluate, write files.

    Raises:
        DemoError: if something that the demo needs is missing, or training fails.
    """
    require_packages()
    config = read_config(config_file)
    model, data, trained = config["model_name_or_path"], config["dataset_dir"], folder / "train"
    if skip_training and not is_finished(trained):
        raise DemoError(f"--skip-training needs a finished run in {trained}. Train first: python scripts/demo.py")
    check_rows(data, rows)
    folder.mkdir(parents=True, exist_ok=True)
    key = evaluation_key(model_key(model), data, rows)
    print(f"1/3 scoring {rows} held-out rows of each task before training", flush=True)
    before = evaluate_cached(folder / "before.json", key, lambda: evaluate(model, data, rows, stem=folder / "before"))
    print("2/3 training", flush=True)
    training = None if skip_training else train(config_file, trained)
    print("3/3 scoring the same rows after training", flush=True)
    key = evaluation_key(model_key(trained), data, rows)
    after = evaluate_cached(folder / "after.json", key, lambda: evaluate(trained, data, rows, stem=folder / "after"))
    parts = {"before": before, "training": training, "after": after, "losses": read_losses(trained)}
    if parts["losses"]:
        draw_losses(parts["losses"], folder / "loss.png")
    summary = summarise(config, parts)
    write_json(folder / "demo.json", {**summary, "before": without_texts(before), "after": without_texts(after)})
    return summary


def without_texts(result: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation without its predictions, which have a file of their own."""
    return {key: value for key, value in result.items() if key != "predictions"}


def require_packages() -> None:
    """Raise `DemoError` with the install line unless everything that the demo imports is there."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"not installed for {sys.executable}: {', '.join(missing)}. Install with: {INSTALL_LINE}")


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 when the demo ran to its end, 1 with a message, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description="Fine-tune the embedded model and compare before and after.")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="LLaMA-Factory YAML (%(default)s)")
    parser.add_argument("--rows", type=int, default=DEFAULT_ROWS, help="held-out rows per task (%(default)s)")
    parser.add_argument("--skip-training", action="store_true", help="score the model that an earlier run trained")
    parser.add_argument("--output-dir", type=Path, default=DEFAULT_OUTPUT, help="folder of all results (%(default)s)")
    args = parser.parse_args(argv)
    folder, config_file = args.output_dir.absolute(), args.config.absolute()
    try:
        summary = run_demo(config_file=config_file, folder=folder, rows=args.rows, skip_training=args.skip_training)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\ninterrupted. Run it again: training goes on from its last checkpoint, if it has one by now.",
            file=sys.stderr,
        )
        return 130
    print_report(summary, folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
