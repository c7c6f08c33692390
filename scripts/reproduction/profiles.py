"""Methods and profiles as data: `load_profiles()` reads and checks `profiles.toml`."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from crosslore_eval.errors import unknown_name
from reproduction.reading import PaperDataError, Section

DATA = Path(__file__).with_name("profiles.toml")
# Values of a profile that a method may map to a key of LLaMA-Factory's.
VALUES = ("rank", "alpha", "residual_ratio", "refresh_every", "warmup_steps")
# Values of a LLaMA-Factory configuration.
Settings = Mapping[str, Any]  # Any: texts, numbers and truths, checked by LLaMA-Factory's parser


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a method is written in a configuration."""

    name: str
    # which grid of learning rates it is tuned on
    family: str
    # value of the profile -> LLaMA-Factory's key
    keys: Mapping[str, str]
    # LLaMA-Factory's key -> multiple of the rank
    per_rank: Mapping[str, int]
    settings: Settings

    @property
    def has_rank(self) -> bool:
        """Whether there is a rank to choose."""
        return "rank" in self.keys


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """What a profile says about a method."""

    settings: Settings
    # time of a step, times that of LoRA
    cost: float
    # of one refresh of all bases, where it is felt
    refresh_seconds: float


@dataclass(frozen=True, kw_only=True)
class Bundled:
    """Which rows of a bundled set stand for a data set: the `part`-th of every `parts`."""

    file: str
    part: int
    parts: int


@dataclass(frozen=True, kw_only=True)
class DatasetChoice:
    """What a profile says about a data set."""

    settings: Settings
    # evenly spaced rows of the train split; 0: all
    train_rows: int
    # evenly spaced examples of the test split; 0: all
    test_rows: int
    # where held-out rows for tuning come from, and how many
    dev_split: str
    dev_rows: int
    # 0: the task's
    max_new_tokens: int
    bundled: Bundled | None
    # of LoRA, for models that are not named after it, and of an answer
    step_seconds: float
    step_seconds_of: Mapping[str, float]
    answer_seconds: float


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How learning rates are chosen."""

    rank: int
    seed: int
    settings: Settings
    # family of methods -> learning rates to try
    learning_rates: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What is trained in place of the paper's cells, and how."""

    name: str
    # model of the paper -> model that is trained
    models: Mapping[str, str]
    # model that is trained -> name on the hub, or folder
    names: Mapping[str, str]
    # rank of the paper -> rank that is trained
    ranks: Mapping[int, int]
    targets: tuple[str, ...]
    # ranks of the ablations, as trained; empty: those of the paper's tables
    ablation_ranks: tuple[int, ...]
    seeds: int
    table10_rank: int
    # 0: as many as in the paper
    table10_seeds: int
    template: str
    # values of VALUES; those of tables 3-4 are absent from "paper"
    values: Mapping[str, float]
    # model or data set without settings in tables 3-4 -> the one whose settings it takes
    borrow: Mapping[str, str]
    common: Settings
    batch_size: int
    start_seconds: float
    # model -> time of its refreshes over what `refresh_seconds` says
    refresh_factor: Mapping[str, float]
    tuning: Tuning | None
    methods: Mapping[str, MethodChoice]
    datasets: Mapping[str, DatasetChoice]


@dataclass(frozen=True, kw_only=True)
class Profiles:
    """All that the file holds."""

    methods: Mapping[str, Method]
    by_name: Mapping[str, Profile] = field(default_factory=dict)

    def profile(self, name: str) -> Profile:
        """Return a profile.

        Raises:
            ValueError: if there is none of that name; lists the near and the known ones.
        """
        if name not in self.by_name:
            raise ValueError(f"{unknown_name('profile', name, self.by_name)} Choose one of these.")
        return self.by_name[name]


