"""One cell, from its configuration to its result file; what an interrupted one has done is not done again."""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from demo_training import plan_training, training_command

from reproduction.cells import TUNING, Experiment
from reproduction.configs import PROTOCOLS, config_hash, evaluation_command, training_config
from reproduction.facts import commit, device, packages
from reproduction.outcome import CellFailed, failure, held_out, read_json, score_of, without_folder
from reproduction.processes import Processes
from reproduction.results import (
    DataFile,
    Result,
    ResultError,
    Score,
    Status,
    read_result,
    result_path,
    write_result,
)

# Beside the protocol of the paper's columns: multi-reference scores.
OFFICIAL = "e2e-official"
ATTEMPTS = 2


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all cells of a run have in common."""

    # model identifier -> folder or hub name
    models: Mapping[str, str]
    # folder with the prepared rows, and by data set what they are
    data: Path
    files: Mapping[str, Mapping[str, DataFile]]
    work: Path
    results: Path
    threads: int
    # whether trained models stay after they were scored
    keep: bool
    processes: Processes


def data_of(exp: Experiment, setup: Setup) -> dict[str, DataFile]:
    """Return the rows that a cell trains on and is measured on."""
    files = setup.files[exp.dataset]
    return {"train": files["train"], "test": files["dev" if exp.table == TUNING else "test"]}


def finished(exp: Experiment, setup: Setup) -> Result | None:
    """Return the result of a cell if it is there for just this configuration and data; failed ones run again."""
    path = result_path(setup.results, exp)
    if not path.is_file():
        return None
    result = read_result(path)
    # Memory that was short is a result of a table, but not a reason to pass over a learning rate.
    done = ("ok",) if exp.table == TUNING else ("ok", "oom")
    return result if is_of(result, exp, setup) and result.status in done else None


def is_of(result: Result, exp: Experiment, setup: Setup) -> bool:
    """Return whether a result is of the configuration and data that a cell has now."""
    return result.config_hash == hash_of(exp, setup) and dict(result.data) == data_of(exp, setup)


def reusable(exp: Experiment, setup: Setup, others: list[Result]) -> Result | None:
    """Return the result of another table's cell of the same configuration and data, as this cell's."""
    wanted, data = hash_of(exp, setup), data_of(exp, setup)
    for other in others:
        if other.config_hash == wanted and dict(other.data) == data and other.status == "ok":
            return replace(other, experiment=exp.identity, reused_from=other.reused_from or other.experiment.table)
    return None


def config_of(exp: Experiment, setup: Setup) -> dict[str, Any]:  # Any: values of a configuration
    """Return the cell's configuration, with the folders of this run."""
    return training_config(exp, model=setup.models[exp.model], data=setup.data, output=folder_of(exp, setup) / "model")


def hash_of(exp: Experiment, setup: Setup) -> str:
    """Return the hash of the cell's configuration."""
    return config_hash(config_of(exp, setup), exp=exp)


def folder_of(exp: Experiment, setup: Setup) -> Path:
    """Return the folder that a cell works in."""
    return setup.work / "cells" / exp.table / exp.name


def run_cell(exp: Experiment, setup: Setup) -> Result:
    """Return the result of a cell, written to its file; a second attempt is made if the first one fails.

    Out of memory is a result too, and so is a failure: the row says why.
    """
    folder = folder_of(exp, setup)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            result = _trained_and_scored(exp, setup)
            break
        except CellFailed as error:
            if error.oom or attempt == ATTEMPTS:
                result = _failed(exp, setup, error)
                break
            for path in folder.glob("predictions.jsonl*"):
                path.unlink()  # of other versions of the packages, it may be, with which scoring does not go on
    write_result(setup.results, result)
    if result.status == "ok":
        _tidy(exp, setup)
    return result


def _failed(exp: Experiment, setup: Setup, error: CellFailed) -> Result:
    """Return the row of a cell that failed; with what its training took, if it was scoring that did."""
    status: Status = "oom" if error.oom else "failed"
    folder = folder_of(exp, setup)
    measure = read_json(folder / "measure.json") if (folder / "trained.json").is_file() else None
    try:
        return _result(exp, setup, status=status, reason=str(error), measure=measure)
    except ResultError:  # its numbers are none
        return _result(exp, setup, status=status, reason=str(error))


def _tidy(exp: Experiment, setup: Setup) -> None:
    """Remove what a scored cell worked with, but for its outputs: `crosslore-eval compare` tests them in pairs."""
    folder = folder_of(exp, setup)
    outputs, kept = folder / "predictions.jsonl", setup.work / "predictions" / exp.table / f"{exp.name}.jsonl"
    if outputs.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(outputs, kept)
    if not setup.keep:
        shutil.rmtree(folder, ignore_errors=True)


def _trained_and_scored(exp: Experiment, setup: Setup) -> Result:
    folder, config = folder_of(exp, setup), config_of(exp, setup)
    marker, started = folder / "trained.json", folder / "started.json"
    sums = {name: file.sha256 for name, file in data_of(exp, setup).items()}
    identity = json.dumps([config_hash(config, exp=exp), setup.models[exp.model], sums])
    if started.is_file() and started.read_text(encoding="utf-8") != identity:
        shutil.rmtree(folder)  # of other settings
    folder.mkdir(parents=True, exist_ok=True)
    started.write_text(identity, encoding="utf-8")
    if not marker.is_file():
        train(config, folder, setup)
        marker.write_text("{}", encoding="utf-8")
    measure = _measured(folder)
    scores = held_out(measure) if exp.table == TUNING else _scores(exp, folder, setup)
    try:
        return _result(exp, setup, status="ok", measure=measure, scores=scores)
    except ResultError as error:
        raise CellFailed(f"its numbers are no result: {error} (they are in {folder})", oom=False) from None


