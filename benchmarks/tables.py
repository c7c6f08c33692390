"""The page docs/benchmark_tables.md, made from the benchmark suite's CSV files alone.

    python benchmarks/tables.py                      # results/benchmarks/*.csv -> docs/benchmark_tables.md
    python benchmarks/tables.py --check              # exit status 1 if the page is out of date

Where a file holds several configurations (device, threads, dtype, profile), each has its own tables.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, SESSION, Row, grouped, read_rows

PAGE = ROOT / "docs" / "benchmark_tables.md"
RESULTS = ROOT / "results" / "benchmarks"
START = """<!-- made by `python benchmarks/tables.py` from results/benchmarks; do not edit -->
# Benchmarks

`make benchmark` measures all of this and writes this page. What is measured and how stands at the top of each program
in `benchmarks/`; the CSV files and pictures are in `results/benchmarks`.
"""
# Name of the part, its heading, and what a reader must know.
PARTS = {
    "step_time": (
        "Step time",
        "Seconds of an optimizer step, median. *Amortised*: refreshes spread over an interval of 200. *Worst*: the "
        "slowest step of an interval over the ordinary one.",
    ),
    "refresh_time": (
        "One refresh",
        "Seconds to fit one basis; the last column is what the step of the refresh itself takes, if less.",
    ),
    "memory": ("Optimizer memory", "MiB of state, and the most temporary MiB of a step, ordinary or with a refresh."),
    "time_split": (
        "Where the time of training goes",
        "Seconds of one training step of SmolLM2-135M, 1 x 128 tokens, refreshes amortised over 200 (the paper's "
        "Figure 2a). *SVD or fit*: the share of the basis.",
    ),
    "train_step": (
        "A whole training step beside LoRA",
        "SmolLM2-135M, batch 1 x 128 tokens: forward, backward and optimizer, refreshes amortised over 200. *Peak*: "
        "MiB of resident memory above the loaded model. *frozen*: embeddings left out, as LoRA leaves them.",
    ),
    "step_ratio": (
        "A training step beside LoRA's, step for step",
        "The same steps, all contenders in one process, a step each in turn, so that a slow moment of the machine is "
        "one for all: medians over turns, quartiles in brackets.",
    ),
    "subspace_error": (
        "What a basis misses of a real gradient",
        "|G - G P P^T| / |G|, median over layers (the paper's Figure 2b), on the batch of the fit and on later ones.",
    ),
    "kept_positions": (
        "Which positions a sparse residual should keep",
        "Share of later residual energy at the kept positions, by what the choice was made on; median and quartiles.",
    ),
}


def figure(value: object, *, factor: float = 1.0, digits: int = 3) -> str:
    """Return a number of a CSV file with so many significant digits; empty where there is none."""
    if value in ("", None):
        return ""
    number = factor * float(str(value))
    text = f"{number:.{digits}g}"
    return f"{number:,.0f}" if "e" in text and abs(number) >= 1 else text


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def step_time(rows: list[Row]) -> Iterator[str]:
    """Yield a table for each set of matrices, fastest first; those that could not run are named below it."""
    header = ("", "amortised", "ordinary", "over AdamW foreach", "over AdamW fused", "over galore-torch", "worst")
    for (workload,), members in grouped(rows, "workload").items():
        ran = sorted((row for row in members if row["status"] == "ok"), key=lambda row: float(row["amortised_seconds"]))
        foreach = next((row["amortised_seconds"] for row in ran if row["contender"] == "torch AdamW foreach"), "")
        lines = []
        for row in ran:
            over = float(row["amortised_seconds"]) / float(foreach) if foreach else ""
            ratios = (over, row["amortised_over_adamw_fused"], row["amortised_over_galore_torch"])
            worst = row["worst_over_median_200"] if row["cycle"] != "0" else ""
            figures = (row["amortised_seconds"], row["ordinary_seconds"], *ratios, worst)
            lines.append((row["contender"], *map(figure, figures)))
        yield f"**{workload}**, rank {max(int(row['rank']) for row in members)}\n\n{markdown(header, lines)}"
        for row in (row for row in members if row["status"] != "ok"):
            yield f"{row['contender']}: {row['status']}"


def refresh_time(rows: list[Row]) -> Iterator[str]:
    """Yield the table of fits, fastest first."""
    rows = sorted(rows, key=lambda row: float(row["seconds"]))
    header = (f"{rows[0]['size']} x {rows[0]['size']}, rank {rows[0]['rank']}", "seconds", "SVD over this", "error")
    names = ("seconds", "svd_over_this", "error", "refresh_step_seconds")
    lines = [(row["contender"], *(figure(row[name]) for name in names)) for row in rows]
    yield markdown((*header, "in the refresh's step"), lines)


def memory(rows: list[Row]) -> Iterator[str]:
    """Yield a table for each set of matrices, least state first."""
    columns = ("state_bytes", "step_temporary_bytes", "refresh_temporary_bytes")
    header = ("", "state", "over AdamW's", "ordinary step", "step with refresh")
    for (workload,), members in grouped(rows, "workload").items():
        ran = sorted((row for row in members if row["status"] == "ok"), key=lambda row: int(row["state_bytes"]))
        lines = []
        for row in ran:
            state, step, refresh = (figure(row[column], factor=2**-20) for column in columns)
            lines.append((row["contender"], state, figure(row["state_over_adamw"]), step, refresh))
        weights = figure(members[0]["weight_bytes"], factor=2**-20, digits=4)
        yield f"**{workload}**, {weights} MiB of weights\n\n{markdown(header, lines)}"
        for row in (row for row in members if row["status"] != "ok"):
            yield f"{row['contender']}: {row['status']}"


def time_split(rows: list[Row]) -> Iterator[str]:
    """Yield the phases of an amortised training step."""
    phases = ("forward", "backward", "fit", "project", "update", "project_back", "residual", "other")
    header = ("", *(phase.replace("_", " ") for phase in phases), "total", "SVD or fit")
    lines = []
    for row in (row for row in rows if row["figure"] == "amortised"):
        share = f"{100 * float(row['fit_share']):.1f} %"
        lines.append((row["contender"], *(figure(row[c]) for c in (*phases, "total_seconds")), share))
    yield markdown(header, lines)


def train_step(rows: list[Row]) -> Iterator[str]:
    """Yield a table for each rank, fastest first; what has no rank is in all of them."""
    header = ("", "seconds", "over LoRA", "over AdamW foreach", "worst step", "peak", "gradients", "state")
    names = ("amortised_seconds", "over_lora", "over_adamw", "worst", "peak_mib", "gradient_mib", "state_mib")
    ranks = sorted({int(row["rank"]) for row in rows})
    by_contender = grouped(rows, "contender")
    everywhere = [mine[0] for mine in by_contender.values() if len(mine) == 1 and len(ranks) > 1]
    for rank in ranks:
        members = [row for row in rows if int(row["rank"]) == rank or row in everywhere]
        ran = sorted((row for row in members if row["status"] == "ok"), key=lambda row: float(row["amortised_seconds"]))
        lines = [(row["contender"], *(figure(row[name]) for name in names)) for row in ran]
        yield f"**rank {rank}**\n\n{markdown(header, lines)}"
        for row in (row for row in members if row["status"] != "ok"):
            yield f"{row['contender']}: {row['status']}"


def step_ratio(rows: list[Row]) -> Iterator[str]:
    """Yield a table for each rank, fastest first."""
    header = ("", "seconds", "over LoRA", "mean over LoRA", "over AdamW foreach")
    for (rank,), members in grouped(rows, "rank").items():
        lines = []
        for row in sorted(members, key=lambda row: float(row["over_lora"])):
            ratio, low, high = (figure(row[f"over_lora{end}"]) for end in ("", "_low", "_high"))
            means, adamw = (figure(row[name]) for name in ("over_lora_mean", "over_adamw"))
            lines.append((row["contender"], figure(row["seconds"]), f"{ratio} ({low} to {high})", means, adamw))
        yield f"**rank {rank}**, {members[0]['turns']} turns\n\n{markdown(header, lines)}"


def subspace_error(rows: list[Row]) -> Iterator[str]:
    """Yield a table for each kind of weight and rank: a row for each basis, a column for each lag."""
    lags = sorted({int(row["lag"]) for row in rows})
    header = ["same batch" if lag == 0 else f"{lag} later" for lag in lags]
    for (kind, rank), members in grouped(rows, "weight", "rank").items():
        lines = []
        for (name,), mine in grouped(members, "basis").items():
            errors = {int(row["lag"]): figure(row["error_median"]) for row in mine}
            lines.append((name, *(errors.get(lag, "") for lag in lags)))
        yield f"**{kind}, rank {rank}**\n\n{markdown(('', *header), lines)}"


def kept_positions(rows: list[Row]) -> Iterator[str]:
    """Yield one table: a row for each choice, a column for each kind of weight."""
    kinds = list(dict.fromkeys(row["weight"] for row in rows))
    lines = []
    for (choice,), mine in grouped(rows, "choice").items():
        shares = {row["weight"]: _percent(row) for row in mine}
        lines.append((choice, *(shares.get(kind, "") for kind in kinds)))
    ratio, rank = float(rows[0]["ratio"]), rows[0]["rank"]
    yield markdown((f"{ratio:.1%} of positions, rank {rank}", *kinds), lines)


def _percent(row: Row) -> str:
    middle, low, high = (100 * float(row[f"share_{name}"]) for name in ("median", "lower_quartile", "upper_quartile"))
    return f"{middle:.0f} % ({low:.0f} to {high:.0f})"


TABLES: dict[str, Callable[[list[Row]], Iterator[str]]] = {
    f.__name__: f
    for f in (step_time, refresh_time, memory, time_split, train_step, step_ratio, subspace_error, kept_positions)
}


def train_7b(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a table for each model, rank and setting; of a 7B model with random weights on a GPU."""
    header = ("", "seconds", "over LoRA", "kernels", "fitting", "allocated", "reserved")
    ran = [{**row, "name": key.split(", ")[1]} for key, row in rows.items() if row["status"] == "ok"]
    for (model, rank, tokens), mine in grouped(ran, "model", "rank", "tokens").items():
        lora = next((row["amortised_seconds"] for row in mine if row["method"] == "lora"), None)
        lines = []
        for row in sorted(mine, key=lambda row: float(row["amortised_seconds"])):
            over = "" if lora is None else figure(row["amortised_seconds"] / lora)
            kernels, share = figure(row.get("device_seconds", "")), f"{100 * row['fitting_share']:.0f} %"
            peaks = (figure(row[f"peak_{kind}_gib"], digits=4) for kind in ("allocated", "reserved"))
            lines.append((row["method"], figure(row["amortised_seconds"]), over, kernels, share, *peaks))
        where = mine[0]["environment"]
        yield f"**{model}, rank {rank}, {tokens} tokens.** {where['device']}, torch {where['torch']}."
        yield markdown(header, lines)
    for key, row in rows.items():
        if row["status"] != "ok":
            yield f"{key}: {row['status']}"