@lru_cache
def load_profiles(path: Path = DATA) -> Profiles:
    """Return methods and profiles.

    Raises:
        PaperDataError: if the file cannot be read or something in it does not fit; names the place.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PaperDataError(
            f"{path} cannot be read: {error.strerror}. It belongs to the repository: restore it."
        ) from None
    except ValueError as error:
        raise PaperDataError(f"{path} is not TOML: {error}. Correct the file.") from None
    root = Section(content, place=path.name)
    methods = {name: _method(name, section) for name, section in root.sections("methods")}
    profiles = {name: _profile(name, section, methods) for name, section in root.sections("profiles")}
    root.done()
    return Profiles(methods=methods, by_name=profiles)


def _method(name: str, section: Section) -> Method:
    keys = section.take("keys", dict)
    for value in keys:
        if value not in VALUES:
            raise PaperDataError(f"{section.place}, keys: {unknown_name('value', value, VALUES)} Correct it.")
    method = Method(
        name=name,
        family=section.take("family", str),
        keys=keys,
        per_rank=section.take("per_rank", dict, default={}),
        settings=section.take("settings", dict),
    )
    section.done()
    return method


def _profile(name: str, section: Section, methods: Mapping[str, Method]) -> Profile:
    choices = {method: _method_choice(values) for method, values in section.sections("methods")}
    if choices.keys() != methods.keys():
        raise PaperDataError(
            f"{section.place} must say something of every method ({', '.join(methods)}), got {', '.join(choices)}. "
            "Add or remove some."
        )
    evaluation = section.section("evaluation")
    profile = Profile(
        name=name,
        models=section.take("models", dict),
        names=section.take("names", dict),
        ranks={int(rank): here for rank, here in section.take("ranks", dict).items()},
        targets=section.take_list("targets", str),
        ablation_ranks=tuple(section.take("ablation_ranks", list, default=[])),
        seeds=section.take("seeds", int),
        table10_rank=section.take("table10_rank", int, default=0),
        table10_seeds=section.take("table10_seeds", int, default=0),
        template=section.take("template", str),
        values=section.take("values", dict),
        borrow=section.take("borrow", dict, default={}),
        common=section.take("common", dict),
        batch_size=evaluation.take("batch_size", int),
        start_seconds=section.take("start_seconds", float, default=0.0),
        refresh_factor=section.take("refresh_factor", dict, default={}),
        tuning=_tuning(section.section("tuning"), methods) if "tuning" in section.keys() else None,
        methods=choices,
        datasets={dataset: _dataset_choice(values) for dataset, values in section.sections("datasets")},
    )
    evaluation.done()
    section.done()
    return profile


def _method_choice(section: Section) -> MethodChoice:
    choice = MethodChoice(
        settings=section.take("settings", dict, default={}),
        cost=section.take("cost", float, default=1.0),
        refresh_seconds=section.take("refresh_seconds", float, default=0.0),
    )
    section.done()
    return choice


def _dataset_choice(section: Section) -> DatasetChoice:
    bundled = _bundled(section.section("bundled")) if "bundled" in section.keys() else None
    numbers = {name: section.take(name, int, default=0) for name in ("train_rows", "test_rows", "dev_rows")}
    choice = DatasetChoice(
        settings=section.take("settings", dict, default={}),
        dev_split=section.take("dev_split", str, default=""),
        max_new_tokens=section.take("max_new_tokens", int, default=0),
        bundled=bundled,
        step_seconds=section.take("step_seconds", float, default=0.0),
        step_seconds_of=section.take("step_seconds_of", dict, default={}),
        answer_seconds=section.take("answer_seconds", float, default=0.0),
        **numbers,
    )
    section.done()
    return choice


def _bundled(section: Section) -> Bundled:
    bundled = Bundled(file=section.take("file", str), part=section.take("part", int), parts=section.take("parts", int))
    section.done()
    return bundled


def _tuning(section: Section, methods: Mapping[str, Method]) -> Tuning:
    grids = section.section("learning_rates")
    families = dict.fromkeys(method.family for method in methods.values())
    tuning = Tuning(
        rank=section.take("rank", int),
        seed=section.take("seed", int),
        settings=section.take("settings", dict),
        learning_rates={family: grids.take_list(family, float) for family in families},
    )
    grids.done()
    section.done()
    return tuning
