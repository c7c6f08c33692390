"""Print the tables of the paper, from scripts/paper_tables.toml.

python scripts/make_table.py --paper-only                             # all ten, as Markdown
python scripts/make_table.py --paper-only --table 1 --format latex    # one, for booktabs
"""

import argparse
import sys
from collections.abc import Sequence

from reproduction.grids import grid_of
from reproduction.paper import load_paper
from reproduction.reading import PaperDataError
from reproduction.render import FORMATS, render


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--paper-only", action="store_true", required=True, help="the paper's figures, nothing measured"
    )
    parser.add_argument("--table", type=int, metavar="N", help="one table, 1 to 10 (default: all)")
    parser.add_argument("--format", choices=tuple(FORMATS), default="md", help="default: md")
    options = parser.parse_args(arguments)
    try:
        paper = load_paper()
        numbers = paper.table_numbers if options.table is None else (options.table,)
        texts = [render(grid_of(paper, number), options.format) for number in numbers]
    except PaperDataError as error:
        print(error, file=sys.stderr)
        return 2
    except ValueError as error:
        parser.error(f"--table: {error}")
    print("\n".join(texts), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
