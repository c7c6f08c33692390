"""The optimizer: groups of plain values, state of tensors, one step function per weight."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from crosslore.checkpoint import check_same_structure, restore_dtypes
from crosslore.compact.gradients import CompactGradients
from crosslore.compact.scaler import finish_unscaled, refuse_loss_scale, scale_dropped_on_error
from crosslore.config import LowRankConfig, check_hyper
from crosslore.groups import default_blocks, plain, refuse_misspelt
from crosslore.items import Item, Items
from crosslore.layerwise import Layerwise
from crosslore.layout import stagger_
from crosslore.observing import Observer
from crosslore.stepping import complete_state_, full_precision, step_items

logger = logging.getLogger(__name__)


class LowRankOptimizer(Optimizer):
    """Adam's moments in a low-rank gradient subspace, for every method of the GaLore family.

    `crosslore.create_optimizer` builds one from a model. By hand: a parameter group with a `rank` keeps its
    matrices in low rank, on the shorter side as GaLore does; a group without one trains at full rank.

        LowRankOptimizer([{"params": matrices, "rank": 128, "scale": 0.25}, {"params": others}], lr=1e-5)

    Group options are the fields of `LowRankConfig` and `lr`, `betas`, `eps`, `weight_decay`. `state[p]` holds
    tensors only: `step`, `basis`, `exp_avg`, `exp_avg_sq`, `res_index`, `res_avg`, `res_avg_sq`; 8-bit
    moments have `exp_avg_scale` and `exp_avg_sq_scale` too. Those of the parts of a fused weight are prefixed, e.g.
    `q_proj.basis`.

    A weight with a non-finite gradient is skipped for that step, state and all (`nonfinite_skips` counts them).
    One whose gradient is all zero when a basis is to be fitted waits: it decays, and the refresh stays due.

    Args:
        params: parameters, (name, parameter) pairs, or groups, as torch.optim takes them.
        lr: learning rate, >= 0.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled, >= 0.
        config: defaults of the groups' other options.
        foreach: work on all compact gradients of a group at once: fewer launches, more memory. None: on a GPU.
        compile: run ordinary steps (AdamW without residual, between refreshes) as a compiled graph.
            `torch.compile(optimizer.step)` is not needed: `step` itself always runs outside the compiler.

    Raises:
        TypeError, ValueError: an option has the wrong type or range; a matrix does not fit the rank.
    """

    def __init__(
        self,
        params: Any,  # Any: torch's own type for it is private
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        config: LowRankConfig | None = None,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        """Build the groups; no state is allocated before the first step."""
        if isinstance(params, torch.nn.Module):
            got = f"the model {type(params).__name__}"
            raise TypeError(
                f"LowRankOptimizer takes parameters or groups, got {got}. Use create_optimizer(model, ...)."
            )
        check_hyper(lr=plain(lr), betas=betas, eps=eps, weight_decay=weight_decay)
        self.nonfinite_skips: dict[str, int] = {}
        self.layerwise: Layerwise | None = None
        self.compact: CompactGradients | None = None
        self.foreach, self.compile = foreach, compile
        self.observers: list[Observer] = []  # internal: see crosslore.observing
        self.items = Items(self)  # internal
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, **asdict(config or LowRankConfig())})
        if config is not None and not any(any(group["blocks"]) for group in self.param_groups):
            logger.warning("No group has a `rank`, so all weights train at full rank. Give the matrices' group one.")

    def add_param_group(self, param_group: dict[str, Any]) -> None:  # Any: torch's own dict
        """Add a group; it is low-rank if it has a `rank` (or `blocks`, as `create_optimizer` gives)."""
        low_rank = "rank" in param_group
        refuse_misspelt(param_group, self.defaults)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_hyper(**{key: plain(group[key]) for key in ("lr", "betas", "eps", "weight_decay")})
            if any(p.is_complex() for p in group["params"]):
                raise ValueError("complex weights are not supported. Use torch.view_as_real for them.")
            config = LowRankConfig.from_group(group)
            if "blocks" not in group:
                names = self.items.names(len(self.param_groups) - 1)
                shapes = zip(names, group["params"], strict=True)
                group["blocks"] = [default_blocks(n, p, config) if low_rank else [] for n, p in shapes]
            if config.refresh_stagger:
                stagger_(group["blocks"], config.refresh_every, group=len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        if self.layerwise is not None:
            self.layerwise.watch(group["params"])

    def __getstate__(self) -> dict[str, Any]:  # Any: torch's own dict
        """Return what pickling and copying keep; the hooks of layerwise stay with the original."""
        self.merge()  # the weights are copied with the groups, here or in the model, whichever comes first
        own = {"foreach": self.foreach, "compile": self.compile, "nonfinite_skips": dict(self.nonfinite_skips)}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:  # Any: torch's own dict
        """Restore after pickling, copying or loading."""
        super().__setstate__(state)
        modes: dict[str, object] = dict.fromkeys(("layerwise", "compact", "foreach"))
        added = modes | {"compile": False, "nonfinite_skips": {}, "observers": []}
        self.__dict__.update({name: value for name, value in added.items() if name not in self.__dict__})
        self.items = Items(self)
        for group in self.param_groups:  # a checkpoint of an older version lacks newer options
            for key, value in asdict(LowRankConfig()).items():
                group.setdefault(key, value)

    def __repr__(self) -> str:
        """Return one line per group: what it holds and its main options."""
        lines = []
        for i, group in enumerate(self.param_groups):
            low = sum(bool(blocks) for blocks in group["blocks"])
            text = f"  {i}: {low} low-rank and {len(group['params']) - low} full-rank weights, lr {group['lr']:g}"
            if low:
                keys = ("rank", "scale", "projector", "residual", "residual_ratio", "refresh_every")
                text += "".join(f", {key} {group[key]}" for key in keys)
            lines.append(f"{text}, rule {group['rule']}, weight_decay {group['weight_decay']:g}")
        return "LowRankOptimizer(\n" + "\n".join(lines) + "\n)"

    @_disable_dynamo  # it decides on plain values: a refresh, a skip, a wait
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one step of every weight that has a gradient; return the closure's loss.

        In layerwise mode the weights have stepped inside backward already; what is left is done here, and so is what
        linear layers with compact gradients handed over.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: if a gradient is sparse.
        """
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        with scale_dropped_on_error(self):
            refuse_loss_scale(self)
            if self.layerwise is not None:
                self.layerwise.finish_step()
            if self.compact is not None and not finish_unscaled(self.compact):
                return loss
        todo = [(g, i, p) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])]
        self._step([item for item in todo if item[2].grad is not None and item[2].numel() > 0])
        return loss

    @torch.no_grad()
    def step_param(self, weight: Tensor) -> None:
        """Do one step of one weight, from its `.grad`; nothing happens if it has none.

        Raises:
            KeyError: if the weight is not in a group of this optimizer.
        """
        g, i = self.items.place(weight)
        if weight.grad is not None and weight.numel() > 0:
            self._step([(g, i, weight)])

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tell torch's GradScaler to leave the loss scale to `step`: it does not see gradients that are taken."""
        return self.compact is not None or self.layerwise is not None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and what layerwise and compact gradients hold of weights that have not stepped."""
        super().zero_grad(set_to_none)
        for mode in (self.layerwise, self.compact):
            if mode is not None:
                mode.forget()

    @full_precision()
    def _step(self, todo: list[tuple[int, int, Tensor]]) -> None:
        grads = [p.grad for _, _, p in todo if p.grad is not None]
        if any(grad.is_sparse for grad in grads):
            raise RuntimeError("sparse gradients are not supported. Use nn.Embedding(sparse=False).")
        foreach = self.foreach if self.foreach is not None else all(grad.is_cuda for grad in grads)
        items = [self.item(g, i) for g, i, _ in todo]
        skipped = step_items(items, grads, foreach=foreach, compiled=self.compile)
        if skipped:
            self.count_skips(skipped)

    def item(self, g: int, i: int) -> Item:
        """Return weight i of group g with its options and state, ready to be stepped."""
        return self.items.get(g, i)

    def merge(self) -> None:
        """Put what deferred weights have pending into them; called before a state is saved or loaded."""
        if self.compact is not None:
            self.compact.merge()

    def state_dict(self) -> dict[str, Any]:  # Any: torch's own dict
        """Return the state, deferred weights merged, so that a model saved beside it is whole."""
        self.merge()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # Any: torch's own dict
        """Load a state; every tensor keeps the dtype it was saved in (torch would cast it to the weight's).

        Raises:
            ValueError: if the checkpoint is of another optimizer, or of other ranks or shapes than this one.
        """
        self.merge()
        seen: list[dict[str, Any]] = []
        capture = self.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(loaded))  # after others' hooks
        try:
            check_same_structure(self.param_groups, state_dict["param_groups"], names=self.items.names)
            super().load_state_dict(state_dict)
        finally:
            capture.remove()
        restore_dtypes(self, seen[-1])
        for g, group in enumerate(self.param_groups):
            for i in range(len(group["params"])):
                complete_state_(self.item(g, i))
        for mode in (self.layerwise, self.compact):
            if mode is not None:
                mode.forget(state_changed=True)

    def count_skips(self, names: list[str]) -> None:
        """Count the skipped weights; warn at the first time only."""
        first = not self.nonfinite_skips
        for name in names:
            self.nonfinite_skips[name] = self.nonfinite_skips.get(name, 0) + 1
        log = logger.warning if first else logger.debug
        log(
            "The gradient of %d weights is not finite, first %s: their step is skipped, basis and moments keep "
            "their values. Lower the learning rate or look at the data if it happens often; the count per weight "
            "is in `optimizer.nonfinite_skips`, further ones are not logged.",
            len(names),
            names[0],
        )
