"""Outputs of a model for a task, in a file that an interrupted run continues."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from crosslore_eval import manifest as manifests
from crosslore_eval.checkpoints import adapter_base, check_model, model_hash, named_base
from crosslore_eval.engines import Engine, load_engine, where_and_how
from crosslore_eval.errors import EvalError
from crosslore_eval.generate import Answer, batches_of
from crosslore_eval.models import load_tokenizer
from crosslore_eval.outfile import check_out, only_writer
from crosslore_eval.progress import with_progress
from crosslore_eval.prompts import Prompts, cut, prompt_writer, stops_of, write_prompts
from crosslore_eval.settings import Settings
from crosslore_eval.tasks.base import Example, Task

logger = logging.getLogger(__name__)

# JSON values of one line of the predictions file.
Line = dict[str, object]


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
        EvalError: if `out` cannot be written, the model cannot be loaded, or `out` or its partial file was made with
            other settings.
    """
    check_out(out)
    check_model(settings.model, base=settings.base_model)
    if settings.instruction is not None:
        asked = [replace(example, instruction=settings.instruction) for example in examples]
        if asked == list(examples):  # the task's own, given by name
            settings = replace(settings, instruction=None)
        examples = asked
    identity = _identity(task, examples, settings)
    partial = manifests.partial_path(out)
    with only_writer(out):
        goes_on = not overwrite and (partial.is_file() or out.is_file())
        if goes_on:
            manifests.check_same(out, identity)
            if not partial.is_file():
                logger.warning("%s is finished already: nothing generated (--overwrite starts anew)", out)
                return out
        engine, prompts = _prepared(examples, settings)  # before anything is written: it may fail
        if overwrite:  # the old file stays until the new one is whole; a partial file says that this is under way
            partial.write_bytes(b"")
        if not goes_on:
            manifests.write_manifest(out, {**identity, "model": settings.model})
        try:
            _generate(task, examples, settings, out, identity, engine=engine, prompts=prompts)
        except KeyboardInterrupt as stop:
            again = " without --overwrite" if overwrite else ""
            raise KeyboardInterrupt(f"Run it again{again}: it goes on where it was.") from stop
    return out


def _identity(task: Task, examples: Sequence[Example], settings: Settings) -> manifests.Manifest:
    """Return what must be equal for a run to go on; the model by its content, not by where it is."""
    computed_in = where_and_how(settings.engine, device=settings.device, dtype=settings.dtype)
    return {
        "task": task.name,
        "task_version": task.version,
        "examples": len(examples),
        "examples_sha256": manifests.examples_hash(examples),
        "model_sha256": model_hash(settings.model, base=settings.base_model),
        "settings": settings.identity(),
        "computed_in": computed_in,
        "versions": manifests.versions(),
    }


def _prepared(examples: Sequence[Example], settings: Settings) -> tuple[Engine, Prompts]:
    """Return the engine with its model, and the prompts; a missing chat template is found before the long part."""
    prompt_writer(settings.template, load_tokenizer(settings.model, base=settings.base_model))
    _say_base(settings)
    engine = load_engine(
        settings.engine, settings.model, device=settings.device, dtype=settings.dtype, base=settings.base_model
    )
    limit = _prompt_limit(engine, settings)
    prompts = write_prompts(engine.tokenizer, examples, template=settings.template, limit=limit)
    if prompts.shortened:
        logger.warning(
            "%d of %d prompts were too long: the end of their input is cut", prompts.shortened, len(examples)
        )
    return engine, prompts


def _say_base(settings: Settings) -> None:
    """Warn if an adapter's base was found elsewhere than at the path that it names."""
    base = adapter_base(settings.model, base=settings.base_model)
    if settings.base_model is None and base != named_base(settings.model):
        logger.warning("the base model of the LoRA adapter %s is taken from %s", settings.model, base)


def _generate(
    task: Task,
    examples: Sequence[Example],
    settings: Settings,
    out: Path,
    identity: manifests.Manifest,
    *,
    engine: Engine,
    prompts: Prompts,
) -> None:
    batches = batches_of([len(tokens) for tokens in prompts.tokens], settings.batch_size)
    partial = manifests.partial_path(out)
    done = _continue_from(partial, batches, prompts)
    stops = (*task.stop, *stops_of(settings.template))
    with partial.open("a", encoding="utf-8", newline="\n") as file:
        for answers in with_progress(engine, prompts.tokens, batches=batches[done:], settings=settings):
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
