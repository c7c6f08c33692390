"""`crosslore-eval` and `python -m crosslore_eval`: says what to install if the packages of the extra are missing."""

import sys
from collections.abc import Sequence

from crosslore_eval.errors import missing_package


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code of `crosslore_eval.cli.main`, or 2 if it cannot be imported."""
    try:
        from crosslore_eval.cli import main as run
    except ModuleNotFoundError as error:
        message = missing_package(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    return run(argv)


if __name__ == "__main__":
    raise SystemExit(main())