# Settings that `train_7b.py` is meant for.
MODELS, RANKS, TOKENS = ("7b", "13b"), (16, 128), ("256", "2048", "gsm8k")


def not_run(rows: dict[str, dict[str, Any]]) -> str:
    """Return what of a GPU's settings and methods has no row."""
    from train_7b import METHODS

    ran = [row for row in rows.values() if row["status"] == "ok"]
    settings = {(row["model"], row["rank"], row["tokens"]) for row in ran}
    planned = [(model, rank, tokens) for model in MODELS for rank in RANKS for tokens in TOKENS]
    missing = [f"{m}, rank {r}, {t} tokens" for m, r, t in planned if (m, r, t) not in settings]
    missing += [f"the method {method}" for method in METHODS if method not in {row["method"] for row in ran}]
    return f"Not run on a GPU yet: {'; '.join(missing)}." if missing else ""


SEVEN_B = """## LLaMA2-7B on a GPU

Random weights, bf16, batch 1, `python benchmarks/train_7b.py`. *Seconds*: a whole step, refreshes amortised over 200,
by the clock. The processor beside this GPU takes several times as long to launch the kernels as the GPU to run them,
and unsteadily: the clock compares methods of one setting, roughly. *Kernels*: the time on the GPU itself. *Fitting*:
the share of refreshes in the seconds. Peaks in GiB, of ordinary steps. Ours and `adamw8bit` have 8-bit moments and
train the embeddings; LoRA and DoRA are adapters alone, by torch's AdamW in fp32 and without autocast, as peft makes
them; galore-torch has bf16 moments. `gsm8k`: 20 lengths of that data set's rows, 103 to 317 tokens;
with a residual (`crosslore:...`) a kernel was compiled anew for each of them then, which it is not any more. A method
without a colon after its name steps inside backward with whole gradients.
"""


