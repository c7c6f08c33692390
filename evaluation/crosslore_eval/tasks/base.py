"""What a task is: where its rows are, how one becomes a prompt, what is right, and how outputs are scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from crosslore_eval.errors import shown, unknown_name
from crosslore_eval.protocols import Protocol

Fields = dict[str, object]
# An example in LLaMA-Factory's alpaca format, plus what grading needs.
Row = dict[str, str | float]


class RowError(ValueError):
    """A row cannot be used; the message says what its fields must be."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One file of a data set, and the name that LLaMA-Factory will know it by."""

    name: str
    # path below the data folder; `.gz` is added where only the compressed file is there
    file: str
    hub_split: str
    # of the original
    rows: int
    # of the original file; None where there is no such file
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Where the same rows are on the Hugging Face hub."""

    path: str
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt and everything that counts as right for it."""

    instruction: str
    input: str
    references: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set and its evaluation; a change of prompt, stop rule or reading is a new version."""

    name: str
    version: int
    summary: str
    # field -> its name on the hub; files carry the keys
    fields: dict[str, str]
    splits: tuple[Split, ...]
    # fields of a file's row -> example; RowError if they are not as they must be
    convert: Callable[[Fields], Row]
    # field of an example that is a reference
    reference: str
    # the first is the default
    protocols: tuple[Protocol, ...]
    # the most tokens of an answer: no reference of the test set has more in LLaMA2's tokens, unless the task says why
    max_new_tokens: int
    # an output ends before the first of these that follows text
    stop: tuple[str, ...] = ()
    # rows with the same input are references of one example
    groups_rows: bool = False
    # name (without the task's) of the split that is evaluated unless another is asked for
    test_split: str = "test"
    # None: no data set on the hub holds exactly these rows
    hub: Hub | None = None
    # its files come with this project, in the folder `data`
    is_bundled: bool = False

    @property
    def splits_by_name(self) -> dict[str, Split]:
        """The splits by the names that `--split` takes: their own without the task's ("test")."""
        return {split.name.removeprefix(f"{self.name}_"): split for split in self.splits}

    def split(self, name: str | None) -> Split:
        """Return a split by its short name ("test"), the test split for None.

        Raises:
            EvalError: if there is none.
        """
        by_name = self.splits_by_name
        wanted = name or self.test_split
        if wanted not in by_name:
            raise unknown_name(f"split of {self.name}", wanted, by_name)
        return by_name[wanted]

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """Return one example for each input, in order of first appearance, with the references of all its rows."""
        grouped: dict[tuple[str, str], list[str]] = {}
        for index, row in enumerate(rows):
            # Only E2E repeats an input on purpose; elsewhere equal questions are separate rows.
            key = (str(row["input"]), "" if self.groups_rows else str(index))
            grouped.setdefault(key, []).append(str(row[self.reference]))
        instruction = str(rows[0]["instruction"]) if rows else ""
        return [
            Example(instruction=instruction, input=text, references=tuple(references))
            for (text, _), references in grouped.items()
        ]


def text_of(fields: Fields, name: str) -> str:
    """Return a field that must be text."""
    if name not in fields:
        raise RowError(f"field `{name}` is missing; fields found: {', '.join(map(str, fields)) or 'none'}")
    value = fields[name]
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"field `{name}` must be text that is not empty, got {shown(value)}")
    return value.strip()


def number_of(fields: Fields, name: str) -> float:
    """Return a field that must be a finite number, or text that holds one."""
    value = fields.get(name)
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else float("nan")
    except (ValueError, OverflowError):
        number = float("nan")
    if not isfinite(number):
        raise RowError(f"field `{name}` must be a number, got {shown(value)}")
    return number
