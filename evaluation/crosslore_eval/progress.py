"""Answers under a progress bar that also moves within a batch."""

import sys
import time
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from crosslore_eval.engines import Engine
from crosslore_eval.errors import EvalError
from crosslore_eval.generate import Answer
from crosslore_eval.settings import Settings

# Between two redraws: on a terminal, and in a file, which keeps each.
TERMINAL_SECONDS = 0.5
FILE_SECONDS = 10.0


class _Shown:
    """Tokens and their speed beside the bar."""

    def __init__(self, bar: "tqdm[object]", most: int) -> None:
        self.bar, self.most, self.started = bar, most, time.perf_counter()
        # of finished batches, of the one at work, and its steps
        self.before = self.now = self.steps = 0

    def step(self, tokens: int) -> None:
        """Count the tokens of one step of the batch at work."""
        self.now, self.steps = self.now + tokens, self.steps + 1
        self.draw(rows=0)

    def end_batch(self, answers: Sequence[Answer]) -> None:
        self.before += sum(answer.tokens for answer in answers)
        self.now = self.steps = 0
        self.draw(rows=len(answers))

    def draw(self, *, rows: int) -> None:
        tokens = self.before + self.now
        batch = f", batch at {self.steps}/{self.most}" if self.steps else ""
        speed = tokens / (time.perf_counter() - self.started)
        self.bar.set_postfix_str(f"{tokens} tokens, {speed:.1f} tokens/s{batch}", refresh=False)
        self.bar.update(rows)


def with_progress(
    engine: Engine, prompts: Sequence[Sequence[int]], *, batches: Sequence[Sequence[int]], settings: Settings
) -> Iterator[list[Answer]]:
    """Yield each batch's answers under a progress bar with rows, tokens and tokens per second.

    Args:
        engine: that answers.
        prompts: of all rows, as tokens.
        batches: positions in `prompts` that are left to answer.
        settings: of decoding; the batch size is named where memory is not enough.

    Raises:
        EvalError: if the GPU has too little memory.
    """
    done = len(prompts) - sum(map(len, batches))
    interval = TERMINAL_SECONDS if sys.stderr.isatty() else FILE_SECONDS
    # smoothing=0: the mean speed; a moving one would take a redraw's interval for a whole batch's
    with tqdm(
        total=len(prompts), initial=done, desc="generating", unit="row", miniters=0, mininterval=interval, smoothing=0
    ) as bar:
        shown = _Shown(bar, settings.decoding.max_new_tokens)
        answers = engine.answers(prompts, batches, settings.decoding, on_step=shown.step)
        for rows in _out_of_memory_said(answers, settings):
            yield rows
            shown.end_batch(rows)


def _out_of_memory_said(answers: Iterator[list[Answer]], settings: Settings) -> Iterator[list[Answer]]:
    import torch

    try:
        yield from answers
    except torch.OutOfMemoryError as error:
        raise EvalError(
            f"the GPU has too little memory for {settings.batch_size} prompts at once. Give a smaller --batch-size "
            "(with --overwrite if a partial file is there)."
        ) from error
