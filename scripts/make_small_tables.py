"""Write what profile `small` measured into README.md and docs/reproduction.md, from the result files.

python scripts/make_small_tables.py           # write
python scripts/make_small_tables.py --check   # exit status 1 if a page is out of date
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from generated_part import write_part
from reproduction.cells import METHODS, TUNING
from reproduction.grids import printed
from reproduction.paper import load_paper
from reproduction.results import Result, read_results
from reproduction.tables import number_of

ROOT = Path(__file__).parents[1]
PROFILE, NAME = "small", "make_small_tables.py"
END = "<!-- end of the results -->"
README, DOCS = ROOT / "README.md", ROOT / "docs" / "reproduction.md"
# data set -> table, score of the column, decimals
SCORES = {"e2e": ("table2", "BLEU", 1), "mawps": ("table1", "accuracy", 1), "gsm8k": ("table1", "accuracy", 1)}
HEADS = {"e2e": "E2E, BLEU", "mawps": "MAWPS, accuracy %", "gsm8k": "GSM8K, accuracy %"}
TEXT_SCORES = {"BLEU": 1, "NIST": 2, "METEOR": 1, "ROUGE_1": 1, "ROUGE_2": 1, "ROUGE_L": 1, "CIDEr": 2,
               "e2e-official/BLEU": 3}  # fmt: skip
NOT_RUN, BEFORE = "not run", "before training"

Found = dict[tuple[str, str, int], Result]  # by data set, method, rank


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit status 1 if a page is out of date")
    check = parser.parse_args().check
    results = [r for r in read_results(ROOT / "results") if r.experiment.profile == PROFILE]
    start, command = f"<!-- results of profile {PROFILE}: written by scripts/{NAME} -->", f"scripts/{NAME}"
    return max(
        write_part(page, text, start=start, end=END, check=check, command=command)
        for page, text in ((README, overview(results)), (DOCS, details(results)))
    )


def overview(results: Sequence[Result]) -> str:
    """Return the scores of each method and rank with their intervals, and what its training took on E2E."""
    found = by_place(results)
    rows = [
        (name_of(method), str(rank or "–"), *(score(found.get((d, method, rank)), *SCORES[d][1:]) for d in SCORES),
         *cost(found.get(("e2e", method, rank))))
        for method, rank in places(found)
    ]  # fmt: skip
    first = (BEFORE, "–", *(untrained(d, *SCORES[d][1:]) for d in SCORES), "–", "–")
    return table(("method", "rank", *HEADS.values(), "processor s a step, E2E", "peak GiB, E2E"), [first, *rows])


def details(results: Sequence[Result]) -> str:
    """Return the learning rates that were chosen, all scores of E2E, and what every training took."""
    found = by_place(results)
    texts = [
        (name_of(method), str(rank or "–"),
         *(score(found.get(("e2e", method, rank)), name, digits) for name, digits in TEXT_SCORES.items()))
        for method, rank in places(found)
    ]  # fmt: skip
    costs = [
        (name_of(method), str(rank or "–"), *(c for d in SCORES for c in cost(found.get((d, method, rank)))))
        for method, rank in places(found)
    ]
    first = (BEFORE, "–", *(untrained("e2e", name, digits) for name, digits in TEXT_SCORES.items()))
    heads = [f"{head.partition(',')[0]}, {what}" for head in HEADS.values() for what in ("s a step", "GiB")]
    return "\n\n".join(
        (
            "Learning rates, each of four, and the held-out loss after 25 steps:",
            table(("method", *(head.partition(",")[0] for head in HEADS.values())), chosen_rates(results)),
            "E2E, protocol `paper` (one reference at a time, BLEU over characters) and, last, the official BLEU, with "
            "95 % bootstrap intervals over the test inputs:",
            table(
                (
                    "method",
                    "rank",
                    *(name.replace("_", "-").replace("e2e-official/", "official ") for name in TEXT_SCORES),
                ),
                [first, *texts],
            ),
            "What a training took, processor seconds of a step and peak memory of the process:",
            table(("method", "rank", *heads), costs),
        )
    )


def by_place(results: Iterable[Result]) -> Found:
    tables = {table for table, *_ in SCORES.values()}
    return {
        (r.experiment.dataset, r.experiment.method, r.experiment.rank): r
        for r in results
        if r.experiment.table in tables and r.experiment.seed == 1
    }


def places(found: Found) -> list[tuple[str, int]]:
    """Return methods by rank, in the order of the tables; those without one at the end."""
    pairs = {(method, rank) for _, method, rank in found}
    return sorted(pairs, key=lambda pair: (not pair[1], pair[1], list(METHODS).index(pair[0])))


def chosen_rates(results: Sequence[Result]) -> list[tuple[str, ...]]:
    losses: dict[tuple[str, str], dict[str, float]] = {}
    for result in results:
        cell, loss = result.experiment, number_of(result, "eval_loss")
        if cell.table == TUNING and loss is not None:
            losses.setdefault((cell.method, cell.dataset), {})[str(cell.column)] = loss
    rows = []
    for method in METHODS:
        grids = [losses.get((method, dataset), {}) for dataset in SCORES]
        best = [min(grid, key=grid.__getitem__) if grid else "" for grid in grids]
        cells = [f"{rate} ({grid[rate]:.3f})" if rate else NOT_RUN for rate, grid in zip(best, grids, strict=True)]
        rows.append((name_of(method), *cells))
    return rows


def score(result: Result | None, metric: str, digits: int) -> str:
    if result is None:
        return NOT_RUN
    name = {"accuracy": "accuracy_flexible"}.get(metric, metric)
    found = result.scores.get(name)
    if found is None or found.value is None:
        return result.status if result.status != "ok" else "not measured"
    interval = "" if found.low is None else f" [{found.low:.{digits}f}, {found.high:.{digits}f}]"
    return f"{found.value:.{digits}f}{interval}"


def untrained(dataset: str, metric: str, digits: int) -> str:
    """Return a score of the model as it comes, from what the command in docs/reproduction.md prints."""
    path = ROOT / "results" / "evaluation" / f"untrained_{PROFILE}_{dataset}.json"
    scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    found = scores.get({"accuracy": "accuracy_flexible"}.get(metric, metric))
    if found is None:
        return "–"
    low, high = found["confidence_95"]
    return f"{found['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def cost(result: Result | None) -> tuple[str, str]:
    if result is None or result.time is None or result.peak is None or not result.train.get("steps"):
        return NOT_RUN, NOT_RUN
    return f"{3600 * result.time / result.train['steps']:.2f}", f"{result.peak:.2f}"


def name_of(method: str) -> str:
    return printed("method", method, load_paper().names)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))


if __name__ == "__main__":
    sys.exit(main())
