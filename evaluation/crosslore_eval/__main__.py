"""`python -m crosslore_eval`: the same as `crosslore-eval`."""

from crosslore_eval.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
