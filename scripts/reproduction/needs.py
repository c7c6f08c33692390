"""What a run needs and what is missing, found before anything starts."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from crosslore_eval.metrics.java import find_java
from crosslore_eval.tasks import TASKS
from crosslore_eval.tasks.loading import find_file, no_hub_message
from reproduction.cells import Experiment
from reproduction.configs import merged_settings
from reproduction.costs import estimated_seconds
from reproduction.profiles import Profile, load_profiles
from reproduction.results import Result

# Bytes on disk of a trained model for each byte of its weights: the result, and two checkpoints while one replaces the
# other, each with the optimizer's state.
COPIES = 4
# Bytes of the models that are named on the hub, in bf16.
HUB_BYTES = {"llama2-7b": 13.5e9, "llama2-13b": 26.0e9, "llama3-8b": 16.1e9}
# One of these is in a model's folder for its tokenizer, and one for its weights.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
WEIGHTS = ("*.safetensors", "*.bin")
# Modules that a configuration asks for, and how to get them.
MODULES = {
    "llamafactory": 'pip install "crosslore[llamafactory,eval]"',
    "galore_torch": "pip install galore-torch",
    "bitsandbytes": 'pip install "crosslore[bnb]"',
}


class NotReady(ValueError):
    """Something is missing; the message has a line for each thing and what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the cells that are still to be run take."""

    cells: int
    hours: float
    # where the hours come from
    source: str
    disk_gb: float

    def lines(self) -> list[str]:
        """Return what a user reads before the run starts."""
        return [
            f"{self.cells} cells to run, about {hours_text(self.hours)} ({self.source})",
            f"disk: about {self.disk_gb:.1f} GB at a time for models and checkpoints",
        ]


def hours_text(hours: float) -> str:
    """Return hours as they are read."""
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:.1f} h"


def check(cells: Sequence[Experiment], models: Mapping[str, str], source: Path | None = None) -> None:
    """Raise a NotReady error that lists all that is missing for these cells.

    Args:
        cells: of one profile.
        models: where each model is.
        source: folder with the data sets; None: the hub.
    """
    missing = [line for model in dict.fromkeys(cell.model for cell in cells) if (line := _model(model, models))]
    for dataset in sorted({cell.dataset for cell in cells}):
        missing += _data(dataset, load_profiles().profile(cells[0].profile), source)
    if os.environ.get("CROSSLORE_LLAMAFACTORY") == "0":
        missing.append("CROSSLORE_LLAMAFACTORY is 0, so nothing would be measured. Unset it.")
    settings = [merged_settings(cell) for cell in cells]
    wanted = {"llamafactory"}
    wanted |= {"galore_torch" for one in settings if one.get("use_galore")}
    wanted |= {"bitsandbytes" for one in settings if "8bit" in str(one.get("optim", ""))}
    for name in sorted(wanted):
        if importlib.util.find_spec(name) is None:
            missing.append(f"{name} is not installed. Run: {MODULES[name]}")
    if any(one.get("pure_bf16") for one in settings) and not torch.cuda.is_available():
        missing.append(
            "no CUDA device was found, and these cells train in bf16 on one. Run on a GPU, or take --profile small."
        )
    if missing:
        raise NotReady("not ready:\n" + "\n".join(f"  - {line}" for line in missing))


def warnings(cells: Sequence[Experiment]) -> list[str]:
    """Return what will be left out, a line each."""
    texts = any(cell.dataset in ("e2e",) for cell in cells)
    if texts and find_java() is None:
        return ["no `java` that runs was found: METEOR of E2E will be left out. Install a Java runtime for it."]
    return []


def of(
    cells: Sequence[Experiment],
    results: Sequence[Result],
    models: Mapping[str, str],
    *,
    jobs: int,
    factor: float | None = None,
) -> Needs:
    """Return what cells take: by what their like took where results are there, else by the profile's estimate.

    Args:
        cells: those to be run.
        results: those that are there.
        models: where each model is.
        jobs: cells at a time.
        factor: time of a step here over the profile's; None: not known.
    """
    known: dict[tuple[str, str], list[float]] = {}
    for result in results:
        if result.hours is not None and result.reused_from is None:
            known.setdefault((result.experiment.model, result.experiment.dataset), []).append(result.hours)
    seconds, measured = 0.0, 0
    for cell in cells:
        like = known.get((cell.model, cell.dataset))
        estimate = estimated_seconds(cell) * (factor or 1.0)
        if like:
            measured += 1
            estimate = max(estimate, 3600 * sum(like) / len(like))
        seconds += estimate
    figures = "by a probe of a few steps" if factor else "by the profile's figures"
    source = figures + (f"; training of {measured} by cells that were run" if measured else "")
    return Needs(
        cells=len(cells),
        hours=seconds / 3600 / jobs,
        source=source,
        disk_gb=max((COPIES * _bytes(cell.model, models[cell.model]) for cell in cells), default=0.0) * jobs / 1e9,
    )


def enough_disk(needs: Needs, folder: Path) -> str | None:
    """Return a warning if the disk under a folder is smaller than what is needed."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if free > needs.disk_gb:
        return None
    return f"{existing} has {free:.1f} GB free, about {needs.disk_gb:.1f} GB are needed. Choose another --work folder."


