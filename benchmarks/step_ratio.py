"""Part e, too: what a training step of SmolLM2-135M costs beside LoRA, step for step in one process.

On a machine with other users minutes differ more than methods do. Here every contender has a model of its own in one
process and they take turns, one step each (1 x 128 tokens), in a new order in every turn; the seconds of a turn are
divided by those of LoRA, and of AdamW, in the same turn.

- *seconds*: median over the turns. Refreshes are staggered, so that every step has its share of them.
- *over LoRA*, *over AdamW*: medians over the turns of the ratios, with quartiles for LoRA; *mean over LoRA*: the sum of
  all turns over that of LoRA, in which slow moments count in full.

Which contenders there are: `train_step.py`, which measures memory too and all the peers.
"""

import random
import statistics
import time
from collections.abc import Callable

import torch
from common import ENVIRONMENT, Options, Records, Row, grouped, measuring, of_environment, shown, write_rows
from tqdm import tqdm
from train_step import ADAMW, LORA, SETUPS, WARM_UP

NAME = "step_ratio"
RAW = ("contender", "rank", "turn", "seconds")
SUMMARY = (
    "contender", "rank", "seconds", "over_lora", "over_lora_low", "over_lora_high", "over_lora_mean", "over_adamw",
    "turns",
)  # fmt: skip
CONTENDERS = (
    LORA,
    ADAMW,
    "crosslore_plus compact frozen",
    "crosslore_plus compact-layerwise frozen",
    "crosslore_plus deferred frozen",
    "crosslore compact frozen",
    "crosslore compact-layerwise frozen",
    "crosslore_plus compact",
    "crosslore_plus compact-layerwise",
    "crosslore compact",
    "crosslore compact-layerwise",
)


def run(options: Options) -> None:
    """Measure what is missing and write OUT/step_ratio.csv."""
    with measuring(NAME, RAW, options, summarise) as records:
        names = chosen(options)
        records.drop_partial(names, by=("rank", "turn"))
        for rank in options.pick(full=(16, 128), quick=(16,), tiny=(4,)):
            done = {int(row["turn"]) for row in records.select(rank=rank)}
            missing = [turn for turn in range(options.pick(full=30, quick=8, tiny=2)) if turn not in done]
            if missing:
                measure(rank, names, missing, options, records)


def chosen(options: Options) -> tuple[str, ...]:
    """Return the contenders: those that are asked for, and the two that others are compared with."""
    wanted = CONTENDERS if options.contenders is None else (LORA, ADAMW, *options.contenders)
    return tuple(name for name in CONTENDERS if name in wanted)


def measure(rank: int, names: tuple[str, ...], turns: list[int], options: Options, records: Records) -> None:
    """Let all contenders take their turns."""
    torch.set_num_threads(options.threads)
    steps = {name: stepper(name, rank, options) for name in names}
    for _ in tqdm(range(1 + WARM_UP), desc=f"{NAME}, rank {rank}, warm-up", disable=None):
        for step in steps.values():
            step()
    for turn in tqdm(turns, desc=f"{NAME}, rank {rank}", disable=None):
        for name in random.Random(f"{rank} {turn}").sample(names, len(names)):
            start = time.perf_counter()
            steps[name]()
            records.append(contender=name, rank=rank, turn=turn, seconds=time.perf_counter() - start)


def stepper(name: str, rank: int, options: Options) -> Callable[[], None]:
    """Return one training step of a contender with a model of its own."""
    import real_model

    batch = real_model.random_batch(options)
    model = real_model.load_model(options)
    model.config.use_cache = False
    model, optimizer = SETUPS[name](model, rank)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()

    return step


def summarise(records: Records, options: Options) -> None:
    """Write one row for each contender and rank."""
    rows: list[Row] = []
    for session in filter(None, records.sessions().values()):
        for (rank,), mine in grouped(session, "rank").items():
            seconds: dict[str, dict[str, float]] = {}
            for row in mine:
                seconds.setdefault(str(row["turn"]), {})[str(row["contender"])] = float(row["seconds"])
            names = max(seconds.values(), key=len)
            whole = [turn for turn in seconds.values() if len(turn) == len(names)]
            if len(whole) > 1:  # quartiles of less are none
                ran = [name for name in CONTENDERS if name in names]
                rows += [{**summary(name, whole), "rank": rank, **of_environment(mine)} for name in ran]
    write_rows(options.out / f"{NAME}.csv", rows, (*SUMMARY, *ENVIRONMENT))


def summary(name: str, turns: list[dict[str, float]]) -> Row:
    """Return the medians of one contender, and the quartiles of what it costs beside LoRA."""
    over_lora = [turn[name] / turn[LORA] for turn in turns]
    low, middle, high = statistics.quantiles(over_lora, n=4, method="inclusive")
    return {
        "contender": name,
        "seconds": shown(statistics.median(turn[name] for turn in turns)),
        "over_lora": shown(middle),
        "over_lora_low": shown(low),
        "over_lora_high": shown(high),
        "over_lora_mean": shown(sum(turn[name] for turn in turns) / sum(turn[LORA] for turn in turns)),
        "over_adamw": shown(statistics.median(turn[name] / turn[ADAMW] for turn in turns)),
        "turns": len(turns),
    }
