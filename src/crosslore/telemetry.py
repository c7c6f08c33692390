"""What training does to the subspaces: how much of each gradient they miss, what refreshes cost, what is skipped."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import ref

import torch
from torch import Tensor

from crosslore.checks import check_bool, check_int
from crosslore.compact.factors import GradientFactors
from crosslore.rules.base import state_dtype

if TYPE_CHECKING:
    from crosslore.optimizer import LowRankOptimizer
    from crosslore.stepping import Pending

PREFIX = "crosslore/"
# Steps between two looks at all weights.
EVERY = 50


class Telemetry:
    """Looks at the low-rank weights of an optimizer: all of them every so many steps, each of them at its refreshes.

    The subspace error of a weight is |G - P P^T G| / |G| (on the right |G - G P P^T| / |G|), computed from
    |G|^2 - |P^T G|^2, since P is orthonormal: 0 says that the basis holds the whole gradient, 1 that it holds nothing
    of it. With compact gradients |G|^2 comes from the factors of G, so that G is formed for no one; where micro-batches
    accumulate compact parts it is the error of the first one's gradient. Weights whose basis is not orthonormal
    (`gaussian`) and steps of `compile=True` are not looked at.

    A look costs a pass over the gradient, with compact gradients about half a product of the layer's backward, and a
    transfer from the device; a refresh waits for the device, to be timed. Between them a step costs nothing more.

    Args:
        optimizer: a `LowRankOptimizer`; it is looked at until `detach()`.
        every: steps between two looks at all weights, >= 1; steps are counted from `step`, 0 at first.
        per_layer: keep the error of each weight too.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range.
    """

    def __init__(self, optimizer: "LowRankOptimizer", *, every: int = EVERY, per_layer: bool = False) -> None:
        """Become an observer of the optimizer."""
        if not hasattr(optimizer, "observers"):
            raise TypeError(
                f"Telemetry takes a LowRankOptimizer, got {type(optimizer).__name__}. Use create_optimizer."
            )
        check_int("every", every, low=1, hint="It is in steps.")
        check_bool("per_layer", per_layer, hint="It is a switch.")
        self.every, self.per_layer = every, per_layer
        # Steps so far; a resumed run sets it.
        self.step = 0
        self._optimizer = ref(optimizer)
        # |G|^2 and |P^T G|^2 in the step in progress, by weight: of all weights, and of those just refitted.
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._refitted: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._residuals: list[Tensor] = []
        self._logs: dict[str, float] = {}
        self._unlogged = _Refreshes()
        self._total = _Refreshes()
        self._means: list[float] = []
        self._largest = 0.0
        optimizer.observers.append(self)
        self._handle = optimizer.register_step_post_hook(lambda *_: self._close_step())

    def detach(self) -> None:
        """Look no longer."""
        optimizer = self._optimizer()
        if optimizer is not None and self in optimizer.observers:
            optimizer.observers.remove(self)
        self._handle.remove()

    def take_logs(self) -> dict[str, float]:
        """Return what is new since the last call, ready for a logger; empty if nothing is.

        Keys, after `crosslore/`: `subspace_error` and `subspace_error_max`, mean and maximum over the weights at the
        last look; with `per_layer` also `subspace_error/<weight>`; `residual_norm`, the norm of what the residuals
        of all weights added in that step; `refreshes`, `refresh_seconds` and `refresh_error`: number, time, and mean
        error right after the fit of the refreshes since the last call; `skipped`, the weights skipped so far.
        """
        logs, self._logs = self._logs | self._unlogged.logs(), {}
        self._unlogged = _Refreshes()
        if logs:
            logs["skipped"] = self._skipped()
        return {f"{PREFIX}{name}": value for name, value in logs.items()}

    def summary(self) -> dict[str, float | int | None]:
        """Return the same over the whole run: means over the looks, the largest error, sums over the refreshes."""
        looks = len(self._means)
        return {
            "looks": looks,
            "subspace_error": sum(self._means) / looks if looks else None,
            "subspace_error_max": self._largest if looks else None,
            "refreshes": self._total.count,
            "refresh_seconds": self._total.seconds,
            "refresh_error": self._total.error(),
            "skipped": self._skipped(),
        }

    @contextmanager
    def refreshing(self, weight: Tensor) -> Iterator[None]:
        """Time the fit of a basis."""
        start = _now(weight.device)
        yield
        seconds = _now(weight.device) - start
        for sums in (self._unlogged, self._total):
            sums.count, sums.seconds = sums.count + 1, sums.seconds + seconds

    @torch.no_grad()
    def on_gradient(self, pending: "Pending", *, factors: GradientFactors | None) -> None:
        """Note |G|^2 and |P^T G|^2 if it is time for a look or the basis is new."""
        ctx, method = pending.ctx, pending.method
        new = method.refresh.due(ctx.t)
        if not (new or self._looks()) or not method.projector.orthonormal:
            return
        if factors is not None:
            whole = factors.norm_squared()
        else:
            assert ctx.grad is not None
            whole = norm_squared(ctx.grad)
        name = pending.item.name.removesuffix(".weight")
        for wanted, notes in ((self._looks(), self._seen), (new, self._refitted)):
            if wanted:
                notes[name].append((whole, norm_squared(ctx.low)))

    @torch.no_grad()
    def on_residual(self, name: str, update: Tensor) -> None:
        """Note the norm of a residual update if it is time for a look."""
        if self._looks():
            self._residuals.append(norm_squared(update))

    def _looks(self) -> bool:
        return (self.step + 1) % self.every == 0

    def _skipped(self) -> int:
        optimizer = self._optimizer()
        return sum(optimizer.nonfinite_skips.values()) if optimizer is not None else 0

    def _close_step(self) -> None:
        """Turn what was noted in a step into numbers."""
        if self._refitted:
            errors = list(errors_of(self._refitted).values())
            for sums in (self._unlogged, self._total):
                sums.errors, sums.error_count = sums.errors + sum(errors), sums.error_count + len(errors)
            self._refitted.clear()
        if self._looks():
            self._look()
        self.step += 1

    def _look(self) -> None:
        errors = errors_of(self._seen)
        if errors:
            mean, largest = sum(errors.values()) / len(errors), max(errors.values())
            self._means.append(mean)
            self._largest = max(self._largest, largest)
            self._logs |= {"subspace_error": mean, "subspace_error_max": largest}
            if self.per_layer:
                self._logs |= {f"subspace_error/{name}": error for name, error in errors.items()}
        if self._residuals:
            self._logs["residual_norm"] = math.sqrt(sum(to_numbers(self._residuals)))
        self._seen.clear()
        self._residuals = []


class _Refreshes:
    """Sums over refreshes."""

    def __init__(self) -> None:
        self.count, self.seconds, self.errors, self.error_count = 0, 0.0, 0.0, 0

    def error(self) -> float | None:
        return self.errors / self.error_count if self.error_count else None

    def logs(self) -> dict[str, float]:
        if not self.count:
            return {}
        error = self.error()
        own = {"refreshes": self.count, "refresh_seconds": self.seconds}
        return own if error is None else own | {"refresh_error": error}


def norm_squared(tensor: Tensor) -> Tensor:
    """Return the sum of squares, (), fp32 or fp64."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=state_dtype(tensor))
    return norm.square()


