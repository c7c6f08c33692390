"""Checked access to the paper's data file: every error names the place, the value and what is allowed."""

from collections.abc import Iterable
from typing import Any, TypeVar

from crosslore_eval.errors import shown, unknown_name

T = TypeVar("T")
_MISSING: Any = object()  # Any: stands for "no default" of every type


class PaperDataError(ValueError):
    """The data file of the paper cannot be used; the message says where, what, what is allowed, what to do."""


class Section:
    """A table of the file with its place in it; `done` refuses keys that nobody took."""

    def __init__(self, values: object, *, place: str) -> None:
        if not isinstance(values, dict):
            raise PaperDataError(f"{place} must be a table of keys, got {shown(values)}. Write it as [{place}].")
        self.place = place
        self._values: dict[str, Any] = dict(values)  # Any: what TOML holds
        self._taken: list[str] = []

    def take(self, name: str, kind: type[T], *, default: T = _MISSING) -> T:
        """Return the value of a key.

        Raises:
            PaperDataError: if it is absent and has no default, or is of another kind.
        """
        self._taken.append(name)
        if name not in self._values:
            if default is _MISSING:
                raise PaperDataError(f"{self.place} has no `{name}`, which must be {_named(kind)}. Add it.")
            return default
        return typed(self._values[name], kind, place=f"{self.place}, `{name}`")

    def take_list(self, name: str, kind: type[T]) -> tuple[T, ...]:
        """Return the values of a list, all of one kind."""
        values = self.take(name, list)
        return tuple(typed(v, kind, place=f"{self.place}, `{name}`, entry {n}") for n, v in enumerate(values, 1))

    def section(self, name: str) -> "Section":
        """Return a table inside this one."""
        return Section(self.take(name, dict), place=f"{self.place}, {name}")

    def sections(self, name: str) -> "list[tuple[str, Section]]":
        """Return the tables inside a table, by name."""
        outer = self.section(name)
        return [(key, outer.section(key)) for key in outer.keys()]

    def keys(self) -> list[str]:
        """Return the names there are."""
        return list(self._values)

    def done(self) -> None:
        """Refuse keys that were never taken: they are misspelt."""
        for name in self._values:
            if name not in self._taken:
                raise PaperDataError(f"{self.place}: {unknown_name('key', name, self._taken)} Remove or correct it.")


def typed(value: object, kind: type[T], *, place: str) -> T:
    """Return a value that is known to be of a kind; true and false are no integers."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise PaperDataError(f"{place} must be {_named(kind)}, got {shown(value)}. Correct the file.")
    return value


def known(name: str, names: Iterable[str], *, kind: str, place: str) -> str:
    """Return a name that is among `names`; the error names the near and the known ones."""
    names = list(names)
    if name not in names:
        raise PaperDataError(f"{place}: {unknown_name(kind, name, names)} Correct it, or add it to the file's names.")
    return name


def _named(kind: type) -> str:
    words = {"str": "a text", "int": "a whole number", "list": "a list", "dict": "a table of keys"}
    return words.get(kind.__name__, "a number with a decimal point")
