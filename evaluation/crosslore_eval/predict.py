"""Outputs of a model for a task, in a file that an interrupted run continues."""

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from crosslore_eval import manifest as manifests
from crosslore_eval.engines import Engine, load_engine, where_and_how
from crosslore_eval.errors import EvalError
from crosslore_eval.generate import Answer, Decoding, batches_of
from crosslore_eval.models import check_model, model_hash
from crosslore_eval.prompts import MODEL_TEMPLATE, Prompts, cut, stops_of, write_prompts
from crosslore_eval.tasks.base import Example, Task

logger = logging.getLogger(__name__)

# JSON values of one line of the predictions file.
Line = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a model's outputs for a task depend on."""

    # folder or hub name
    model: str
    decoding: Decoding
    # one of prompts.TEMPLATES, or the model's own
    template: str = MODEL_TEMPLATE
    # instead of the task's
    instruction: str | None = None
    # prompts at once; part of the identity, because padding may change the last bits of a sum
    batch_size: int = 16
    # transformers or vllm
    engine: str = "transformers"
    # torch device; None: CUDA when there is one
    device: str | None = None
    # auto: bf16 on a GPU, fp32 on a CPU
    dtype: str = "auto"
    # longer prompts lose the end of their input; None: what the model's context leaves
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        temperature = self.decoding.temperature
        checks = [
            ("batch-size", self.batch_size, self.batch_size >= 1, ">= 1"),
            ("max-new-tokens", self.decoding.max_new_tokens, self.decoding.max_new_tokens >= 1, ">= 1"),
            (
                "temperature",
                temperature,
                temperature == 0 or 0.01 <= temperature <= 100,
                "0 (greedy) or in [0.01, 100]",
            ),
            ("top-p", self.decoding.top_p, 0 < self.decoding.top_p <= 1, "in (0, 1]"),
            ("top-k", self.decoding.top_k, self.decoding.top_k >= 0, ">= 0 (0 is all)"),
            (
                "max-prompt-tokens",
                self.max_prompt_tokens,
                self.max_prompt_tokens is None or self.max_prompt_tokens >= 1,
                ">= 1",
            ),
        ]
        for name, value, holds, allowed in checks:
            if not holds:
                raise EvalError(f"--{name} must be {allowed}, got {value}.")


def predict(task: Task, examples: Sequence[Example], settings: Settings, out: Path, *, overwrite: bool = False) -> Path:
    """Return `out` after it holds one line of JSON for each example, in their order.

    An interrupted run leaves its finished batches in `<out>.partial`; called again with the same settings it goes on
    there, and the finished file is the one that an uninterrupted run writes.

    Args:
        task: whose stop rules cut the outputs.
        examples: to answer.
        settings: of model, prompt and decoding; written to `<out>.manifest.json`.
        out: .jsonl file.
        overwrite: start anew whatever is there; a finished file is replaced when the new one is whole.

    Raises:
        EvalError: if `out` or its partial file was made with other settings.
    """
    check_model(settings.model)
    if settings.instruction is not None:
        examples = [replace(example, instruction=settings.instruction) for example in examples]
    _prepare_folder(out)
    identity = _identity(task, examples, settings)
    partial = manifests.partial_path(out)
    with _only_writer(out):
        if overwrite:  # the old file stays until the new one is whole; a partial file says that this is under way
            partial.write_bytes(b"")
            manifests.write_manifest(out, {**identity, "model": settings.model})
        elif out.is_file() and not partial.is_file():
            manifests.check_same(out, identity)
            logger.warning("%s is finished already: nothing generated (--overwrite starts anew)", out)
            return out
        elif partial.is_file():
            manifests.check_same(out, identity)
        else:
            manifests.write_manifest(out, {**identity, "model": settings.model})
        _generate(task, examples, settings, out, identity)
    return out


