"""Result files: one JSON file for each cell that was run, `FOLDER/<table>/<name>.json`.

A file is written whole or not at all, and read strictly: what does not fit is an error that names the file. Scores are
named as crosslore-eval names them and are those of the protocol that the paper's columns are compared with; a score of
another protocol has that protocol in front: "BLEU" is of `paper`, "e2e-official/BLEU" stands beside it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args

from crosslore_eval.errors import shown
from reproduction.reading import PaperDataError, Section
from reproduction.whole_file import write_whole

SCHEMA = 1
Status = Literal["ok", "oom", "failed"]
DeviceKind = Literal["cpu", "cuda"]
STATUSES: tuple[str, ...] = get_args(Status)
# What was measured of memory, in GiB: by the allocator of a CUDA device, and of the process.
PEAKS = ("allocated", "reserved", "rss", "rss_above_loaded")
# Folders of a results folder that hold result files; others, such as benchmarks/, are passed over.
FOLDERS = ("table[0-9]*", "ablation-*", "tuning")
_ROOT = Path(__file__).parents[2]


class ResultError(ValueError):
    """A result file cannot be used; the message names it and says what, what is allowed, what to do."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which cell a result is of; the fields of an experiment that tables are made by."""

    # "table1", ..., "table10", "ablation-<name>" or "tuning"
    table: str
    # "paper", "small" or "smoke"
    profile: str
    model: str
    # of an ablation or table 10: a variant
    method: str
    dataset: str
    # 0 where the method has none
    rank: int
    seed: int
    # table 10: the residual ratio in percent, as the paper prints it; tuning: the learning rate
    column: str | None = None

    @property
    def name(self) -> str:
        """The name of its files: `llama2-7b--crosslore--gsm8k--r128--s1`, and `--x0.6` or `--lr3e-5` for a column."""
        mark = "lr" if self.table == "tuning" else "x"
        parts = [self.model, self.method, self.dataset, f"r{self.rank}", f"s{self.seed}"]
        return "--".join([*parts, *([f"{mark}{self.column}"] if self.column is not None else [])])


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score with its interval and how it was computed."""

    # None: it could not be computed, `reason` says why
    value: float | None
    # bounds of the 95 % interval, where it was computed
    low: float | None = None
    high: float | None = None
    signature: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """The rows that were used of a data set."""

    sha256: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where a cell ran."""

    name: str
    kind: DeviceKind
    threads: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a result file holds."""

    experiment: Identity
    status: Status
    # why there is no score; empty for "ok"
    reason: str = ""
    config: Mapping[str, Any]  # Any: values of a LLaMA-Factory configuration
    config_hash: str
    commit: str
    packages: Mapping[str, str]
    # "train" and "test"
    data: Mapping[str, DataFile]
    device: Device
    # of training alone; None if it did not end
    hours: float | None = None
    # those of PEAKS that were measured
    peak_gib: Mapping[str, float] = field(default_factory=dict)
    # "steps", "tokens", "loss_last", "trainable_parameters", "cpu_seconds" (of all threads), as far as known
    train: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, Score] = field(default_factory=dict)
    # the table whose cell of the same configuration was taken over
    reused_from: str | None = None
    # ISO time of its end
    finished: str

    def __post_init__(self) -> None:
        """Refuse what contradicts the status, and numbers that are none."""
        if self.status not in STATUSES:
            _refuse("status", self.status, f"one of {', '.join(STATUSES)}")
        if self.status == "ok" and (self.hours is None or not self.scores):
            _refuse("a result with status ok", (self.hours, dict(self.scores)), "one with hours and scores")
        if (self.status == "ok") == bool(self.reason):
            _refuse(f"reason of status {self.status}", self.reason, "empty for ok and a text for oom and failed")
        for name in self.peak_gib:
            if name not in PEAKS:
                _refuse("a name in peak_gib", name, f"one of {', '.join(PEAKS)}")
        for name, score in self.scores.items():
            if (score.value is None) != bool(score.reason):
                _refuse(f"score {name}", score, "a value without a reason, or a reason without a value")
            if (score.low is None) != (score.high is None):
                _refuse(f"interval of score {name}", (score.low, score.high), "two bounds or none")
        bounds = [number for score in self.scores.values() for number in (score.value, score.low, score.high)]
        for number in (self.hours, *self.peak_gib.values(), *self.train.values(), *bounds):
            if number is not None and not isfinite(number):
                _refuse("a number of a result", number, "finite")

    @property
    def time(self) -> float | None:
        """The hours that stand in a table: on one CPU thread the processor's, which other work does not lengthen."""
        seconds = self.train.get("cpu_seconds")
        on_one_thread = self.device.kind == "cpu" and self.device.threads == 1
        return seconds / 3600 if on_one_thread and self.hours is not None and seconds is not None else self.hours

    @property
    def peak(self) -> float | None:
        """The memory that stands in a table: reserved by the allocator on CUDA, of the whole process on a CPU."""
        return self.peak_gib.get("reserved" if self.device.kind == "cuda" else "rss")


