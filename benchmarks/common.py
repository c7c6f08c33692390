"""What the benchmark parts share: options, the environment record, rows that survive an interruption, timing.

Every measurement is one row of `OUT/raw/PART.csv`, on the disk as soon as it is finished; `OUT/PART.csv` is made from
those rows alone. A started run goes on with the rows it finds if profile, device, threads, dtype, torch, the measured
packages and the sources of `crosslore` are the same; rows that other versions left behind for the same profile,
device, threads and dtype are replaced.
"""

import csv
import hashlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
PACKAGES = ("crosslore", "galore-torch", "apollo-torch", "badam", "bitsandbytes", "torchao", "transformers", "numpy")

# Of worker processes, before they load torch: one thread each, and memory that stays with the process in large pages.
# Giving half a gigabyte of gradients back in each step costs a third of the time (1.5 instead of 2.3 s, two workers).
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}

Profile = Literal["full", "quick", "tiny"]
Row = dict[str, Any]  # Any: str when read from a CSV file, int, float or str when just measured

# Rows that differ here are different configurations and live side by side.
SESSION = ("profile", "device", "threads", "dtype")
# Rows that differ only here are of another version of the same configuration.
VERSIONS = ("torch", "packages", "source")
# The date comes last: a row without it was cut off while it was written.
ENVIRONMENT = (*SESSION, *VERSIONS, "python", "commit", "date")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line chooses for all parts."""

    out: Path
    # "full": the sizes of the paper. "quick": minutes. "tiny": seconds, for tests.
    profile: Profile = "full"
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = field(default_factory=torch.get_num_threads)
    # Measure finished rows again.
    fresh: bool = False
    # Folder with e2e rows for the gradients of `subspace_error`; None: the environment decides.
    data: Path | None = None
    # Names of contenders to measure; None: all.
    contenders: tuple[str, ...] | None = None

    def pick(self, *, full: Any, quick: Any, tiny: Any) -> Any:  # Any: the three have one type, which comes back
        """Return the value for this profile."""
        return {"full": full, "quick": quick, "tiny": tiny}[self.profile]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and gradients."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@lru_cache
def device_name(device: str) -> str:
    """Return the model of the CPU, with its number of cores, or of the GPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if os.path.exists("/proc/cpuinfo") else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


@lru_cache
def source_hash() -> str:
    """Return the hash of the measured sources; integrations are no part of a step."""
    folder = ROOT / "src" / "crosslore"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        if "integrations" not in path.parts:
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


