"""Write the small bundled data set: restaurant descriptions and arithmetic word problems, in words of our own.

    python scripts/make_bundled_data.py              # writes data/
    python scripts/make_bundled_data.py --check      # exit code 1 unless data/ holds what this script writes

The same files come out byte for byte on every machine. Words are in `bundled_vocabulary.py`, stories in
`bundled_stories.toml`; this file decides how many rows there are, that training and test rows differ, and the format
(LLaMA-Factory's alpaca: instruction, input, output).
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bundled_arithmetic import draw_problem, load_stories
from bundled_draw import Draw
from bundled_restaurants import describe, draw_facts, meaning

REPO_ROOT = Path(__file__).resolve().parents[1]
SEED = 1
TRAIN_ROWS = 800
TEST_ROWS = 120
# Descriptions of one test restaurant.
REFERENCES = 3
RESTAURANTS_INSTRUCTION = "Describe the restaurant from its attributes."
ARITHMETIC_INSTRUCTION = "Solve the problem step by step. End with the answer on a line that begins with ####."

Row = dict[str, str]


def restaurant_rows(draw: Draw) -> tuple[list[Row], list[Row], list[list[str]]]:
    """Return training rows, test rows, and the references of each test row; no two rows share their attributes."""
    rows: list[Row] = []
    references: list[list[str]] = []
    seen: set[frozenset[tuple[str, str]]] = set()
    while len(rows) < TRAIN_ROWS + TEST_ROWS:
        facts = draw_facts(draw)
        key = frozenset(facts.items())
        if key in seen or facts["name"] == facts.get("near"):
            continue
        seen.add(key)
        texts = [describe(facts, draw)]
        while len(rows) >= TRAIN_ROWS and len(texts) < REFERENCES:
            if (text := describe(facts, draw)) not in texts:
                texts.append(text)
        rows.append({"instruction": RESTAURANTS_INSTRUCTION, "input": meaning(facts, draw), "output": texts[0]})
        references.append(texts)
    return rows[:TRAIN_ROWS], rows[TRAIN_ROWS:], references[TRAIN_ROWS:]


def arithmetic_rows(draw: Draw) -> tuple[list[Row], list[Row]]:
    """Return training and test rows: every story equally often, no story twice with the same numbers."""
    stories = load_stories()
    rows: list[Row] = []
    seen = set()
    while len(rows) < TRAIN_ROWS + TEST_ROWS:
        story = len(rows) % len(stories)
        problem = draw_problem(stories[story], draw)
        if (story, problem.numbers) not in seen:
            seen.add((story, problem.numbers))
            row = {"instruction": ARITHMETIC_INSTRUCTION, "input": problem.question, "output": problem.solution}
            rows.append(row)
    return draw.shuffled(rows[:TRAIN_ROWS]), draw.shuffled(rows[TRAIN_ROWS:])


def as_json(value: object) -> str:
    """Return readable JSON; other letters than ASCII stay as they are."""
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def make_files() -> dict[str, str]:
    """Return the text of every file of the bundled data set, by its name."""
    restaurants_train, restaurants_test, references = restaurant_rows(Draw(f"restaurants {SEED}"))
    arithmetic_train, arithmetic_test = arithmetic_rows(Draw(f"arithmetic {SEED}"))
    sets = {
        "crosslore_restaurants": ("restaurants_train.json", restaurants_train),
        "crosslore_restaurants_test": ("restaurants_test.json", restaurants_test),
        "crosslore_arithmetic": ("arithmetic_train.json", arithmetic_train),
        "crosslore_arithmetic_test": ("arithmetic_test.json", arithmetic_test),
    }
    files = {file: as_json(rows) for file, rows in sets.values()}
    lines = [
        json.dumps({"input": row["input"], "references": texts}, ensure_ascii=False)
        for row, texts in zip(restaurants_test, references, strict=True)
    ]
    files["restaurants_test_references.jsonl"] = "\n".join(lines) + "\n"
    # LLaMA-Factory reads this one in the machine's own encoding: keep it ASCII. Its default columns are ours.
    files["dataset_info.json"] = as_json({name: {"file_name": file} for name, (file, _) in sets.items()})
    return files


def stale_files(files: dict[str, str], folder: Path) -> list[str]:
    """Return the names of the files that `folder` lacks or holds with other bytes."""
    return [
        name
        for name, text in files.items()
        if not (folder / name).is_file() or (folder / name).read_bytes() != text.encode()
    ]


def write_files(files: dict[str, str], folder: Path) -> None:
    """Write the files into `folder`; each appears complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        partial = folder / f".{name}.partial"
        partial.write_bytes(text.encode())
        os.replace(partial, folder / name)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 1 if `--check` found files that differ."""
    parser = argparse.ArgumentParser(description="Write the bundled data set.")
    parser.add_argument("--output", type=Path, default=REPO_ROOT / "data", help="folder (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing, say whether the files are up to date")
    args = parser.parse_args(argv)
    files = make_files()
    if args.check:
        stale = stale_files(files, args.output)
        if stale:
            print(
                f"error: files in {args.output} must be what this script writes; missing or different: "
                f"{', '.join(stale)}. Run `python scripts/make_bundled_data.py` and commit the result.",
                file=sys.stderr,
            )
            return 1
        print(f"{args.output}: {len(files)} files up to date")
        return 0
    write_files(files, args.output)
    print(f"{args.output}: wrote {', '.join(files)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
