"""Draw the paper's figures, with what was measured below its numbers, from result files.

python scripts/make_figures.py                              # all, of profile paper, into results/report-paper
python scripts/make_figures.py --figure 3 --profile small --out pictures
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from reproduction.figures import DRAWINGS, draw, save
from reproduction.panels import Sources
from reproduction.paper import load_paper
from reproduction.reading import PaperDataError
from reproduction.results import ResultError, read_results, results_folder
from reproduction.tables import PROFILES

ROOT = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", choices=tuple(DRAWINGS), action="append", help="which (default: all)")
    parser.add_argument("--profile", choices=PROFILES, default="paper", help="which runs (default: paper)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="results folder (default: the profile's own)")
    parser.add_argument("--benchmarks", type=Path, default=ROOT / "results" / "benchmarks", metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: report-<profile> in the results folder")
    options = parser.parse_args(arguments)
    folder = options.results or results_folder(options.profile)
    try:
        sources = Sources(
            paper=load_paper(),
            results=read_results(folder),
            profile=options.profile,
            benchmarks=options.benchmarks,
        )
        for number in options.figure or DRAWINGS:
            out = options.out or folder / f"report-{options.profile}"
            print(*save(draw(number, sources), out / f"figure{number}"), sep="\n")
    except (PaperDataError, ResultError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
