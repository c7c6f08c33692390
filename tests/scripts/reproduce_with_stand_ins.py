"""`reproduce.py` with a model, a training and an evaluation that learn nothing, for tests of the runner."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import reproduce  # noqa: E402
from reproduction import cell_run  # noqa: E402

TRAINING = """
import json, os, pathlib, sys, time
config, model, seconds = sys.argv[1], pathlib.Path(sys.argv[2]), float(os.environ.get("STAND_IN_SECONDS", "0"))
(model.parent / "stand-in.pid").write_text(str(os.getpid()))
time.sleep(seconds)
if os.environ.get("STAND_IN_FAILS", "nothing at all") in pathlib.Path(config).read_text():
    sys.exit(os.environ["STAND_IN_WORDS"])
model.mkdir(parents=True)
(model / "config.json").write_text("{}")
measure = {"train_seconds": 3.6, "steps": 3, "tokens": 90, "loss_last": 1.5, "losses": [[3, 1.5]],
           "peak": {"rss_gib": 1.25}, "trainable_parameters": 7}
pathlib.Path(os.environ["CROSSLORE_MEASURE"]).write_text(json.dumps(measure))
"""
EVALUATION = """
import json, os, time
time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
score = {"value": 12.5, "signature": "stand-in", "confidence_95": [10.0, 15.0]}
print(json.dumps({"task": "mawps", "scores": {"accuracy_strict": score, "accuracy_flexible": score}}))
"""
SCORED = cell_run._run


def run(command: list[str], **options: object) -> int:
    if command[0].endswith("crosslore-eval"):
        command = [sys.executable, "-c", EVALUATION]
    return SCORED(command, **options)  # type: ignore[arg-type]


def make_tiny_model(folder: Path) -> Path:
    """Write what the runner looks for in a model's folder."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


reproduce.make_tiny_model = make_tiny_model
cell_run.training_command = lambda path, model, plan: [sys.executable, "-c", TRAINING, str(path), str(model)]
cell_run._run = run

if __name__ == "__main__":
    os.environ.setdefault("STAND_IN_SECONDS", "0")
    raise SystemExit(reproduce.main())
