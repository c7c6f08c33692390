"""GPU memory of the cells by the estimator of `crosslore estimate`, before any of them is started."""

from collections.abc import Sequence

import torch

from crosslore.estimate import GIB, Estimator, Method, Setting, chosen_method, load_config
from reproduction.cells import Experiment
from reproduction.configs import merged_settings

# The paper's cards: an RTX 4090 for 7B and 8B.
PAPER_GIB = 24
METHODS = {
    "lora": Method(name="LoRA", trained="lora"),
    "dora": Method(name="DoRA", trained="dora"),
    "full": Method(name="AdamW on all weights"),
    "galore_stock": chosen_method("galore", "layerwise", "direct"),
    "galore": chosen_method("galore", "compact", "direct"),
    "crosslore": chosen_method("crosslore", "compact", "direct"),
    "crosslore_plus": chosen_method("crosslore_plus", "compact", "direct"),
}


def memory_lines(cells: Sequence[Experiment]) -> list[str]:
    """Return what cells of the paper's models need of a GPU, a line for each model; nothing for other profiles.

    Args:
        cells: of one profile.
    """
    cells = [cell for cell in cells if cell.profile == "paper"]
    lines = []
    for model in dict.fromkeys(cell.model for cell in cells):
        peaks = _peaks([cell for cell in cells if cell.model == model], model)
        worst = max(peaks, key=lambda key: peaks[key])
        held = _card_gib()
        over = sorted({_shown(*key) for key, peak in peaks.items() if peak > held})
        text = f"{model}: at most {peaks[worst]:.1f} GiB of GPU memory ({worst[0]}), estimated for 512 tokens"
        text += f"; more than {held:.0f} GiB: {', '.join(over)}, which are tried all the same" if over else ""
        lines.append(text)
    return lines


def _peaks(cells: Sequence[Experiment], model: str) -> dict[tuple[str, int], float]:
    """Return GiB by method and rank."""
    estimator, found = Estimator(load_config(model)), {}
    for cell in cells:
        key = (cell.base_method, cell.rank)
        if key in found:
            continue
        config = merged_settings(cell)
        setting = Setting(
            batch=config["per_device_train_batch_size"],
            rank=cell.rank or 1,
            rule="adamw8bit" if "8bit" in config["optim"] else "adamw",
            accumulation=config["gradient_accumulation_steps"],
        )
        found[key] = estimator.estimate(METHODS[cell.base_method], setting).peak / GIB
    return found


def _shown(method: str, rank: int) -> str:
    return f"{method} at rank {rank}" if rank else method


def _card_gib() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory) / GIB
    return PAPER_GIB
