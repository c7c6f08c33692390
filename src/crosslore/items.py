"""A weight as the step sees it: its options, its state, its blocks; looked up anew for every step of every weight."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from crosslore.config import Hyper, LowRankConfig
from crosslore.groups import hyper_of, refuse_structural_change
from crosslore.layout import Block
from crosslore.observing import Observer
from crosslore.step import Method, method_of

if TYPE_CHECKING:
    from crosslore.optimizer import LowRankOptimizer

State = dict[str, Tensor]

# All options of a group on which a step depends, the learning rate apart: it may be a tensor.
OPTIONS = tuple(dict.fromkeys(f.name for kind in (LowRankConfig, Hyper) for f in fields(kind) if f.name != "lr"))
_options_of = itemgetter(*OPTIONS)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One weight, what its group says about it, and its state."""

    weight: Tensor
    state: State
    blocks: list[Block]
    # Of each block.
    methods: tuple[Method, ...]
    config: LowRankConfig
    hp: Hyper
    name: str
    # Index of its group: items of one group share their options.
    group: int
    # Who looks on; see crosslore.observing.
    observers: Sequence[Observer] = ()

    def due_next(self) -> bool:
        """Return whether the next step fits a basis to the gradient."""
        t = steps_done(self.state) + 1
        return any(method.projector.fitted and method.refresh.due(t) for method in self.methods)


class Items:
    """The weights of one optimizer as items; what is derived from a group is derived again once the group changes.

    Groups are torch's own dictionaries, which a user or a scheduler may change at any time. Asking whether one has
    changed costs a microsecond, deriving all anew for each weight would cost a model of many small weights more than
    the arithmetic of its step.
    """

    def __init__(self, optimizer: "LowRankOptimizer") -> None:
        """Start with nothing derived."""
        self._ref = ref(optimizer)
        self._groups: dict[int, _Group] = {}
        self._places: dict[int, tuple[int, int]] = {}

    @property
    def _optimizer(self) -> "LowRankOptimizer":
        found = self._ref()
        assert found is not None  # who asks has it
        return found

    def get(self, g: int, i: int) -> Item:
        """Return weight i of group g with its options and state, ready to be stepped."""
        group = self._group(g)
        weight = self._optimizer.param_groups[g]["params"][i]
        state, found = self._optimizer.state[weight], group.items.get(i)
        if found is None or found.weight is not weight or found.state is not state:
            blocks = group.blocks_of(i)
            found = group.items[i] = Item(
                weight=weight,
                state=state,
                blocks=blocks,
                methods=tuple(method_of(group.config, block) for block in blocks),
                config=group.config,
                hp=group.hp,
                name=self.name(g, i),
                group=g,
                observers=self._optimizer.observers,
            )
        return found

    def of(self, weight: Tensor) -> Item:
        """Return the item of a weight.

        Raises:
            KeyError: if the weight is in no group of the optimizer.
        """
        return self.get(*self.place(weight))

    def name_of(self, weight: Tensor) -> str:
        """Return the name of a weight; its state is not touched."""
        return self.name(*self.place(weight))

    def drop_empty_states(self) -> None:
        """Remove the states that items were built with before the first step.

        torch's distributed checkpoints take an optimizer that has any for one whose state is whole.
        """
        state = self._optimizer.state
        for weight in [weight for weight, held in state.items() if not held]:
            del state[weight]

    def place(self, weight: Tensor) -> tuple[int, int]:
        """Return the group of a weight and its index there."""
        found, groups = self._places.get(id(weight)), self._optimizer.param_groups
        there = groups[found[0]]["params"] if found is not None and found[0] < len(groups) else []
        if found is None or found[1] >= len(there) or there[found[1]] is not weight:
            self._places = {id(p): (g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"])}
            found = self._places.get(id(weight))
        if found is None:
            raise KeyError(f"a weight of shape {tuple(weight.shape)} is in no group of this optimizer. Add it first.")
        return found

    def names(self, g: int) -> Sequence[str]:
        """Return the names of a group's weights."""
        return [self.name(g, i) for i in range(len(self._optimizer.param_groups[g]["params"]))]

    def name(self, g: int, i: int) -> str:
        """Return the name of weight i of group g."""
        given: Sequence[str] | None = self._optimizer.param_groups[g].get("param_names")
        return given[i] if given else f"group{g}.{i}"

    def _group(self, g: int) -> "_Group":
        """Return what group g stands for.

        Raises:
            ValueError: if an option that the state depends on was changed while the optimizer runs.
        """
        groups = self._optimizer.param_groups
        while len(self._groups) > len(groups):  # a user has removed groups, and may want their weights freed
            self._groups.popitem()
        group, known = groups[g], self._groups.get(g)
        options, lr, blocks = _options_of(group), float(group["lr"]), group["blocks"]
        if known is not None and known.lr == lr and known.blocks is blocks and known.options == options:
            return known
        same_plan = known is not None and known.blocks is blocks  # else a user has removed groups
        config = known.config if same_plan and known.options == options else LowRankConfig.from_group(group)  # type: ignore[union-attr]
        if same_plan and any(blocks):
            refuse_structural_change(known.config, config)  # type: ignore[union-attr]
        plan = known.plan if same_plan else {}  # type: ignore[union-attr]
        self._groups[g] = made = _Group(options, lr, blocks, plan, config, hyper_of(group), {})
        return made


@dataclass(frozen=True)
class _Group:
    """What the plain values of a group stand for."""

    options: tuple[object, ...]
    lr: float
    # As the group holds them; and, of each weight, what they were built from with what was built.
    blocks: list[list[dict[str, Any]]]  # Any: see Block.to_plain
    plan: dict[int, tuple[list[dict[str, Any]], list[Block]]]
    config: LowRankConfig
    hp: Hyper
    items: dict[int, Item]

    def blocks_of(self, i: int) -> list[Block]:
        """Return the blocks of weight i."""
        plain, found = self.blocks[i], self.plan.get(i)
        if found is None or found[0] is not plain:
            found = self.plan[i] = plain, [Block.from_plain(block) for block in plain]
        return found[1]


def steps_done(state: State) -> int:
    """Return the steps of a weight so far; the counter lives on the CPU, so reading it asks no device."""
    if "step" not in state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
    return int(state["step"].item())


def advance(state: State) -> int:
    """Count one step and return its number."""
    t = steps_done(state) + 1
    state["step"] += 1
    return t


def block_state(state: State, key: str) -> State:
    """Return a block's own tensors, without the prefix of their keys."""
    if not key:
        return {k: v for k, v in state.items() if k != "step"}
    return {k.removeprefix(key): v for k, v in state.items() if k.startswith(key)}


def write_back(state: State, key: str, part: State) -> None:
    """Put a block's tensors into the weight's state."""
    state.update({f"{key}{k}": v for k, v in part.items()} if key else part)


def draw_name(name: str, key: str) -> str:
    """Return the name that seeds a block's draws: a part of a fused weight is named as a separate one would be."""
    return f"{name.rsplit('.', 2)[0]}.{key}weight" if key else name
