"""What `crosslore estimate` says beside what training holds: SmolLM2-135M-Instruct, fp32, random tokens, two CPU cores.

    python benchmarks/estimate_check.py              # writes results/estimate_check.json; 10 minutes, resumable
    python benchmarks/estimate_check.py --tiny       # a random model of two small layers, for tests

Each row is a method with real training steps, the estimate beside the measurement, in bytes:

- *state*: every tensor that `optimizer.state` leads to, and the compact updates of deferred weights;
- *gradients*: the most that `.grad`, compact gradients and rows of a gradient hold: after backward, with several
  micro-batches after each, and where weights step inside backward whenever a gradient has arrived or some step;
- *activations*: what autograd has saved after forward, by `saved_tensors_hooks`, weights and their copies left out;
- *peak*: the most that the CPU's allocator has given out at one moment of a step (forward, backward, `step()`) beyond
  model and state; *first step*: the same of the very first one, which fits all bases, state included.

The estimate is that of a CPU, whose groups of weights are smaller, without CUDA. LAPACK's work space is not seen.
"""

import argparse
import gc
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import real_model
import torch
from common import ROOT, Options, environment
from memory import state_bytes, temporary_bytes
from torch import Tensor, nn
from torch.optim import Optimizer

from crosslore import create_optimizer
from crosslore.compact.deferred import deferred_of
from crosslore.compact.gradients import CompactGradients
from crosslore.compact.rows import RowGradient
from crosslore.estimate import Estimate, Estimator, Method, Setting, chosen_method
from crosslore.targets import embedding_weights

OUTPUT = ROOT / "results" / "estimate_check.json"
# Method, micro-batches of a step, gradient checkpointing.
CASES: tuple[tuple[Method, int, bool], ...] = (
    (Method(name="AdamW", rule="adamw"), 1, False),
    (Method(name="AdamW", rule="adamw"), 1, True),
    (Method(name="AdamW8bit", rule="adamw8bit"), 1, False),
    (Method(name="LoRA", trained="lora"), 1, False),
    (Method(name="LoRA", trained="lora"), 1, True),
    (Method(name="DoRA", trained="dora"), 1, False),
    *((chosen_method("crosslore", mode, "direct"), 1, False) for mode in ("full", "layerwise", "compact")),
    (chosen_method("crosslore", "compact-layerwise", "direct"), 1, False),
    (chosen_method("crosslore", "compact-layerwise", "direct"), 1, True),
    (chosen_method("crosslore", "compact", "direct"), 4, False),
    (chosen_method("crosslore", "layerwise", "direct"), 4, False),
    (chosen_method("crosslore", "compact", "deferred"), 1, False),
    (chosen_method("crosslore_plus", "compact", "direct"), 1, False),
    (chosen_method("galore", "layerwise", "direct"), 1, False),
)
PARTS = ("state", "gradients", "activations", "peak", "first step")