def check_folder(folder: Path, option: str) -> None:
    """Make a folder if need be; raise a NotReady error if no file can be written into it.

    Args:
        folder: where results or work go.
        option: that names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise NotReady(
            f"{option} must be a folder that can be written to, got {folder} ({error.strerror}). Choose another one."
        ) from None


def _data(dataset: str, profile: Profile, source: Path | None) -> list[str]:
    """Return a line for each file of a data set that is not there; none for bundled rows."""
    task, choice = TASKS[dataset], profile.datasets[dataset]
    if choice.bundled is not None:
        return []
    if source is None:
        return [] if task.hub else [f"data: {no_hub_message(task, option='--data')}."]
    names = dict.fromkeys(("train", task.test_split, choice.dev_split or "train"))
    files = [find_file(task.split(name), source) for name in names]
    return [f"data: {file} is not there. Give the folder: --data DIR" for file in files if not file.is_file()]


def _model(name: str, models: Mapping[str, str]) -> str | None:
    place = models[name]
    folder = Path(place)
    if folder.is_dir():
        wanted = {"config.json": ("config.json",), "tokenizer": TOKENIZERS, "weights": WEIGHTS}
        lost = [what for what, patterns in wanted.items() if not any(any(folder.glob(one)) for one in patterns)]
        short = f"model {name}: {place} has no {' and no '.join(lost)}. Give the folder of a whole model."
        return short if lost else None
    looks_local = place.startswith((".", "/", "~", "models/", "saves/")) or place.count("/") > 1
    if looks_local:
        hint = "Run: make model" if "SmolLM2" in place else f"Give a folder: --model {name}=DIR"
        return f"model {name}: {place} is not there. {hint}"
    return None  # a name on the hub, found or not by the first cell


def _bytes(name: str, place: str) -> float:
    """Return the bytes of a model's weights; of one that is not here yet those of its like on the hub."""
    files = [path for pattern in WEIGHTS for path in Path(place).glob(pattern)] if Path(place).is_dir() else []
    return float(sum(path.stat().st_size for path in files)) or HUB_BYTES.get(name, HUB_BYTES["llama2-7b"])


def models_of(profile: str, given: Sequence[str], cells: Sequence[Experiment]) -> dict[str, str]:
    """Return where each model of the cells is: the profile's place, or the one given as DIR or NAME=DIR.

    Raises:
        NotReady: if a name is none of the cells', or a lone DIR could be that of several.
    """
    names = list(dict.fromkeys(cell.model for cell in cells))
    places = {name: load_profiles().profile(profile).names[name] for name in names}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals:
            if len(names) != 1:
                raise NotReady(f"--model {text} could be one of {', '.join(names)}. Write --model NAME=DIR.")
            name, place = names[0], text
        if name not in places:
            raise NotReady(f"--model {text}: {name!r} is no model of these cells. They use: {', '.join(names)}.")
        local = Path(place).expanduser()
        places[name] = str(local.resolve()) if local.is_dir() else place  # the run changes its folder
    return places
