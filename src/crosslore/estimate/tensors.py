"""The parts of a training run's memory besides activations."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """Bytes of what a training run holds besides activations."""

    # The model, and adapters.
    weights: int
    # Most gradients that live at the same time, in the form in which they are held.
    gradients: int
    # Step counters, bases, moments; the residual's share apart.
    state: int
    residual: int
    # Compact updates that wait beside deferred weights.
    deferred: int
    # Largest temporary of fitting a basis, one weight at a time.
    refresh: int
    # What the loss meets of earlier micro-batches' gradients.
    carried: int
    # Whole gradients at the beginning of backward, where all activations are, on top of `carried`.
    passing: int
    # Gradients near the end of backward, in its last layer: all but the input embedding's.
    late: int
    # Gradients at the end of backward, where no activations are; a tied embedding's three times.
    ending: int
    # Rows of the output layer's gradient that exist at once; 0 if it is whole.
    head_rows: int
    # The gradient of the logits stays until the end of backward: a tied embedding needs it for its rows.
    logits_stay: bool
    # Temporaries of `step()` besides a refresh: compact gradients and updates of a group of weights.
    step: int
    # What waits in place of R in the first step until all micro-batches are there: every basis is fitted then.
    first_step: int

    @property
    def fixed(self) -> int:
        """What is there all the time."""
        return self.weights + self.state + self.residual + self.deferred
