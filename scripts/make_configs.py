"""Write the configurations of the paper's tables, yaml_configs/table<N>/<method>_<dataset>_r<rank>.yaml.

python scripts/make_configs.py           # write; files there that no table has are removed
python scripts/make_configs.py --check   # exit status 1 if a file differs from what would be written

They are what `scripts/reproduce.py --profile paper` trains, for those who want to run one cell by themselves.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from reproduction.cells import Experiment
from reproduction.configs import Config, evaluation_options, hyperparameters, parts, training_config
from reproduction.experiments import experiments
from reproduction.paper import Paper, load_paper
from reproduction.profiles import load_profiles

ROOT = Path(__file__).resolve().parents[1]
TABLES = (1, 2, 5, 6, 7, 8, 9)
PROFILE = "paper"
TITLES = {
    "lora": "LoRA", "dora": "DoRA", "galore_stock": "GaLore by LLaMA-Factory", "galore": "GaLore by this project",
    "crosslore": "CrossLore", "crosslore_plus": "CrossLore without its residual", "full": "AdamW on all weights",
}  # fmt: skip
# Comments that are the same for all files.
COMMENTS = {
    "model_name_or_path": "the base model is our reading of the paper",
    "lora_rank": "paper", "galore_rank": "paper", "rank": "paper",
    "lora_alpha": "LLaMA-Factory's default, 2 * rank; not said in the paper",
    "galore_update_interval": "the paper's times say 200", "crosslore_refresh_every": "the paper's times say 200",
    "galore_layerwise": "steps inside backward: all gradients at once do not fit in 24 GB",
    "warmup_k": "steps before the residual starts; not said in the paper: our choice",
    "template": "prompts are not said in the paper: our choice for a base model",
    "cutoff_len": "tokens; not said in the paper: our choice",
    "max_samples": "not said in the paper: the number of steps that its times say",
    "pure_bf16": "paper: parameters are loaded in bfloat16",
    "gradient_accumulation_steps": "with the above, the paper's batch size",
    "weight_decay": "not said in the paper: our choice",
    "seed": "not said in the paper: our choice",
    "output_dir": "an interrupted run, started again, goes on from its last checkpoint",
    "save_steps": "not said in the paper: our choice",
}  # fmt: skip
# Keys whose value tables 3 and 4 give.
OF_THE_TABLES = (
    "alpha", "galore_scale", "residual_ratio", "optim", "per_device_train_batch_size", "num_train_epochs",
    "learning_rate", "lr_scheduler_type",
)  # fmt: skip


def main() -> int:
    """Return 0, or 1 if --check found a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit status 1 if a file differs")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "yaml_configs", metavar="DIR", help="default: %(default)s"
    )
    args = parser.parse_args()
    wanted = all_configs()
    there = {path.relative_to(args.folder): path for path in args.folder.glob("table*/*.yaml")}
    stale = [name for name in there if name not in wanted]
    changed = [name for name, text in wanted.items() if name not in there or read(there[name]) != text]
    if args.check:
        for name in sorted([*stale, *changed]):
            print(f"{args.folder / name} is out of date. Run: python scripts/make_configs.py", file=sys.stderr)
        return int(bool(stale or changed))
    for name in stale:
        there[name].unlink()
    for name in changed:
        (args.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (args.folder / name).write_text(wanted[name], encoding="utf-8", newline="\n")
    print(f"{args.folder}: {len(wanted)} configurations, {len(changed)} written, {len(stale)} removed")
    return 0


def read(path: Path) -> str:
    """Return a file's text."""
    return path.read_text(encoding="utf-8")


def all_configs() -> dict[Path, str]:
    """Return the text of each configuration by its path below yaml_configs."""
    paper, found = load_paper(), {}
    for number in TABLES:
        cells = experiments(f"table{number}", profile=PROFILE, seeds=1)
        several = len({cell.model for cell in cells}) > 1
        for cell in cells:
            name = f"{cell.model}_{stem(cell)}" if several else stem(cell)
            found[Path(cell.table) / f"{name}.yaml"] = text_of(cell, name, paper)
    return found


def stem(cell: Experiment) -> str:
    """Return the name of a cell's file where its table has one model."""
    return f"{cell.method}_{cell.dataset}" + (f"_r{cell.rank}" if cell.rank else "")


def text_of(cell: Experiment, name: str, paper: Paper) -> str:
    """Return the text of a cell's configuration."""
    profile, output = load_profiles().profile(PROFILE), f"saves/{cell.table}/{name}"
    config = training_config(cell, model=profile.names[cell.model], data="data/prepared", output=output)
    rank = f", rank {cell.rank}" if cell.rank else ""
    lines = [
        f"# Table {cell.table.removeprefix('table')} of the paper: {paper.names.models[cell.model]}, "
        f"{paper.names.datasets[cell.dataset]}, {TITLES[cell.method]}{rank}.",
        "# Written by scripts/make_configs.py from scripts/reproduction/profiles.toml, which gives the reasons.",
        f"#   python scripts/prepare_data.py {cell.dataset}{' --source DIR' if cell.dataset == 'mawps' else ''}",
        f"#   llamafactory-cli train yaml_configs/{cell.table}/{name}.yaml",
    ]
    comment = commenter(cell, config, paper)
    for part, keys in parts(config).items():
        if keys:
            lines += ["", f"### {part}", *(with_comment(f"{key}: {scalar(config[key])}", comment(key)) for key in keys)]
    options = " ".join(word for word in evaluation_options(cell) if word not in ("--confidence", "--json"))
    scored = profile.datasets[cell.dataset].test_rows
    then = f"### then, for all test rows (the table scores {scored} of them: make reproduce-{cell.table})"
    return "\n".join(
        [
            *lines,
            "",
            then if scored else "### then",
            f"#   crosslore-eval run {cell.dataset} --model {output} {options}",
            "",
        ]
    )


def commenter(cell: Experiment, config: Config, paper: Paper) -> Callable[[str], str]:
    """Return what says where the value of a key is from."""
    entry = hyperparameters(cell, load_profiles().profile(PROFILE))
    source = next(number for number, table in paper.hyperparameter_tables.items() if entry in table.entries)
    lent = paper.names.datasets[entry.dataset] if entry.dataset != cell.dataset else ""
    table = f"paper, table {source}" + (f" for {lent}; nothing for this data set" if lent else "")

    def comment(key: str) -> str:
        if key == "learning_rate" and config[key] != entry.learning_rate:
            return "ours: the paper has no such row, and 1e-6 is lost in bf16"
        if key == "galore_scale" or (key == "alpha" and cell.method != "crosslore"):
            return f"{table}; which method alpha is of is not said"
        if key == "learning_rate" and cell.method in ("lora", "dora"):
            return f"{table}; for all methods in Section 5.2, though 1e-4 is usual for LoRA"
        return table if key in OF_THE_TABLES else COMMENTS.get(key, "")

    return comment


def scalar(value: object) -> str:
    """Return a value as YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.1e}" if isinstance(value, float) and 0 < value < 1e-3 else str(value)


def with_comment(line: str, comment: str) -> str:
    """Return a line of YAML and its comment, in a column of their own where the line is short."""
    return f"{line:<34} # {comment}" if comment else line


if __name__ == "__main__":
    sys.exit(main())
