"""The options of `crosslore-eval`, with examples in the help of every command."""

import argparse
from pathlib import Path
from typing import NoReturn

from crosslore_eval import __version__
from crosslore_eval.bootstrap import DEFAULT_SAMPLES, LEAST_SAMPLES, MOST_SAMPLES

EPILOG = """examples:
  crosslore-eval run e2e --model saves/crosslore_e2e_r128          # outputs, then scores
  crosslore-eval predict gsm8k --model DIR --template alpaca --out gsm8k.jsonl
  crosslore-eval score gsm8k --predictions gsm8k.jsonl --json
  crosslore-eval score e2e --predictions outputs.txt --references references.txt --confidence
  crosslore-eval compare e2e a.jsonl b.jsonl
  crosslore-eval tasks

exit codes: 0 done, 1 failed, 2 an input or option cannot be used, 130 interrupted (predict and run go on when repeated)
"""
PREDICT_EXAMPLES = """examples:
  crosslore-eval predict e2e --model saves/crosslore_e2e_r128 --out e2e.jsonl
  crosslore-eval predict gsm8k --model meta-llama/Llama-2-7b-hf --template alpaca --out base.jsonl --limit 200
  crosslore-eval predict mawps --model LORA_ADAPTER_FOLDER --engine vllm --out lora.jsonl

Interrupted, even by kill -9, the same command goes on and writes the same file.
"""
SCORE_EXAMPLES = """examples:
  crosslore-eval score e2e --predictions e2e.jsonl                                # from predict, references included
  crosslore-eval score e2e --predictions outputs.txt --references refs.txt        # in the layout of e2e-metrics
  crosslore-eval score e2e --predictions e2e.jsonl --protocol paper
  crosslore-eval score gsm8k --predictions saves/run/generated_predictions.jsonl  # LLaMA-Factory's do_predict
  crosslore-eval score mawps --predictions out.jsonl --references test.jsonl --json
"""
RUN_EXAMPLES = """examples:
  crosslore-eval run e2e --model saves/crosslore_e2e_r128
  crosslore-eval run gsm8k --model models/SmolLM2-135M-Instruct --limit 100 --confidence
"""
COMPARE_EXAMPLES = """examples:
  crosslore-eval compare e2e galore.jsonl crosslore.jsonl
  crosslore-eval compare gsm8k a.txt b.txt --references gsm8k/test.jsonl --samples 10000
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """End with code 2 and what is wrong, instead of a page of usage."""
        self.exit(2, f"error: {message}. See: {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = Parser(
        prog="crosslore-eval",
        description="Outputs of a model for a task, and their scores, as the official scripts compute them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"crosslore-eval {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    predict = _command(commands, "predict", "write a model's outputs to a file", PREDICT_EXAMPLES)
    _add_data(predict)
    _add_generation(predict, out_help="jsonl file, one line an example", out_required=True)
    score = _command(commands, "score", "score outputs", SCORE_EXAMPLES)
    score.add_argument(
        "--predictions", type=Path, required=True, metavar="FILE", help="text, jsonl, or LLaMA-Factory's"
    )
    _add_data(score)
    _add_references(score)
    _add_scoring(score)
    run = _command(commands, "run", "predict, then score", RUN_EXAMPLES)
    _add_data(run)
    _add_generation(run, out_help="jsonl file (default: saves/eval/<model>--<task>.jsonl)", out_required=False)
    _add_scoring(run)
    compare = _command(commands, "compare", "is system B better than system A?", COMPARE_EXAMPLES)
    compare.add_argument("a", type=Path, metavar="A", help="outputs of system A")
    compare.add_argument("b", type=Path, metavar="B", help="outputs of system B")
    _add_data(compare)
    _add_references(compare)
    _add_output(compare)
    compare.add_argument("--protocol", metavar="NAME", help="see: crosslore-eval tasks")
    compare.add_argument(
        "--samples", type=_samples, default=DEFAULT_SAMPLES, metavar="N",
        help="bootstrap samples and swaps (%(default)s)",
    )  # fmt: skip
    tasks = commands.add_parser("tasks", help="list tasks, their protocols and data", description="List the tasks.")
    tasks.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _command(
    commands: "argparse._SubParsersAction[Parser]", name: str, summary: str, examples: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", metavar="TASK", help="see: crosslore-eval tasks")
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, metavar="DIR",
        help="folder with the task's files (default: CROSSLORE_DATA_DIR, data/prepared, data, then the hub)",
    )  # fmt: skip
    parser.add_argument("--split", metavar="NAME", help="split of the task's data (default: test)")


def _add_references(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--references", type=Path, metavar="FILE",
        help="text, jsonl or csv (default: those in the predictions file, else the task's data)",
    )  # fmt: skip


def _add_generation(parser: argparse.ArgumentParser, *, out_help: str, out_required: bool) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint, LoRA adapter, or name on the hub")
    parser.add_argument("--base-model", metavar="DIR", help="a LoRA adapter's base (default: the one that it names)")
    parser.add_argument("--out", type=Path, required=out_required, metavar="FILE", help=out_help)
    parser.add_argument("--overwrite", action="store_true", help="start anew whatever --out holds")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples")
    parser.add_argument(
        "--template", default="model", metavar="NAME",
        help="prompt template: model is the model's own chat template, the others are LLaMA-Factory's alpaca, chatml, "
        "default, empty, llama2 and llama3 (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--instruction", metavar="TEXT", help="instead of the task's own")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at once (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="per answer (default: the task's)")
    parser.add_argument("--max-prompt-tokens", type=int, metavar="N", help="cut longer inputs (default: the context)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="needs a temperature (%(default)s)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="needs a temperature; 0 is all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of draws, with a temperature (%(default)s)")
    parser.add_argument("--engine", default="transformers", metavar="NAME", help="transformers or vllm (%(default)s)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda:0, ... (default: the GPU if there is one)")
    parser.add_argument("--dtype", default="auto", metavar="NAME", help="auto: bfloat16 on a GPU, float32 on a CPU")


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--protocol", metavar="NAME", help="see: crosslore-eval tasks (default: the task's first)")
    parser.add_argument(
        "--confidence", type=_samples, nargs="?", const=DEFAULT_SAMPLES, default=0, metavar="N",
        help=f"95 %% intervals from N bootstrap samples ({DEFAULT_SAMPLES} when no N is given)",
    )  # fmt: skip
    _add_output(parser)


def _samples(text: str) -> int:
    """Return a number of bootstrap samples; what is often meant by another number is a level."""
    try:
        samples = int(text)
    except ValueError:
        samples = 0
    if not LEAST_SAMPLES <= samples <= MOST_SAMPLES:
        raise argparse.ArgumentTypeError(
            f"must be a number of bootstrap samples in [{LEAST_SAMPLES}, {MOST_SAMPLES}], got {text}. The intervals' "
            "level is always 95 %: leave the number out to keep to the default"
        )
    return samples


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the scores: .png, .svg or .pdf")
