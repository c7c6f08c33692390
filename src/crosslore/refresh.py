"""When a basis is refitted, and the random draws that belong to a refresh."""

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RefreshEvery:
    """Refit at step 1, and at steps 1 + phase, 1 + phase + every, ...; GaLore's rule is phase 0."""

    # Steps between two fits.
    every: int
    # Steps by which all fits but the first are shifted; taken modulo `every`.
    phase: int = 0

    def due(self, t: int) -> bool:
        """Return whether step t (counted from 1) refits; a plain int, so no device is asked."""
        return t == 1 or (t - 1 - self.phase) % self.every == 0

    def number(self, t: int) -> int:
        """Return how many fits after the first are due up to step t: the number of the basis in use."""
        shift = self.phase % self.every
        return (t - 1 - shift) // self.every + (shift > 0)

    def age(self, t: int) -> int:
        """Return how many steps the basis of step t has been in use, that step included."""
        shift = self.phase % self.every
        return t if t - 1 < shift else (t - 1 - shift) % self.every + 1

    def soon(self, t: int, window: int) -> bool:
        """Return whether a refresh is due within the `window` steps after t."""
        return (self.phase - t) % self.every < window


def draw_generator(seed: int, name: str, number: int, device: torch.device | None = None) -> torch.Generator:
    """Return a generator that depends on the seed, the weight's name and the number only; on the CPU by default.

    So every rank of a distributed run and a resumed run draw the same heads and sketches, whatever else used
    the global generator. Other devices draw other numbers from the same seed.
    """
    digest = hashlib.blake2b(f"{seed}|{name}|{number}".encode(), digest_size=8).digest()
    return torch.Generator(device or "cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