@lru_cache
def commit() -> str:
    """Return the commit, with "-dirty" when src/ or benchmarks/ differ from it."""
    run = ["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "src", "benchmarks"]
    head, status = (subprocess.run(c, cwd=ROOT, capture_output=True, text=True).stdout.strip() for c in run)
    return head[:12] + ("-dirty" if status else "")


def environment(options: Options) -> Row:
    """Return what the numbers depend on, without the date."""
    packages = []
    for name in PACKAGES:
        try:
            packages.append(f"{name}={version(name)}")
        except PackageNotFoundError:
            packages.append(f"{name}=none")
    return {
        "profile": options.profile,
        "device": device_name(options.device),
        "threads": options.threads,
        "dtype": options.dtype,
        "torch": torch.__version__,
        "packages": " ".join(packages),
        "source": source_hash(),
        "python": platform.python_version(),
        "commit": commit(),
    }


def read_rows(path: Path) -> list[Row]:
    """Return the complete rows of a CSV file; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("date") and None not in row]


def write_rows(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Write a whole CSV file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


class Records:
    """The measurements of one part: those that a file holds, and those that are added to it.

    Args:
        name: of the part; the file is OUT/raw/NAME.csv.
        columns: what the part measures, without the environment.
        options: decide which rows of the file belong to this run.
    """

    def __init__(self, name: str, columns: Sequence[str], options: Options) -> None:
        """Read the file and drop rows of this configuration that are outdated or to be measured again."""
        self.path = options.out / "raw" / f"{name}.csv"
        self.columns = (*columns, *ENVIRONMENT)
        self.environment = environment(options)
        rows = read_rows(self.path)
        kept = [row for row in rows if not self._matches(row, SESSION) or self._matches(row, VERSIONS)]
        if options.fresh:
            kept = [row for row in kept if not self._matches(row, SESSION)]
        if len(kept) < len(rows):
            print(f"{name}: {len(rows) - len(kept)} older measurements of this configuration are replaced", flush=True)
        self._rows = kept
        write_rows(self.path, kept, self.columns)

    def _matches(self, row: Row, columns: Iterable[str]) -> bool:
        return all(str(row.get(column)) == str(self.environment[column]) for column in columns)

    def select(self, **values: object) -> list[Row]:
        """Return this configuration's rows that have these values."""
        mine = (row for row in self._rows if self._matches(row, SESSION))
        return [row for row in mine if all(str(row.get(key)) == str(value) for key, value in values.items())]

    def append(self, **values: object) -> None:
        """Add a finished row; it is on the disk when this returns."""
        row = {**values, **self.environment, "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
        self._rows.append(row)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns, restval="", lineterminator="\n").writerow(row)
            file.flush()
            os.fsync(file.fileno())

    def drop(self, unwanted: Callable[[Row], bool]) -> None:
        """Remove rows of this configuration."""
        kept = [row for row in self._rows if not (self._matches(row, SESSION) and unwanted(row))]
        if len(kept) < len(self._rows):
            self._rows = kept
            write_rows(self.path, kept, self.columns)

    def drop_partial(self, names: Sequence[str], *, by: Sequence[str], **values: object) -> None:
        """Remove the rounds in which some contenders are missing, so that every ratio is of one round.

        Args:
            names: contenders that a complete round has.
            by: columns that make up a round.
            **values: what the rows in question have in other columns.
        """
        mine = [row for row in self.select(**values) if row["contender"] in names]
        rounds = grouped(mine, *by).values()
        partial = [rows for rows in rounds if {row["contender"] for row in rows} != set(names)]
        unwanted = {id(row) for rows in partial for row in rows}
        self.drop(lambda row: id(row) in unwanted)

    def sessions(self) -> dict[tuple[str, ...], list[Row]]:
        """Return all rows of the file, of every configuration, by configuration."""
        found: dict[tuple[str, ...], list[Row]] = {}
        for row in self._rows:
            found.setdefault(tuple(str(row[c]) for c in SESSION), []).append(row)
        return found


def grouped(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Return the rows by their values in these columns, in the order of first appearance."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(str(row[c]) for c in columns), []).append(row)
    return found


def of_environment(rows: Sequence[Row]) -> Row:
    """Return the environment columns of the last row."""
    return {column: rows[-1][column] for column in ENVIRONMENT}


def median(rows: Iterable[Row], column: str) -> float | None:
    """Return the median of a column, None if no row has a number there."""
    values = [float(row[column]) for row in rows if row.get(column) not in (None, "")]
    return statistics.median(values) if values else None


def shown(value: float | None) -> float | str:
    """Return a number with six significant digits for a CSV file, empty for None."""
    return "" if value is None else float(f"{value:.6g}")


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: str) -> float:
    """Return how long a call takes, its work on the device included."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def measuring(
    name: str, columns: Sequence[str], options: Options, summarise: Callable[[Records, Options], None]
) -> Iterator[Records]:
    """Yield the measurements of a part, to be added to with the asked number of threads; at the end summarise them."""
    records = Records(name, columns, options)
    try:
        with threads(options.threads):
            yield records
    finally:
        summarise(records, options)


def as_measured(records: Records, options: Options) -> None:
    """Write OUT/NAME.csv with the measurements as they are."""
    rows = [row for rows in records.sessions().values() for row in rows]
    write_rows(options.out / records.path.name, [{**row, **of_environment([row])} for row in rows], records.columns)
