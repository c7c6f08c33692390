"""`python -m crosslore.integrations.llamafactory train config.yaml`: llamafactory-cli with the type `crosslore`.

For places where the start-up file is not allowed (`python -S`, PYTHONPATH without site-packages). Works under
torchrun too: `torchrun --nproc-per-node 2 -m crosslore.integrations.llamafactory train config.yaml`.
"""

import importlib.util
import os
import sys

import _crosslore_hook


def main() -> None:
    """Register the hook in this process and run LLaMA-Factory's command line."""
    if importlib.util.find_spec("llamafactory") is None:
        sys.exit('llamafactory is not installed. Run `pip install "crosslore[llamafactory]"`.')
    _crosslore_hook.register()  # type: ignore[no-untyped-call]
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    trains = first == "train" or first.startswith("--") or first.endswith((".yaml", ".yml", ".json"))
    if "LOCAL_RANK" in os.environ and trains:  # a worker of torchrun: it starts no workers of its own
        if first == "train":
            del sys.argv[1]
        from llamafactory.train.tuner import run_exp

        run_exp()
        return
    from llamafactory import cli, launcher

    # The launcher starts workers as `torchrun ... {__file__} args`; they need the hook as well.
    launcher.__file__ = "-m crosslore.integrations.llamafactory"
    cli.main()


if __name__ == "__main__":
    main()
