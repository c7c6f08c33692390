"""Tables and figure of the ablation, made from its result files alone.

    python benchmarks/ablation_report.py        # results/ablation/{summary.csv,ablation.png}, docs/ablation_table.md

A place in the table without a result says "not run".
"""

import argparse
import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ablation_matrix as matrix
from ablation_files import RESULTS, read_results
from ablation_matrix import Result, Task, Variant
from ablation_plan import Plan
from common import ROOT

TABLE = ROOT / "docs" / "ablation_table.md"
NOT_RUN = "not run"
# Of a run before any is measured, one of two side by side on 2 CPU cores; and what these need beyond it.
SECONDS_PER_RUN = 100.0
SLOWER = {"galore": 35.0, "ldadam": 100.0}


def planned(plan: Plan, results: Mapping[str, Result], *, workers: int) -> str:
    """Return the runs of each task and variant, those done, and the minutes that the others need."""
    try:
        second, unknown = plan.stage2(results), 0
    except LookupError:  # its values are known when stage 1 is finished; these are as many as there can be
        second, unknown = [], 1 + sum(map(len, matrix.FACTORS.values())) + 1
    total = 0.0
    lines = [f"{'task':8} {'variant':32} {'done':>4} {'to do':>5} {'minutes':>8}"]

    def add(task: Task, name: str, done: int, left: int) -> None:
        nonlocal total
        minutes = left * seconds_per_run(results, task.name, name) / 60 / workers
        total += minutes
        lines.append(f"{task.name:8} {name:32} {done:4} {left:5} {minutes:8.1f}")

    for variant in [*matrix.stage1(), *second, *matrix.REFERENCES]:
        for task in plan.tasks:
            done = sum(cell.hash in results for cell in plan.cells(task, variant, results))
            add(task, variant.name, done, plan.left(task, variant, results))
    for task in plan.tasks if unknown else []:
        add(task, f"stage 2, up to {unknown} variants", 0, unknown * plan.seeds)
    return "\n".join([*lines, f"about {total:.0f} minutes with {workers} workers"])


def seconds_per_run(results: Mapping[str, Result], task: str, variant: str) -> float:
    """Return what a run took: of this variant, else of this task, else by default."""
    mine = [r for r in results.values() if r["task"] == task and r["status"] == "ok"]
    same = [r["seconds"] for r in mine if r["variant"] == variant]
    usual = [r["seconds"] for r in mine if r["variant"] not in SLOWER] or [SECONDS_PER_RUN]
    return statistics.median(same) if same else statistics.median(usual) + SLOWER.get(variant, 0.0)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant on a task; None or empty where nothing was run."""

    stage: int
    task: str
    variant: str
    # Best learning rate; whether it is the smallest or largest of the grid, beyond which a better one may lie.
    lr: float | None
    lr_at_edge: bool
    # "ok", "not run", "incomplete", or what went wrong.
    status: str
    losses: Sequence[float]
    # Paired by seed.
    to_paper: Sequence[float]
    to_best: Sequence[float]


def make_row(
    plan: Plan, task: Task, variant: Variant, results: Mapping[str, Result], *, stage: int, best: Variant | None
) -> Row:
    """Return a row from results by configuration hash."""
    lr = plan.best_lr(task, variant, results)
    found = [results[cell.hash] for cell in plan.cells(task, variant, results) if cell.hash in results]
    losses = list(plan.losses(task, variant, results).values())
    if not found:
        status = NOT_RUN
    elif plan.left(task, variant, results) == 0 and (lr is None or not all(map(math.isfinite, losses))):
        status = ", ".join(sorted({r["status"] for r in found} - {"ok"}))
    else:
        status = "ok" if len(losses) == plan.seeds else "incomplete"
    return Row(
        stage=stage,
        task=task.name,
        variant=variant.name,
        lr=lr,
        lr_at_edge=lr in (min(plan.lrs), max(plan.lrs)),
        status=status,
        losses=losses,
        to_paper=[] if variant == matrix.PAPER else plan.differences(task, variant, results),
        to_best=plan.differences(task, variant, results, base=best) if best and variant != best else [],
    )


def make_rows(plan: Plan, results: Mapping[str, Result]) -> list[Row]:
    """Return the rows of both stages; those of stage 2 are known when stage 1 is finished."""
    try:
        second = plan.stage2(results)
    except LookupError:
        second = []
    best = second[0] if second else None
    stages = {1: matrix.stage1(), 2: second, 3: matrix.REFERENCES}
    pairs = [(stage, variant) for stage, variants in stages.items() for variant in variants]
    return [make_row(plan, t, v, results, stage=s, best=best if s == 2 else None) for t in plan.tasks for s, v in pairs]


def plan_of(results: Mapping[str, Result], *, tasks: Sequence[Task] = matrix.TASKS) -> Plan:
    """Return the plan that the newest result of each task belongs to."""
    newest = {r["task"]: r["config"]["inputs"] for r in sorted(results.values(), key=lambda r: r["date"])}
    seeds = max(3, *(r["seed"] + 1 for r in results.values())) if results else 3
    return Plan(inputs={task.name: newest.get(task.name, {}) for task in tasks}, tasks=tasks, seeds=seeds)


def moments(values: Sequence[float]) -> tuple[float, float] | None:
    """Return mean and standard deviation (0 for one value); None if there is no value, or one that is not finite."""
    if not values or not all(map(math.isfinite, values)):
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float], *, of_mean: bool = False, sign: str = "") -> str:
    """Return mean and standard deviation, or the mean's standard error, as text; empty if there is none."""
    found = moments(values)
    if found is None:
        return ""
    width = found[1] / math.sqrt(len(values)) if of_mean else found[1]
    return f"{found[0]:{sign}.4f} " + ("(1 seed)" if len(values) == 1 else f"± {width:.4f}")