def errors_of(notes: dict[str, list[tuple[Tensor, Tensor]]]) -> dict[str, float]:
    """Return sqrt(1 - |P^T G|^2 / |G|^2) of each weight, its blocks together; none for zero or non-finite gradients."""
    numbers = iter(to_numbers([value for pairs in notes.values() for pair in pairs for value in pair]))
    errors = {}
    for name, pairs in notes.items():
        values = [(next(numbers), next(numbers)) for _ in pairs]
        whole, low = sum(value[0] for value in values), sum(value[1] for value in values)
        if whole > 0 and math.isfinite(whole) and math.isfinite(low):
            errors[name] = math.sqrt(max(0.0, 1.0 - low / whole))
    return errors


def to_numbers(values: list[Tensor]) -> list[float]:
    """Return scalars as numbers, with one transfer from the device."""
    if not values:
        return []
    numbers: list[float] = torch.stack([value.to(values[0].device, torch.float64) for value in values]).tolist()
    return numbers


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def __getattr__(name: str) -> object:
    """Load `TelemetryCallback` when it is asked for: it needs transformers."""
    if name != "TelemetryCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from crosslore.integrations.telemetry import TelemetryCallback
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError("TelemetryCallback needs transformers. Run `pip install transformers`.") from error
    return TelemetryCallback
