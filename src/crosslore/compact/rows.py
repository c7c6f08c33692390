"""Embeddings and heads at full rank whose gradient is never whole: stepped inside backward, a few rows at a time.

The gradient of an output layer is the product D^T X, that of an embedding a sum over tokens; a tied weight has both. Of
LLaMA2-7B each is 0.26 GB in bf16, the largest tensor that stepping inside backward would leave. An elementwise rule
needs a few of its rows at once, so these are formed, used and forgotten. With gradient accumulation their sum over
micro-batches would have to be kept; then the gradient is whole as everywhere.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakMethod, ref

import torch
from torch import Tensor, nn

from crosslore.accumulation import norm_of
from crosslore.compact.factors import GradientFactors
from crosslore.compact.layerwise import PassEnds
from crosslore.compact.linear import (
    CompactEmbedding,
    hand_over,
    hand_over_embedding,
    is_plain,
    reason_not_compact,
    take_back,
)
from crosslore.groups import largest_entries
from crosslore.items import Item, advance
from crosslore.layerwise import Layerwise
from crosslore.layout import as_dtype
from crosslore.rules.base import state_dtype
from crosslore.step import rounding_draws
from crosslore.stepping import full_precision, full_step, hyper_of_full_rank, rule_of

if TYPE_CHECKING:
    from crosslore.optimizer import LowRankOptimizer

# Entries of a gradient that exist at once. A whole number of quantisation blocks, as rows are counted in 256.
AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 24}
ROWS = 256


@dataclass
class RowGradient:
    """The gradient of a matrix (rows, cols) as what its uses have left: products, and sums of rows."""

    products: list[GradientFactors] = field(default_factory=list)
    # Row numbers, ascending and distinct, with the sum of what the tokens of each have left.
    lookups: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, factors: "GradientFactors | tuple[Tensor, Tensor]") -> None:
        """Take what one use of the weight has left: factors, or token numbers with their output gradients."""
        if isinstance(factors, GradientFactors):
            if len(factors.outputs):  # a use without a token leaves nothing
                self.products.append(factors)
            return
        tokens, grads = factors
        if not tokens.numel():
            return
        distinct, place = tokens.reshape(-1).unique(return_inverse=True)
        # Torch's own sum over equal tokens, in its order.
        sums = torch.ops.aten.embedding_dense_backward(grads.reshape(len(place), -1), place, len(distinct), -1, False)
        self.lookups.append((distinct, sums))

    def rows(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Return rows `start` to `stop` in the dtype of `like`: each use rounded to it and added, as autograd does."""
        total: Tensor | None = None
        for factors in self.products:
            part = as_dtype(factors.outputs[:, start:stop].mT @ factors.inputs, like.dtype)
            total = part if total is None else total.add_(part)
        if total is None:
            total = like.new_zeros(stop - start, like.shape[1])
        for numbers, sums in self.lookups:
            inside = slice(*torch.searchsorted(numbers, numbers.new_tensor([start, stop])).tolist())
            total[numbers[inside] - start] += as_dtype(sums[inside], like.dtype)
        return total

    def bound(self) -> float:
        """Return what no entry exceeds; NaN or infinite if an entry may not be finite."""
        peaks = iter(largest_entries([tensor for one in self.products for tensor in (one.outputs, one.inputs)]))
        products = sum(len(one.outputs) * next(peaks) * next(peaks) for one in self.products)
        return products + sum(largest_entries([sums for _, sums in self.lookups if sums.numel()]))

    def surely_finite(self, weight: Tensor) -> bool:
        """Return whether no entry and no norm can overflow, in any dtype on the way to the weight's."""
        dtypes = {weight.dtype, *(factors.outputs.dtype for factors in self.products)}
        bound, largest = self.bound(), min(torch.finfo(dtype).max for dtype in dtypes)
        squares = bound * bound * weight.numel()
        return bound < largest / 2 and squares < torch.finfo(state_dtype(weight)).max  # half: for what rounding adds