def markdown(row: Row, *, second: bool) -> str:
    """Return a line of the table."""
    lr = "" if row.lr is None else f"{row.lr:g}{'*' if row.lr_at_edge else ''}"
    loss = spread(row.losses)
    if row.status != "ok":
        loss = f"{loss} ({row.status})" if loss else row.status
    differences = [row.to_paper, row.to_best] if second else [row.to_paper]
    cells = [row.variant, lr, loss, *(spread(d, of_mean=True, sign="+") for d in differences)]
    return f"| {' | '.join(cells)} |"


def tables(plan: Plan, rows: Sequence[Row], results: Mapping[str, Result]) -> str:
    """Return the Markdown tables."""
    base, made = matrix.BASE, sorted({r["commit"] for r in results.values()})
    lines = [
        "<!-- made by `python benchmarks/ablation_report.py` from results/ablation; do not edit -->",
        f"Held-out loss (answer tokens) after a run: mean and standard deviation over {plan.seeds} seeds; difference "
        "to the paper's setting, paired by seed, with its standard error. SmolLM2-135M-Instruct, fp32, CPU; rank "
        f"{base['rank']}, scale {base['scale']:g}, refresh every {base['refresh_every']} steps, residual from step "
        f"{base['warmup_steps'] + 1}; {matrix.LR_WARMUP_STEPS} steps of linear warm-up, then linear decay. The rate "
        f"is looked for on {', '.join(f'{lr:g}' for lr in plan.lrs)} with seed 0; of those within {plan.lr_margin:g} "
        "of the best one the mean over all seeds decides (stage 2: the rate of `best`); * marks an end of that grid. "
        f"Commits: {', '.join(made) or 'none'}.",
    ]
    nothing_better = "Nothing to run: the best setting found is the paper's, see the last table."
    for task in plan.tasks:
        for stage in (1, 2, 3):
            mine = [row for row in rows if row.task == task.name and row.stage == stage]
            size = f"{task.steps} steps of {task.batch_size}, {task.held_out_rows} held-out rows"
            title = f"**{task.name}, stage {stage}** ({size})"
            names = ["variant", "lr", "held-out loss", "to paper", *["to best"] * (stage == 2)]
            table = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
            table += [markdown(row, second=stage == 2) for row in mine]
            nothing = nothing_better if stage == 2 and not plan.ready(matrix.stage1(), results) else NOT_RUN
            lines += ["", title, "", *(table if mine else [nothing])]
    lines += [
        "",
        "**Both tasks**, mean difference to the paper's setting with its standard error",
        "",
        *both(plan, results),
    ]
    return "\n".join(lines) + "\n"