def conditions(rows: list[Row]) -> str:
    """Return what the numbers were measured with."""
    row = max(rows, key=lambda row: row["date"])
    profile = "" if row["profile"] == "full" else f", {row['profile']} sizes"
    return (
        f"{row['device']}, {row['threads']} threads, {row['dtype']}, torch {row['torch']}, commit {row['commit']}, "
        f"{row['date'][:10]}{profile}."
    )


def page(results: Path, root: Path = ROOT) -> str:
    """Return the page; a part that was not measured says so."""
    lines = [START]
    for part, (heading, text) in PARTS.items():
        lines += [f"## {heading}", "", text, ""]
        rows = read_rows(results / f"{part}.csv")
        for mine in grouped(rows, *SESSION).values():
            lines += [f"{conditions(mine)}", ""]
            for table in TABLES[part](mine):
                lines += [table, ""]
        picture = results / f"{part}.png"
        if not rows:
            lines += ["Not measured. Run `make benchmark`.", ""]
        elif picture.is_file() and results.is_relative_to(root):
            lines += [f"![{heading}](../{picture.relative_to(root).as_posix()})", ""]
    measured = results / "train_7b.json"
    rows_7b = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else {}
    lines += [SEVEN_B, *(f"{table}\n" for table in train_7b(rows_7b))]
    lines += [not_run(rows_7b), ""] if rows_7b else ["Not measured: needs a GPU.", ""]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the CSV files")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="the page")
    parser.add_argument("--check", action="store_true", help="only compare; exit status 1 if the page is out of date")
    options = parser.parse_args(arguments)
    text = page(options.results.resolve())
    if not options.check:
        options.page.write_text(text, encoding="utf-8")
        print(options.page)
        return 0
    if options.page.is_file() and options.page.read_text(encoding="utf-8") == text:
        return 0
    print(f"{options.page} is out of date. Run: python benchmarks/tables.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
