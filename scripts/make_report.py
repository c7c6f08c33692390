"""Write one HTML file with the tables, figures and cells of a profile, from result files.

python scripts/make_report.py                                        # profile paper, into results/report-paper.html
python scripts/make_report.py --profile small --out report.html
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from reproduction.experiments import experiments
from reproduction.paper import load_paper
from reproduction.reading import PaperDataError
from reproduction.report import write_report
from reproduction.results import ResultError, read_results, results_folder
from reproduction.tables import PROFILES

ROOT = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="paper", help="which runs (default: paper)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="results folder (default: the profile's own)")
    parser.add_argument("--benchmarks", type=Path, default=ROOT / "results" / "benchmarks", metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report-<profile>.html in the results folder")
    options = parser.parse_args(arguments)
    folder = options.results or results_folder(options.profile)
    try:
        path = write_report(
            options.out or folder / f"report-{options.profile}.html",
            paper=load_paper(),
            results=read_results(folder),
            folder=folder,
            profile=options.profile,
            planned=experiments("all", profile=options.profile),
            benchmarks=options.benchmarks,
        )
    except (PaperDataError, ResultError) as error:
        print(error, file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
