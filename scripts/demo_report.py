"""What `demo.py` shows at the end: the loss curve, the table, one row before and after, and what to try next."""

import json
import os
import sys
from pathlib import Path
from typing import Any

EMPTY = "-"


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """Return (step, training loss) pairs from LLaMA-Factory's `trainer_state.json`, or from `trainer_log.jsonl`."""
    state, lines = folder / "trainer_state.json", folder / "trainer_log.jsonl"
    if state.is_file():
        history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
        return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if lines.is_file():
        history = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(entry["current_steps"], entry["loss"]) for entry in history if "loss" in entry]
    return []


def draw_losses(losses: list[tuple[int, float]], file: Path) -> None:
    """Write the training loss over steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no window, no display needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*losses, strict=True), marker=".")
    axes.set(xlabel="step", ylabel="training loss", title="CrossLore demo: SmolLM2-135M-Instruct on the bundled data")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def table_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Return the table of a summary as texts: a header, then before, training, after."""
    before, after, training = (summary[name] for name in ("before", "after", "training"))
    tasks = list(before["scores"])
    header = ["", *(f"{task}: {before['scores'][task]['metric']}" for task in tasks), "seconds", "peak GiB"]

    def scored(name: str, result: dict[str, Any]) -> list[str]:
        return [name, *(f"{result['scores'][task]['value']:.4g}" for task in tasks), *_cost(result)]

    losses = summary["losses"]
    loss = f"loss {losses[0][1]:.3f} -> {losses[-1][1]:.3f}" if losses else "no loss logged"
    middle = [f"training ({loss})", *[EMPTY] * len(tasks), *(_cost(training) if training else [EMPTY, EMPTY])]
    return [header, scored("before", before), middle, scored("after", after)]


def _cost(result: dict[str, Any]) -> list[str]:
    return [f"{result['seconds']:.0f}", f"{result['peak_rss_gib']:.2f}"]


def print_report(summary: dict[str, Any], folder: Path) -> None:
    """Print the table, one held-out row before and after, the files written, and commands to try next."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    header, *rows = table_rows(summary)
    count = next(iter(summary["before"]["scores"].values()))["rows"]
    table = Table(title=f"{summary['method']}: {count} held-out rows of each task")
    for name in header:
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for name, text in example_texts(summary):
        console.print(f"{name}:", style="bold")
        console.print(text, soft_wrap=True)
    console.print(f"\nIn {folder}: demo.json  loss.png  train.log  before_*.jsonl  after_*.jsonl  train/ (the model)")
    console.print("\nTry next:")
    for command in next_commands(folder):
        console.print(f"  {command}", soft_wrap=True)


def example_texts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the first held-out row of the first task: its input, both answers, and the reference."""
    before, after = (next(iter(summary[name]["predictions"].values()))[0] for name in ("before", "after"))
    answers = [("before", before["prediction"]), ("after", after["prediction"])]
    return [("input", before["input"]), *answers, ("reference", before["references"][0])]


def next_commands(folder: Path) -> list[str]:
    """Return shell commands that go on from the demo, with the programs of this Python's environment."""
    bin_folder = Path(sys.executable).parent
    try:
        shown = os.path.relpath(bin_folder) if bin_folder.is_relative_to(Path.cwd()) else str(bin_folder)
    except OSError:
        shown = str(bin_folder)
    factory = f"{shown}/llamafactory-cli"
    return [
        f"{shown}/crosslore-eval compare restaurants {folder}/before_restaurants.jsonl "
        f"{folder}/after_restaurants.jsonl",
        f"{shown}/crosslore-eval run restaurants --model {folder / 'train'}   # all 120 held-out rows",
        f"{factory} chat --model_name_or_path {folder / 'train'} --template chatml   # talk to the model",
        f"{factory} train yaml_configs/crosslore_demo.yaml rank=64 output_dir=saves/demo_r64",
        f"{factory} train yaml_configs/crosslore_demo.yaml crosslore_preset=galore residual_ratio=0 "
        "output_dir=saves/demo_galore",
        f"{shown}/python scripts/prepare_data.py e2e   # real rows, then yaml_configs/crosslore_e2e.yaml",
    ]
