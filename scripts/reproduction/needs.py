"""What a run needs and what is missing, found before anything starts."""

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from crosslore_eval.metrics.java import find_java
from reproduction.cells import Experiment
from reproduction.configs import merged_settings
from reproduction.costs import estimated_seconds
from reproduction.profiles import load_profiles
from reproduction.results import Result

# Bytes on disk of a trained model for each byte of its weights: the result, and two checkpoints while one replaces the
# other, each with the optimizer's state.
COPIES = 4
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


def check(cells: Sequence[Experiment], models: Mapping[str, str]) -> None:
    """Raise a NotReady error that lists all that is missing for these cells."""
    missing = [line for model in dict.fromkeys(cell.model for cell in cells) if (line := _model(model, models))]
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
        disk_gb=max((COPIES * _bytes(models[cell.model]) for cell in cells), default=0.0) * jobs / 1e9,
    )


def enough_disk(needs: Needs, folder: Path) -> str | None:
    """Return a warning if the disk under a folder is smaller than what is needed."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if free > needs.disk_gb:
        return None
    return f"{existing} has {free:.1f} GB free, about {needs.disk_gb:.1f} GB are needed. Choose another --work folder."


def _model(name: str, models: Mapping[str, str]) -> str | None:
    place = models[name]
    if Path(place).is_dir():
        return None if (Path(place) / "config.json").is_file() else f"{place} has no config.json: it is no model"
    looks_local = place.startswith((".", "/", "models/", "saves/"))
    if looks_local:
        hint = "Run: make model" if "SmolLM2" in place else f"Give a folder: --model {name}=DIR"
        return f"model {name}: {place} is not there. {hint}"
    return None  # a name on the hub, found or not by the first cell


def _bytes(place: str) -> float:
    return (
        float(sum(path.stat().st_size for path in Path(place).glob("*.safetensors")))
        if Path(place).is_dir()
        else 13.5e9
    )


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
        places[name] = place
    return places
