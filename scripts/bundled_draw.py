"""Random choices for the bundled data: the same on every machine and Python version."""

import random
import re
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """A stream of random choices that depends on its seed only.

    It uses `random.Random.random` alone: the one method whose sequence Python promises to keep between versions.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self._random.random() < probability

    def pick(self, choices: Sequence[T]) -> T:
        """Return one of the choices, all equally likely."""
        return choices[int(self._random.random() * len(choices))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return the items in a random order."""
        order = sorted(range(len(items)), key=[self._random.random() for _ in items].__getitem__)
        return [items[i] for i in order]

    def text(self, pattern: str) -> str:
        """Return `pattern` with one alternative of `a|b`, and of every `[a|b]` in it, taken."""
        closed = re.sub(r"\[[^\]]*\]", lambda match: match.group().replace("|", "\0"), pattern)
        chosen = self.pick(closed.split("|"))
        return re.sub(r"\[([^\]]*)\]", lambda match: self.pick(match.group(1).split("\0")), chosen)
