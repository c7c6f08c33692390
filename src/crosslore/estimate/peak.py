"""From parts to a peak, and from a card to the largest batch and rank that it holds.

Not all parts meet. A step has three moments, and the largest one is the peak on top of weights, state and CUDA:

- *loss*: all activations, the gradient of the logits, and what earlier micro-batches left of their gradients; or, just
  before, the last layer's forward pass with DoRA's norms;
- *backward*: the same without the logits; the gradient of the layer at hand, and of the output layer, fitting included
  where weights step inside backward or are compact; with checkpointing one layer's recomputed activations. Or its end,
  where no activations are but all gradients;
- *step*: all gradients that are held, and what `step()` takes: a refresh, compact gradients and updates.

With several micro-batches `compact` has a fourth one, *first step*: all bases are fitted to the sum of all
micro-batches, whose factors wait - on a GPU in the host's memory. Layerwise ones are fitted to the first micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from crosslore.estimate.activations import Activations, DecoderShape, activations
from crosslore.estimate.counting import count, smallest_side
from crosslore.estimate.methods import Method, Setting
from crosslore.estimate.sources import EstimateError, meta_model
from crosslore.estimate.tensors import Tensors

GB = 10**9
GIB = 2**30
# A batch beyond it is not looked for.
LARGEST_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of one method in one setting."""

    method: Method
    setting: Setting
    tensors: Tensors
    activations: Activations
    # The same batch with the other choice of checkpointing.
    activations_otherwise: Activations

    @property
    def cuda(self) -> int:
        """What CUDA and its libraries take, as assumed."""
        return round(self.setting.cuda_gb * GB)

    @property
    def moments(self) -> dict[str, int]:
        """Bytes of each moment of a step, on top of weights, state and CUDA."""
        held, acts = self.tensors, self.activations
        inside = self.method.is_compact or self.method.is_layerwise  # bases are fitted in backward
        dora = held.passing if self.method.trained == "dora" else 0
        fitting = held.refresh if inside else 0
        # Rows of the output layer's gradient: its factor and what they are formed from, or the factor's magnitudes.
        rows = acts.logits + max(acts.logits, held.head_rows) if held.head_rows else 0
        at_head = 0 if held.logits_stay else acts.layers + acts.norm + rows
        stays = acts.logits if held.logits_stay else 0
        start = held.carried + acts.layers + acts.inside + held.passing + fitting + stays
        late = held.late + acts.inside + fitting
        found = {
            "loss": held.carried + max(acts.saved + acts.loss, acts.layers + dora),
            "backward": max(at_head, start, late, held.ending + (rows if held.logits_stay else 0)),
            "step": held.gradients + held.step + (0 if inside else held.refresh),
        }
        if held.first_step:
            found["first step"] = max(found["loss"], found["backward"]) + held.first_step
        return found

    @property
    def peak(self) -> int:
        """Most bytes that are allocated at the same time."""
        return self.tensors.fixed + self.cuda + max(self.moments.values())

    @property
    def peak_at(self) -> str:
        """When that is."""
        moments = self.moments
        return max(moments, key=lambda name: moments[name])


class Estimator:
    """Estimates for one model; each optimizer is built once."""

    def __init__(self, config: Any) -> None:  # Any: transformers' own
        """Read the sizes of the model.

        Raises:
            EstimateError: if the configuration has no decoder's sizes.
        """
        self.config = config
        try:
            self.shape = DecoderShape.of(config)
        except (AttributeError, TypeError) as error:
            kind = getattr(config, "model_type", "?")
            raise EstimateError(
                f"the configuration of type {kind!r} lacks a size that activations are counted from ({error}). "
                "Use a decoder's, with hidden_size, num_attention_heads, num_hidden_layers and vocab_size."
            ) from error
        self._models: dict[str, nn.Module] = {}
        self._counted: dict[tuple[object, ...], Tensors] = {}

    def model(self, dtype: str) -> nn.Module:
        """Return the model without memory."""
        if dtype not in self._models:
            self._models[dtype] = meta_model(self.config, dtype)
        return self._models[dtype]

    def estimate(self, method: Method, setting: Setting) -> Estimate:
        """Return the bytes of one method.

        Raises:
            ValueError: the method does not go with this model or setting.
        """
        acts = [
            activations(
                self.shape,
                batch=setting.batch,
                seq=setting.seq,
                itemsize=setting.itemsize,
                checkpointing=checkpointing,
                trained=method.trained,
                rank=setting.rank,
                autocast=setting.autocast,
            )
            for checkpointing in (setting.checkpointing, not setting.checkpointing)
        ]
        return Estimate(
            method=method,
            setting=setting,
            tensors=self._count(method, setting),
            activations=acts[0],
            activations_otherwise=acts[1],
        )

    def _count(self, method: Method, setting: Setting) -> Tensors:
        """Count; what does not depend on batch, length and checkpointing once."""
        waits = setting.accumulation > 1 and method.is_compact and not method.is_layerwise
        same = setting if waits else replace(setting, batch=1, seq=2, checkpointing=True, cuda_gb=0.0)
        if (method, same) not in self._counted:
            self._counted[method, same] = count(self.model(setting.dtype), method, same)
        return self._counted[method, same]

    def largest_batch(self, method: Method, setting: Setting, gpu_bytes: int) -> int:
        """Return the most sequences of a micro-batch that fit, 0 if not even one does, `LARGEST_BATCH` at most."""

        def size(batch: int) -> int:
            return self.estimate(method, replace(setting, batch=batch)).peak

        return largest(size, gpu_bytes, LARGEST_BATCH)

    def largest_rank(self, method: Method, setting: Setting, gpu_bytes: int) -> int | None:
        """Return the largest rank that fits, 0 if not even 1 does, None if the method has none."""
        if not method.has_rank:
            return None

        def size(rank: int) -> int:
            return self.estimate(method, replace(setting, rank=rank)).peak

        return largest(size, gpu_bytes, smallest_side(self.model(setting.dtype)))


def largest(size: Callable[[int], int], available: int, limit: int) -> int:
    """Return the largest number from 1 to `limit` whose size is available, 0 if there is none.

    Args:
        size: grows with its argument, nearly in proportion; where it is exactly so, four calls suffice.
        available: largest size.
        limit: largest number.
    """
    low, high = 1, limit
    at_low, at_high = size(low), size(high)
    if at_low > available:
        return 0
    if at_high <= available:
        return limit
    turn, fitted = 0, True
    while high - low > 1:
        guess = low + (high - low) * (available - at_low) // max(1, at_high - at_low)
        if turn % 3 == 1:  # the neighbour of a good guess settles it
            guess = low + 1 if fitted else high - 1
        elif turn % 3 == 2:
            guess = (low + high) // 2
        guess, turn = min(max(guess, low + 1), high - 1), turn + 1
        found = size(guess)
        fitted = found <= available
        if fitted:
            low, at_low = guess, found
        else:
            high, at_high = guess, found
    return low
