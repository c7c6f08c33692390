"""When a basis is refitted, and the random draws that belong to a refresh."""

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RefreshEvery:
    """Refit at steps 1, 1 + every, 1 + 2 * every, ... as GaLore does."""

    # Steps between two fits.
    every: int

    def due(self, t: int) -> bool:
        """Return whether step t (counted from 1) refits; a plain int, so no device is asked."""
        return (t - 1) % self.every == 0

    def number(self, t: int) -> int:
        """Return how many refreshes are due before step t."""
        return (t - 1) // self.every


def draw_generator(seed: int, name: str, number: int) -> torch.Generator:
    """Return a CPU generator that depends on the seed, the weight's name and the refresh number only.

    So every rank of a distributed run and a resumed run draw the same heads and sketches, whatever else used
    the global generator.
    """
    digest = hashlib.blake2b(f"{seed}|{name}|{number}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
