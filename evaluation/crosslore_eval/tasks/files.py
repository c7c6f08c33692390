"""Rows of JSON lines, JSON arrays and csv files, each with the place it came from; errors name file and line."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from crosslore_eval.errors import EvalError, shown
from crosslore_eval.tasks.base import Fields

ADVICE = "Correct it or take the original file."

# (where it is, for messages; its fields)
Located = tuple[str, Fields]


class DataError(EvalError):
    """The data cannot be used; the message says where, what was expected, and what to do."""


def decode(data: bytes, *, path: Path) -> str:
    """Return the UTF-8 text of a file, its byte order mark dropped, unpacked if it is gzip.

    Raises:
        DataError: if it is not UTF-8, with the line.
    """
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"{data[error.start]:#04x}"
        raise DataError(f"{path}, line {line}: expected UTF-8 text, got the byte {byte}. {ADVICE}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete gzip file: {error}. {ADVICE}") from error


def read_jsonl(text: str, *, path: Path) -> Iterator[Located]:
    """Yield the objects of a text with one JSON object a line; empty lines are passed over."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: expected one JSON object a line, got: {_reason(error)}. {ADVICE}") from error
        if not isinstance(fields, dict):
            raise DataError(f"{place}: expected a JSON object with named fields, got {shown(fields)}. {ADVICE}")
        yield place, fields


def _reason(error: Exception) -> str:
    """Return what is wrong with a JSON text; its line is in the message already."""
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def read_json(text: str, *, path: Path) -> Iterator[Located]:
    """Yield the objects of a text that is one JSON array."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f"{path}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        raise DataError(f"{place}: expected a JSON array of objects, got: {_reason(error)}. {ADVICE}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a JSON array of objects, got {shown(rows)}. {ADVICE}")
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def read_csv(text: str, *, path: Path, columns: Iterable[str]) -> Iterator[Located]:
    """Yield the rows of a csv text whose first row names its columns; a quoted field may hold line breaks."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            place, start = f"{path}, line {start}", reader.line_num + 1
            if header is None:
                header = cells
                if not set(columns) <= set(header):
                    wanted = ", ".join(columns)
                    raise DataError(f"{place}: the first row must name the columns {wanted}, got {cells}. {ADVICE}")
            elif len(cells) not in (0, len(header)):
                wanted = f"{len(header)} fields ({', '.join(header)})"
                raise DataError(f"{place}: expected {wanted}, got {len(cells)}: {shown(cells)}. {ADVICE}")
            elif cells:
                yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: not a csv row: {error}. Close its quotation marks.") from error


def read_rows(data: bytes, *, path: Path, columns: Iterable[str]) -> list[Located]:
    """Return all rows of a file by its ending: .csv, .json, .jsonl, each also with .gz.

    Args:
        data: the file's bytes.
        path: for the ending and for messages.
        columns: that a csv file must have.
    """
    text = decode(data, path=path)
    match (path.with_suffix("") if path.suffix == ".gz" else path).suffix:
        case ".csv":
            return list(read_csv(text, path=path, columns=columns))
        case ".json":
            return list(read_json(text, path=path))
        case _:
            return list(read_jsonl(text, path=path))