def both(plan: Plan, results: Mapping[str, Result]) -> list[str]:
    """Return the table that decides which values win: a mean below zero by more than its standard error."""
    candidates = [(f"{f}-{v}", {f: v}) for f, values in matrix.FACTORS.items() for v in values]
    candidates.append((matrix.TOGETHER_NAME, dict(matrix.TOGETHER)))
    lines = ["| variant | to paper | |", "|---|---|---|"]
    for name, values in candidates:
        mean, error = plan.gain(values, results)
        found = f"{mean:+.4f} ± {error:.4f}" if math.isfinite(mean) else NOT_RUN
        lines.append(f"| {name} | {found} | {'better' if mean + error < 0 else ''} |")
    return lines


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write one line for each variant and task; empty where nothing was run."""
    plain = ("stage", "task", "variant", "status", "lr", "lr_at_edge")
    lists = ("losses", "to_paper", "to_best")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*plain, "seeds", *(f"{name}_{what}" for name in lists for what in ("mean", "sd"))])
        for row in rows:
            numbers = [number for name in lists for number in moments(getattr(row, name)) or ("", "")]
            writer.writerow([*(getattr(row, name) for name in plain), len(row.losses), *numbers])


def draw(plan: Plan, rows: Sequence[Row], path: Path) -> None:
    """Draw the paired differences of the factors and of stage 2; the reference lines are far away, in the table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in rows if r.variant not in {v.name for v in (matrix.PAPER, *matrix.REFERENCES)}]
    names = list(dict.fromkeys(r.variant for r in shown))
    size = 2.5 + 4 * len(plan.tasks), 1.4 + 0.34 * len(names)
    figure, grid = pyplot.subplots(1, len(plan.tasks), squeeze=False, sharey=True, figsize=size)
    for axes, task in zip(grid[0], plan.tasks, strict=True):
        for row in (r for r in shown if r.task == task.name):
            height, found = names.index(row.variant), moments(row.to_paper)
            if found is None:
                axes.annotate(row.status, (0, height), color="grey", va="center")
                continue
            error = found[1] / math.sqrt(len(row.to_paper))
            axes.errorbar(found[0], height, xerr=error, fmt="o", capsize=3, color=f"C{row.stage - 1}")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title=task.name, ylim=(len(names) - 0.5, -0.5), xlabel="held-out loss minus the paper's setting")
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="x", alpha=0.3)
        axes.locator_params(axis="x", nbins=5)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def report(results: Mapping[str, Result], plan: Plan, *, folder: Path, table: Path) -> None:
    """Write summary, tables and figure."""
    rows = make_rows(plan, results)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(rows, folder / "summary.csv")
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(tables(plan, rows, results), encoding="utf-8")
    draw(plan, rows, folder / "ablation.png")


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description="Tables and figure of the ablation, from its result files.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files (%(default)s)")
    parser.add_argument("--table", type=Path, default=TABLE, help="Markdown file (%(default)s)")
    parser.add_argument("--check", action="store_true", help="only compare the file; exit status 1 if out of date")
    options = parser.parse_args()
    results = read_results(options.output)
    plan = plan_of(results)
    if options.check:
        fresh = options.table.read_text(encoding="utf-8") == tables(plan, make_rows(plan, results), results)
        print("" if fresh else f"{options.table} is out of date. Run: python benchmarks/ablation_report.py", end="")
        return int(not fresh)
    report(results, plan, folder=options.output, table=options.table)
    print(
        f"{len(results)} results: {options.output / 'summary.csv'}, {options.output / 'ablation.png'}, {options.table}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