def main() -> int:
    """Measure what is missing; write each row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a random model of two small layers, for tests")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    parser.add_argument("--only", metavar="WORD", default="", help="rows whose name has this word")
    parser.add_argument("--out", type=Path, default=OUTPUT)
    args = parser.parse_args()
    options = Options(out=args.out.parent, profile="tiny" if args.tiny else "full", threads=1)
    torch.set_num_threads(1)
    rows = {} if args.fresh or not args.out.exists() else json.loads(args.out.read_text(encoding="utf-8"))
    for method, accumulation, checkpointing in CASES:
        more = f", {accumulation} micro-batches" if accumulation > 1 else ""
        key = f"{method.name}{more}{', checkpointing' if checkpointing else ''}"
        if key in rows or args.only not in key:
            continue
        setting = Setting(
            batch=2 if args.tiny else 1, seq=16 if args.tiny else 128, rank=4 if args.tiny else 16, dtype="fp32",
            rule="adamw", accumulation=accumulation, checkpointing=checkpointing, device="cpu", cuda_gb=0.0,
        )  # fmt: skip
        rows[key] = compared(method, setting, options)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(key, {part: f"{rows[key][part]['difference_percent']:+.1f} %" for part in PARTS}, flush=True)
        gc.collect()
    return 0


def compared(method: Method, setting: Setting, options: Options) -> dict[str, Any]:  # Any: JSON
    """Return one row."""
    model = real_model.load_model(options)
    found = Estimator(model.config).estimate(method, setting)
    told, seen = estimated(found), Training(model, method, setting).measured()
    row: dict[str, Any] = {
        "batch": setting.batch,
        "seq": setting.seq,
        "rank": setting.rank,
        "rule": method.rule or "adamw",
    }
    for part in PARTS:
        off = 100 * (told[part] - seen[part]) / seen[part]
        row[part] = {"estimated": told[part], "measured": seen[part], "difference_percent": round(off, 2)}
    return row | {"environment": environment(options)}


def estimated(found: Estimate) -> dict[str, int]:
    """Return the bytes that are compared."""
    held, moments = found.tensors, found.moments
    state = held.state + held.residual + held.deferred
    ordinary = max(size for name, size in moments.items() if name != "first step")
    return {
        "state": state,
        "gradients": held.gradients,
        "activations": found.activations.saved,
        "peak": ordinary,
        "first step": max(moments.values()) + state,
    }


class Training:
    """A model with an optimizer, and what a step of theirs holds."""

    def __init__(self, model: nn.Module, method: Method, setting: Setting) -> None:
        """Attach what trains."""
        self.method, self.setting = method, setting
        model.config.use_cache = False
        self.most = 0
        self.model, self.optimizer = attached(model, method, setting, self)
        if setting.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        vocabulary = model.config.vocab_size
        draws = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(vocabulary, (setting.batch, setting.seq), generator=draws)

    def measured(self) -> dict[str, int]:
        """Return the bytes that are compared, over four steps and more."""
        first = temporary_bytes(self.first_step, "cpu", leaves_state=True)
        state_after_first = self.state()
        for _ in range(2):  # the second ends the warm-up of the residual, the third has one
            self.step()
        saved = self.saved_bytes()
        gradients = self.most_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        state = self.state()
        return {
            "state": state,
            "gradients": gradients,
            "activations": saved,
            "peak": temporary_bytes(self.step, "cpu"),
            # What stays is no temporary to the measurement, but it is there at the peak.
            "first step": first + state_after_first,
        }

    def first_step(self) -> None:
        """Do one step."""
        self.step()

    def step(self) -> None:
        """Do one step, all its micro-batches."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self) -> None:
        """Run all micro-batches of a step."""
        for _ in range(self.setting.accumulation):
            self.loss().backward()

    def loss(self) -> Tensor:
        """Return the loss of a micro-batch."""
        loss: Tensor = self.model(input_ids=self.tokens, labels=self.tokens).loss
        return loss

    def most_gradients(self) -> int:
        """Return the most bytes of gradients: of one that comes and goes, or of what micro-batches leave."""
        self.most = 0
        left = []
        with self.looking():
            for _ in range(self.setting.accumulation):
                self.loss().backward()
                left.append(self.held())
        return max(left) if self.setting.accumulation > 1 else max(self.most, left[0])

    def held(self) -> int:
        """Return the bytes of all gradients now, whole and compact ones."""
        tensors = [p.grad for p in self.model.parameters() if p.grad is not None]
        compact, layerwise = (getattr(self.optimizer, name, None) for name in ("compact", "layerwise"))
        held = [] if compact is None else [*compact._held.values(), *compact.ready.values()]
        held += [] if layerwise is None else layerwise._collected.values()
        parts = [pending.ctx for one in held for pending in one.pendings]
        tensors += [t for ctx in parts for t in (ctx.low, ctx.kept) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def look(self, _: object = None, *, beside: int = 0) -> None:
        """Remember the most that was held."""
        self.most = max(self.most, self.held() + beside)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look whenever rows of a gradient are formed, and before compact gradients that have waited step."""
        rows_of, compact = RowGradient.rows, getattr(self.optimizer, "compact", None)

        def rows(gradient: RowGradient, start: int, stop: int, like: Tensor) -> Tensor:
            formed = rows_of(gradient, start, stop, like)
            self.look(beside=formed.numel() * formed.element_size())
            return formed

        def finish_ready() -> None:
            self.look()
            CompactGradients.finish_ready(compact)

        steps = compact is not None and compact.layerwise is not None
        with patch.object(RowGradient, "rows", rows), ExitStack() as also:
            if steps:
                also.enter_context(patch.object(compact, "finish_ready", finish_ready))
            yield

    def state(self) -> int:
        """Return the bytes of the optimizer's tensors and of deferred updates."""
        pending = [deferred_of(p) for p in self.model.parameters()]
        lows = [one.low for one in pending if one is not None and one.low is not None]
        return state_bytes(self.optimizer) + sum(low.numel() * low.element_size() for low in lows)

    def saved_bytes(self) -> int:
        """Return the bytes that autograd has saved after forward; with checkpointing, the layers' inputs."""
        if self.setting.checkpointing:  # this kind keeps its inputs in closures: ask the other one
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            if self.method.trained != "all":
                self.model.enable_input_require_grads()
        found = saved_bytes(self.model, self.loss)
        if self.setting.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return found


class _Saved:
    """Holds a saved tensor as long as autograd does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd holds for backward, each storage once, weights left out."""
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        held = _Saved(tensor)
        alive.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        loss = forward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {held.tensor.untyped_storage() for held in alive}
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del loss
    return sum(size for pointer, size in sizes.items() if pointer and pointer not in weights)


def attached(model: nn.Module, method: Method, setting: Setting, training: Training) -> tuple[nn.Module, Optimizer]:
    """Return the model, with adapters if it has any, and its optimizer."""
    if method.trained != "all":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=setting.rank, target_modules="all-linear", task_type="CAUSAL_LM",
                            use_dora=method.trained == "dora")  # fmt: skip
        model = get_peft_model(model, config)
        if setting.checkpointing:
            model.enable_input_require_grads()
    if method.is_layerwise:  # before the optimizer's own hooks, which free the gradient
        linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} if method.is_compact else set()
        ends = {id(p) for p in embedding_weights(model).values()}
        # What is compact or comes in rows must be without hooks, and forms no gradient.
        without = linear | ends if setting.accumulation == 1 and method.is_compact else linear - ends
        for p in model.parameters():
            if id(p) not in without:
                p.register_post_accumulate_grad_hook(training.look)
    trained = [p for p in model.parameters() if p.requires_grad]
    if method.preset is not None:
        whole = method.gradients == "full"
        limits = {} if whole else {"accumulation_steps": setting.accumulation, "weights": method.weights}
        options = {"rank": setting.rank, "rule": setting.rule, "warmup_steps": 1, "lr": 1e-6}
        return model, create_optimizer(model, method.preset, gradients=method.gradients, **limits, **options)
    if method.rule == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return model, AdamW8bit(trained, lr=1e-6)
    return model, torch.optim.AdamW(trained, lr=1e-6, fused=True)


if __name__ == "__main__":
    sys.exit(main())