class RowStepper:
    """Steps the weights that hand over their gradient in rows; `attach_compact` makes one."""

    def __init__(self, optimizer: "LowRankOptimizer", books: Layerwise, modules: dict[Tensor, list[nn.Module]]) -> None:
        """Ask the modules for what their backward has, and autograd for the end of each weight's pass."""
        self._optimizer, self.books, self.modules = ref(optimizer), books, modules
        # By backward pass and weight: what a pass has left that ended in an error is no part of the next one.
        self._held: dict[tuple[int, int], RowGradient] = {}
        self._ends = PassEnds(WeakMethod(self.on_pass))
        for weight, owners in modules.items():
            for module in owners:
                if isinstance(module, nn.Linear):
                    hand_over(module, self.take)
                elif isinstance(module, nn.Embedding):
                    hand_over_embedding(module, self.take)
            self._ends.watch(weight)

    def take(self, weight: Tensor, factors: "GradientFactors | tuple[Tensor, Tensor]") -> None:
        """Take what one use of a weight has left."""
        with full_precision():
            self._ends.watch(weight)
            self._held.setdefault(_key(weight), RowGradient()).add(factors)

    @torch.no_grad()
    @full_precision()
    def on_pass(self, weight: Tensor) -> None:
        """Step a weight whose backward pass is over; nothing of it changes if its gradient may not be finite."""
        optimizer, held = self._optimizer(), self._held.pop(_key(weight), None)
        if optimizer is None or (held is None and weight.grad is None):
            return
        item = optimizer.items.of(weight)
        self.books.warn_of_second_step(weight, item.name)
        if held is None or weight.grad is not None or not held.surely_finite(weight):
            self._step_whole(item, held)
        else:
            self._step_rows(item, held)

    def _step_whole(self, item: Item, held: RowGradient | None) -> None:
        """Step with the whole gradient: the weight is used elsewhere too, or an entry has to be looked at."""
        weight = item.weight
        grad, weight.grad = weight.grad, None
        if grad is not None and grad.is_sparse:
            raise RuntimeError("sparse gradients are not supported. Use nn.Embedding(sparse=False).")
        if held is not None:
            whole = held.rows(0, weight.shape[0], weight)
            grad = whole if grad is None else grad + whole
        assert grad is not None
        norm = norm_of(grad)
        if not math.isfinite(norm):
            self._count_skip(item)
            return
        factor = self.books.take_norm(norm)
        full_step(item, grad.mul_(factor) if factor < 1 else grad)

    def _step_rows(self, item: Item, held: RowGradient) -> None:
        weight, factor = item.weight, 1.0
        squares = weight.new_zeros((), dtype=state_dtype(weight))
        if self.books.clips_by_own_norm:  # the norm must be known before the first row changes
            for rows in chunks(weight):
                squares += held.rows(rows.start, rows.stop, weight).to(squares.dtype).square_().sum()
            factor = self.books.take_norm(math.sqrt(float(squares)))
        rule = rule_of(item)
        if item.state.keys() <= {"step"}:
            item.state.update(rule.init(weight))
        t, hp = advance(item.state), hyper_of_full_rank(item)
        draws = rounding_draws(weight, hp, item.name, t)
        for rows in chunks(weight):
            grad = held.rows(rows.start, rows.stop, weight)
            if not self.books.clips_by_own_norm:
                squares += torch.linalg.vector_norm(grad, dtype=squares.dtype).square()
                factor = self.books.clip_factor()
            if factor < 1:
                grad.mul_(factor)
            rule.step_weight_(weight[rows], grad, rule.state_of_rows(item.state, weight, rows), t, hp, draws=draws)
        if not self.books.clips_by_own_norm:
            self.books.enter_norm(math.sqrt(float(squares)))

    def _count_skip(self, item: Item) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.count_skips([item.name])

    def forget(self) -> None:
        """Drop what was handed over."""
        self._held = {}

    def detach(self) -> None:
        """Make the modules ordinary ones again."""
        self._ends.remove()
        for owners in self.modules.values():
            for module in owners:
                take_back(module)
        self.forget()


def _key(weight: Tensor) -> tuple[int, int]:
    return torch._C._current_graph_task_id(), id(weight)


def chunks(weight: Tensor) -> Iterator[slice]:
    """Yield the rows of a weight whose gradient exists at once."""
    limit = AT_ONCE.get(weight.device.type, AT_ONCE["cpu"])
    size = max(ROWS, limit // max(1, weight.shape[1]) // ROWS * ROWS)
    for start in range(0, weight.shape[0], size):
        yield slice(start, min(start + size, weight.shape[0]))


def rows_weights(optimizer: "LowRankOptimizer", model: nn.Module) -> dict[Tensor, list[nn.Module]]:
    """Return the weights at full rank that can be stepped in rows, each with all modules that use it."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    found = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, weight in enumerate(group["params"]):
            modules = owners.get(id(weight), [])
            if weight.requires_grad and weight.dim() == 2 and weight.numel() and modules and _suit(modules, weight):
                item = optimizer.item(g, i)
                if not item.blocks and rule_of(item).elementwise:
                    found[weight] = modules
    return found


def _suit(modules: list[nn.Module], weight: Tensor) -> bool:
    """Return whether all of these modules have it as their weight and can hand over the rows of its gradient."""
    return all(getattr(module, "weight", None) is weight and _suits(module) for module in modules)


def _suits(module: nn.Module) -> bool:
    if not isinstance(module, nn.Embedding) or type(module) not in (nn.Embedding, CompactEmbedding):
        return reason_not_compact(module) is None and isinstance(module, nn.Linear)
    hooks = module.weight._backward_hooks or getattr(module.weight, "_post_accumulate_grad_hooks", None)
    return bool(is_plain(module) and "forward" not in vars(module) and not hooks)
