"""Print the tables of the paper with what was measured beside them, from result files.

python scripts/make_table.py --table 1 --results results                   # profile paper, as Markdown
python scripts/make_table.py --table 2 --profile small --format csv
python scripts/make_table.py --ablation residual --profile small
python scripts/make_table.py --paper-only                                  # the paper's ten tables, nothing measured
python scripts/make_table.py --paper-only --table 1 --format latex         # one, for booktabs
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from reproduction.experiments import experiments
from reproduction.grids import grid_of
from reproduction.paper import Paper, load_paper
from reproduction.reading import PaperDataError
from reproduction.render import FORMATS, Grid, render
from reproduction.results import Result, ResultError, read_results, results_folder
from reproduction.tables import PROFILES, Planned, ablation_grid, table_grid


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--table", type=int, metavar="N", help="one table, 1 to 10 (default: all)")
    what.add_argument("--ablation", metavar="NAME", help="an ablation that the paper leaves out")
    parser.add_argument("--paper-only", action="store_true", help="the paper's figures, nothing measured")
    parser.add_argument("--profile", choices=PROFILES, default="paper", help="which runs (default: paper)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="results folder (default: the profile's own)")
    parser.add_argument("--format", choices=tuple(FORMATS), default="md", help="default: md")
    options = parser.parse_args(arguments)
    if options.paper_only and options.ablation:
        parser.error("--ablation: the paper has no such table. Leave out --paper-only.")
    try:
        paper = load_paper()
        if options.paper_only:
            grids = [grid_of(paper, number) for number in _numbers(paper, options.table)]
        else:
            results = read_results(options.results or results_folder(options.profile))
            grids = _with_results(paper, results, options, planned=experiments("all", profile=options.profile))
    except (PaperDataError, ResultError) as error:
        print(error, file=sys.stderr)
        return 2
    except ValueError as error:
        parser.error(f"--{'ablation' if options.ablation else 'table'}: {error}")
    print("\n".join(render(grid, options.format) for grid in grids), end="")
    return 0


def _numbers(paper: Paper, table: int | None) -> tuple[int, ...]:
    return paper.table_numbers if table is None else (table,)


def _with_results(
    paper: Paper, results: Sequence[Result], options: argparse.Namespace, *, planned: Sequence[Planned]
) -> list[Grid]:
    if options.ablation:
        return [ablation_grid(paper, options.ablation, results, profile=options.profile, planned=planned)]
    numbers = _numbers(paper, options.table)
    tables = [table_grid(paper, number, results, profile=options.profile, planned=planned) for number in numbers]
    names = paper.ablations if options.table is None else ()
    return [*tables, *(ablation_grid(paper, n, results, profile=options.profile, planned=planned) for n in names)]


if __name__ == "__main__":
    sys.exit(main())