def _prepare_folder(out: Path) -> None:
    if out.is_dir():
        raise EvalError(f"--out must be a file, got the folder {out}.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvalError(f"--out: cannot make the folder {out.parent}: {error.strerror}.") from error


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Hold a lock beside `out`, where the system has such locks; a process that ends, however, lets go of it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = out.with_name(f"{out.name}.lock")
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise EvalError(f"another process is writing {out}. Wait for it, or choose another --out.") from error
            try:
                is_current = os.fstat(file.fileno()).st_ino == path.stat().st_ino
            except FileNotFoundError:
                is_current = False
            if not is_current:  # its last holder removed it after we had opened it: what we hold locks nobody out
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _identity(task: Task, examples: Sequence[Example], settings: Settings) -> manifests.Manifest:
    """Return what must be equal for a run to go on; the model by its content, not by where it is."""
    held = asdict(settings)
    del held["model"]
    return {
        "task": task.name,
        "task_version": task.version,
        "examples": len(examples),
        "examples_sha256": manifests.examples_hash(examples),
        "model_sha256": model_hash(settings.model),
        "settings": held,
        "computed_in": where_and_how(settings.engine, device=settings.device, dtype=settings.dtype),
        "versions": manifests.versions(),
    }


def _generate(
    task: Task, examples: Sequence[Example], settings: Settings, out: Path, identity: manifests.Manifest
) -> None:
    engine = load_engine(settings.engine, settings.model, device=settings.device, dtype=settings.dtype)
    limit = _prompt_limit(engine, settings)
    prompts = write_prompts(engine.tokenizer, examples, template=settings.template, limit=limit)
    if prompts.shortened:
        logger.warning(
            "%d of %d prompts were too long: the end of their input is cut", prompts.shortened, len(examples)
        )
    batches = batches_of([len(tokens) for tokens in prompts.tokens], settings.batch_size)
    partial = manifests.partial_path(out)
    done = _continue_from(partial, batches, prompts)
    stops = (*task.stop, *stops_of(settings.template))
    with partial.open("a", encoding="utf-8", newline="\n") as file:
        for answers in _with_progress(engine, prompts, batches[done:], settings, total=len(examples)):
            lines = [_line(answer, examples[answer.index], prompts, stops) for answer in answers]
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
    lines = sorted(_read_lines(partial), key=lambda line: int(str(line["index"])))
    summary = _summary(lines, prompts, engine)
    if summary["cut_at_max_new_tokens"]:
        logger.warning(
            "%s of %d outputs were cut at --max-new-tokens %d",
            summary["cut_at_max_new_tokens"],
            len(lines),
            settings.decoding.max_new_tokens,
        )
    manifests.write_manifest(out, {**identity, "model": settings.model, "summary": summary})
    manifests.write_atomically(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    partial.unlink()


def _prompt_limit(engine: Engine, settings: Settings) -> int | None:
    """Return the most tokens of a prompt, or None if nothing limits them."""
    if engine.context is None:
        return settings.max_prompt_tokens
    limit = engine.context - settings.decoding.max_new_tokens
    if limit < 1:
        raise EvalError(
            f"--max-new-tokens must be below the model's context of {engine.context} tokens, got "
            f"{settings.decoding.max_new_tokens}."
        )
    return limit if settings.max_prompt_tokens is None else min(limit, settings.max_prompt_tokens)


def _continue_from(partial: Path, batches: Sequence[Sequence[int]], prompts: Prompts) -> int:
    """Return how many batches the partial file holds, after cutting off what follows the last whole one."""
    if not partial.is_file():
        return 0
    lines = partial.read_bytes().split(b"\n")[:-1]  # a line without its end was being written
    done, position, size = 0, 0, 0
    for batch in batches:
        rows = lines[position : position + len(batch)]
        if len(rows) < len(batch) or not all(
            _matches(row, index, prompts) for row, index in zip(rows, batch, strict=True)
        ):
            break
        done, position = done + 1, position + len(batch)
        size += sum(len(row) + 1 for row in rows)
    os.truncate(partial, size)
    return done


def _matches(row: bytes, index: int, prompts: Prompts) -> bool:
    try:
        line = json.loads(row)
        return bool(line["index"] == index and line["prompt_sha256"] == prompts.sha256(index))
    except (ValueError, KeyError, TypeError):
        return False


def _with_progress(
    engine: Engine, prompts: Prompts, batches: Sequence[Sequence[int]], settings: Settings, *, total: int
) -> Iterator[list[Answer]]:
    """Yield each batch's answers under a progress bar with rows and tokens per second."""
    left = sum(map(len, batches))
    started, tokens = time.perf_counter(), 0
    with tqdm(total=total, initial=total - left, desc="generating", unit="row") as bar:
        for answers in _out_of_memory_said(engine.answers(prompts.tokens, batches, settings.decoding), settings):
            yield answers
            tokens += sum(answer.tokens for answer in answers)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):.1f} tokens/s", refresh=False)
            bar.update(len(answers))


def _out_of_memory_said(answers: Iterator[list[Answer]], settings: Settings) -> Iterator[list[Answer]]:
    import torch

    try:
        yield from answers
    except torch.OutOfMemoryError as error:
        raise EvalError(
            f"the GPU has too little memory for {settings.batch_size} prompts at once. Give a smaller --batch-size "
            "(with --overwrite if a partial file is there)."
        ) from error


def _line(answer: Answer, example: Example, prompts: Prompts, stops: tuple[str, ...]) -> Line:
    prediction = cut(answer.text, stops)
    return {
        "index": answer.index,
        "prompt_sha256": prompts.sha256(answer.index),
        "input": example.input,
        "prediction": prediction,
        "references": list(example.references),
        "tokens": answer.tokens,
        "finish": "stop" if prediction != answer.text.strip() else answer.finish,
    }


def _read_lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _summary(lines: Sequence[Line], prompts: Prompts, engine: Engine) -> dict[str, object]:
    return {
        "new_tokens": sum(int(str(line["tokens"])) for line in lines),
        "cut_at_max_new_tokens": sum(line["finish"] == "length" for line in lines),
        "prompts_shortened": prompts.shortened,
        "device": engine.device,
        "dtype": engine.dtype,
    }