def _measured(folder: Path) -> dict[str, Any]:  # Any: JSON of the callback
    """Return what a training took; without it, nothing of the training is of use, and its folder goes."""
    found = read_json(folder / "measure.json")
    if found is None:
        reason = "the training left no measurement: is crosslore's start-up hook active? `crosslore doctor` says"
    elif found.get("interrupted_seconds_before", 0.0) is None:
        reason = "a part of the training was not measured, so its hours are not known"
    else:
        return found
    shutil.rmtree(folder)
    raise CellFailed(reason, oom=False)


def train(config: Mapping[str, Any], folder: Path, setup: Setup) -> None:  # Any: values of a configuration
    """Train by a configuration in a folder, from its last checkpoint if there is one; measured in `measure.json`.

    Raises:
        CellFailed: if the process ends badly.
    """
    path, log = folder / "config.yaml", folder / "train.log"
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    plan = plan_training(folder / "model")
    if plan.checkpoint is None:
        shutil.rmtree(folder / "model", ignore_errors=True)
    command = training_command(path, folder / "model", plan)
    code = _run(command, log=log, folder=folder, setup=setup, more={"CROSSLORE_MEASURE": str(folder / "measure.json")})
    if code != 0:
        raise failure("training", code, log)


def _scores(exp: Experiment, folder: Path, setup: Setup) -> dict[str, Score]:
    out, log, printed = folder / "predictions.jsonl", folder / "evaluation.log", folder / "scores.json"
    is_adapter = (folder / "model" / "adapter_config.json").is_file()
    base = setup.models[exp.model] if is_adapter else None
    command = evaluation_command(exp, model=folder / "model", data=setup.data, out=out, base=base)
    found = _scored(command, log=log, printed=printed, folder=folder, setup=setup)
    if PROTOCOLS[exp.dataset] == "paper":
        again = ["crosslore-eval", "score", exp.dataset, "--predictions", str(out), "--data", str(setup.data)]
        again += ["--protocol", OFFICIAL, "--confidence", "--json"]
        if exp.dataset == "e2e":
            more = _scored(again, log=log, printed=folder / "official.json", folder=folder, setup=setup)
            found |= {f"{OFFICIAL}/{name}": score for name, score in more.items()}
    return found


def _scored(command: list[str], *, log: Path, printed: Path, folder: Path, setup: Setup) -> dict[str, Score]:
    program = str(Path(sys.executable).with_name(command[0]))
    code = _run([program, *command[1:]], log=log, folder=folder, setup=setup, output=printed)
    if code != 0:
        raise failure("evaluation", code, log)
    content = read_json(printed)
    if content is None or not isinstance(content.get("scores"), dict):
        raise CellFailed(f"evaluation: {printed} must be one JSON object with scores, and is none", oom=False)
    return {name: score_of(entry) for name, entry in content["scores"].items()}


def _run(
    command: list[str], *, log: Path, folder: Path, setup: Setup, more: Mapping[str, str] | None = None,
    output: Path | None = None,
) -> int:  # fmt: skip
    # LLaMA-Factory starts a bare `torchrun` when it sees several GPUs.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {"PATH": path, "OMP_NUM_THREADS": str(setup.threads), **one_gpu(), **(more or {})}
    environment |= {"HF_HUB_OFFLINE": "1"} if all(Path(name).is_dir() for name in setup.models.values()) else {}
    return setup.processes.run(command, log=log, environment=environment, folder=Path.cwd(), output=output)


def one_gpu() -> dict[str, str]:
    """Return what leaves a cell the first GPU of several: LLaMA-Factory would multiply its batch by their number."""
    if torch.cuda.device_count() < 2:
        return {}
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def _result(
    exp: Experiment, setup: Setup, *, status: Status, reason: str = "", measure: Mapping[str, Any] | None = None,
    scores: Mapping[str, Score] | None = None,
) -> Result:  # fmt: skip
    measure = measure or {}
    peak = {name.removesuffix("_gib"): value for name, value in measure.get("peak", {}).items() if value is not None}
    losses = measure.get("losses") or [[0, measure.get("loss_last")]]
    names = ("steps", "tokens", "trainable_parameters", "cpu_seconds")
    train = {"loss_last": losses[-1][1], **{name: measure.get(name) for name in names}}
    seconds = measure.get("train_seconds")
    config = {key: without_folder(value) for key, value in config_of(exp, setup).items()}
    return Result(
        experiment=exp.identity,
        status=status,
        reason=reason,
        config=config,
        config_hash=hash_of(exp, setup),
        commit=commit(),
        packages=packages(),
        data=data_of(exp, setup),
        device=device(setup.threads),
        hours=None if seconds is None else float(seconds) / 3600,
        peak_gib=peak,
        train={name: value for name, value in train.items() if value is not None},
        scores=scores or {},
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )
