"""Part b: bytes of optimizer state, and the most temporary bytes of a step, for the shapes of part a.

- *State*: every tensor that `optimizer.state` leads to, by its storage, each storage once: exact. Inner tensors of
  torchao's subclasses and of galore-torch's projector objects are counted.
- *Temporary bytes*: the most that is allocated at one moment of a step beyond what was allocated before it. On a CPU
  from torch.profiler's record of the allocator's calls (memory that a library takes from the system by itself, such as
  MKL's buffers, is not seen); on CUDA from max_memory_allocated.
- *Refresh*: the same over the steps in which every weight is refreshed once (see `step_time`). A contender whose
  first step takes over 10 s has that one as its refresh, without what the step leaves behind (the fresh state).

One contender after the other; each one's figures do not depend on the others.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import contenders as who
import torch
from common import Options, Records, Row, grouped, measuring, write_rows
from contenders import Contender, Skip
from step_time import SLOW
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

NAME = "memory"
FIGURES = ("weight_bytes", "state_bytes", "step_temporary_bytes", "refresh_temporary_bytes")
RAW = ("workload", "contender", "rank", *FIGURES, "note")
# Name of the profiled part that counts.
MARK = "crosslore: measured"
SUMMARY = ("workload", "contender", "status", "rank", *FIGURES, "state_over_adamw", "state_bytes_per_weight_element")


def run(options: Options) -> None:
    """Measure what is missing and write OUT/memory.csv."""
    with measuring(NAME, RAW, options, summarise) as records:
        for workload, sizes in who.workloads(options).items():
            measure(workload, sizes, records, options)


def measure(workload: str, sizes: dict[str, int], records: Records, options: Options) -> None:
    """Measure one set of matrices."""
    done = {row["contender"] for row in records.select(workload=workload)}
    missing = [contender for name, contender in who.contenders(options).items() if name not in done]
    if not missing:
        return
    model, rank = who.build_workload(sizes, options), who.rank_of(options)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for contender in tqdm(missing, desc=f"{NAME}: {workload}", disable=None):
        row = {"workload": workload, "contender": contender.name, "rank": contender.rank(rank), "weight_bytes": size}
        try:
            row |= figures(contender, model, rank, options.device)
        except Skip as reason:
            row["note"] = f"skipped: {reason}"
            tqdm.write(f"{contender.name} is left out: {reason}")
        records.append(**row)


def figures(contender: Contender, model: nn.Module, rank: int, device: str) -> Row:
    """Return state and temporary bytes of one contender.

    Raises:
        Skip: if it cannot run.
    """
    optimizer = contender.ordinary(model, rank)
    start = time.perf_counter()
    first = temporary_bytes(lambda: who.warm_up(optimizer, model, contender.name, steps=1), device, leaves_state=True)
    slow = time.perf_counter() - start > SLOW
    who.warm_up(optimizer, model, contender.name, steps=who.WARM_UP - 1)
    row: Row = {"state_bytes": state_bytes(optimizer), "note": ""}
    row["step_temporary_bytes"] = temporary_bytes(optimizer.step, device)
    who.check_sane(model, {contender.name: optimizer})
    if not contender.cycle:
        return row
    if slow and not device.startswith("cuda"):
        return row | {"refresh_temporary_bytes": first, "note": "first step"}
    optimizer.state.clear()
    cycling = contender.cycling(model, rank)
    who.warm_up(cycling, model, contender.name)

    def cycle() -> None:
        for _ in range(contender.cycle):
            cycling.step()

    return row | {"refresh_temporary_bytes": temporary_bytes(cycle, device)}


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of all storages that the state leads to."""
    sizes = {}
    for tensor in _tensors(list(optimizer.state.values()), set()):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr(), tensor.device] = storage.nbytes()
    return sum(sizes.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:  # Any: whatever an optimizer keeps as its state
    """Yield the plain tensors inside a value, each object once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        parts: Iterable[Any] = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    elif isinstance(value, Tensor):
        yield value
        return
    elif isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    else:
        parts = vars(value).values() if hasattr(value, "__dict__") else ()
    for part in parts:
        yield from _tensors(part, seen)


def temporary_bytes(step: Callable[[], object], device: str, *, leaves_state: bool = False) -> int:
    """Return the most bytes that are allocated at one moment of the call beyond those before it.

    Args:
        step: what is called; on a CPU twice, because the profiler must have seen the allocation of what is freed.
        device: whose memory.
        leaves_state: it is called once, and what it leaves behind is no temporary; on CUDA then a lower bound.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        after = torch.cuda.memory_allocated(device)
        return torch.cuda.max_memory_allocated(device) - (max(before, after) if leaves_state else before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        if not leaves_state:
            step()
        with record_function(MARK):
            step()
    calls = allocations(record)
    if leaves_state:
        stays: dict[int, int] = {}  # address -> position of the call that took it
        for i, (address, size) in enumerate(calls):
            if size > 0:
                stays[address] = i
            else:
                stays.pop(address, None)
        left = set(stays.values())
        calls = [call for i, call in enumerate(calls) if i not in left]
    live = peak = 0
    for _, size in calls:
        live += size
        peak = max(peak, live)
    return peak


def allocations(record: profile) -> list[tuple[int, int]]:
    """Return address and bytes of each call to the CPU allocator since the mark; negative bytes are given back."""
    assert record.profiler is not None and record.profiler.kineto_results is not None
    found, start = [], 0
    fields: Any  # of the kind that the event's tag says
    queue = list(record.profiler.kineto_results.experimental_event_tree())
    while queue:
        event = queue.pop()
        queue.extend(event.children)
        if event.name == MARK:
            start = event.start_time_ns
        fields = event.extra_fields
        if event.tag == _EventType.Allocation and fields.device.type == "cpu":
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    found.sort(key=lambda item: item[0])
    return [(address, size) for moment, address, size in found if moment >= start]


def summarise(records: Records, options: Options) -> None:
    """Write one row for each contender."""
    lines = []
    for rows in records.sessions().values():
        for same in grouped(rows, "workload").values():
            adamw = next((row for row in same if row["contender"] == "torch AdamW fused"), None)
            for row in same:
                line = dict(row)
                note = str(row["note"])
                line["status"] = note if note.startswith("skipped") else "ok"
                if line["status"] == "ok":
                    bytes_per_element = torch.empty(0, dtype=getattr(torch, row["dtype"])).element_size()
                    elements = int(row["weight_bytes"]) / bytes_per_element
                    line["state_bytes_per_weight_element"] = round(int(row["state_bytes"]) / elements, 4)
                    if adamw and adamw.get("state_bytes"):
                        line["state_over_adamw"] = round(int(row["state_bytes"]) / int(adamw["state_bytes"]), 4)
                lines.append(line)
    write_rows(options.out / f"{NAME}.csv", lines, (*SUMMARY, *records.columns[len(RAW) - 1 :]))