def results_folder(profile: str) -> Path:
    """Return where results of a profile are kept; those of a function test are not to be committed."""
    return _ROOT / ("saves/reproduce/smoke/results" if profile == "smoke" else "results")


def result_path(folder: Path, experiment: Identity) -> Path:
    """Return where the result of a cell is kept in a results folder."""
    return folder / experiment.table / f"{experiment.name}.json"


def write_result(folder: Path, result: Result) -> Path:
    """Write a result into its place in a results folder, whole or not at all, and return its path."""
    path = result_path(folder, result.experiment)
    write_whole(path, json.dumps(_as_json(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_results(folder: Path) -> list[Result]:
    """Return the results of a results folder, of all profiles, sorted by table and name.

    Raises:
        ResultError: if the folder is not there or a file in it is no result; names it.
    """
    if not folder.is_dir():
        raise ResultError(f"{folder} must be a folder with results, it is none. Run scripts/reproduce.py first.")
    paths = {path for pattern in FOLDERS for path in folder.glob(f"{pattern}/*.json")}
    return [read_result(path) for path in sorted(paths)]


def read_result(path: Path) -> Result:
    """Return the result that a file holds.

    Raises:
        ResultError: if it cannot be read, is of another schema, does not fit, or is another cell's by its name.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}. Remove it, and run its cell again.") from None
    except ValueError as error:
        raise ResultError(f"{path} is not JSON: {error}. Remove it, and run its cell again.") from None
    try:
        result = _result(Section(content, place="result"))
    except PaperDataError as error:
        raise ResultError(f"{path}: {error}") from None
    except ValueError as error:
        raise ResultError(f"{path}: {error} Remove it, and run its cell again.") from None
    if result_path(path.parents[1], result.experiment) != path:
        expected = f"{result.experiment.table}/{result.experiment.name}.json"
        raise ResultError(f"{path} must be where its cell belongs, {expected}. Move it there.")
    return result


def _result(root: Section) -> Result:
    schema = root.take("schema", int)
    if schema != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {schema}: it is of another version of this repository.")
    packages, data, scores = root.section("packages"), root.sections("data"), root.sections("scores")
    result = Result(
        experiment=_identity(root.section("experiment")),
        status=cast(Status, root.take("status", str)),
        reason=root.take("reason", str),
        config=root.take("config", dict),
        config_hash=root.take("config_hash", str),
        commit=root.take("commit", str),
        packages={name: packages.take(name, str) for name in packages.keys()},
        data={name: _data_file(section) for name, section in data},
        device=_device(root.section("device")),
        hours=_number(root, "hours"),
        peak_gib=_numbers(root.section("peak_gib")),
        train=_numbers(root.section("train")),
        scores={name: _score(section) for name, section in scores},
        reused_from=_optional(root, "reused_from"),
        finished=root.take("finished", str),
    )
    root.done()
    return result


def _identity(section: Section) -> Identity:
    texts = {name: section.take(name, str) for name in ("table", "profile", "model", "method", "dataset")}
    numbers = {name: section.take(name, int) for name in ("rank", "seed")}
    identity = Identity(**texts, **numbers, column=_optional(section, "column"))  # type: ignore[arg-type]
    section.done()
    return identity


def _data_file(section: Section) -> DataFile:
    file = DataFile(sha256=section.take("sha256", str), rows=section.take("rows", int))
    section.done()
    return file


def _device(section: Section) -> Device:
    kind = section.take("kind", str)
    if kind not in get_args(DeviceKind):
        _refuse("kind of device", kind, f"one of {', '.join(get_args(DeviceKind))}")
    name, threads = section.take("name", str), section.take("threads", int)
    section.done()
    return Device(name=name, kind=cast(DeviceKind, kind), threads=threads)


def _score(section: Section) -> Score:
    numbers = {name: _number(section, name) for name in ("value", "low", "high")}
    texts = {name: section.take(name, str, default="") for name in ("signature", "reason")}
    section.done()
    return Score(**numbers, **texts)  # type: ignore[arg-type]


def _numbers(section: Section) -> dict[str, float]:
    found = {name: _number(section, name) for name in section.keys()}
    return {name: number for name, number in found.items() if number is not None}


def _number(section: Section, name: str) -> float | None:
    value = section.take(name, object, default=None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        _refuse(f"{section.place}, `{name}`", value, "a number or null")
    return value


def _optional(section: Section, name: str) -> str | None:
    value = section.take(name, object, default=None)
    return None if value is None else section.take(name, str)


def _as_json(result: Result) -> dict[str, Any]:  # Any: JSON
    content = {"schema": SCHEMA} | asdict(result)
    for score in content["scores"].values():
        if not score["reason"]:
            del score["reason"]
    return content


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _refuse(what: str, value: object, allowed: str) -> NoReturn:
    raise ResultError(f"{what} must be {allowed}, got {shown(value)}.")
