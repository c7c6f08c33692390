"""Compact gradients whose weights step inside backward: the method of `compact`, the memory of one weight."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from crosslore import LowRankOptimizer, create_optimizer
from crosslore.compact.gradients import CompactGradients
from crosslore.compact.linear import CompactLinear

from .test_compact import LINEAR, OPTIONS, llama, loss_of, options_of, train
from .test_compact_models import Mixed

PLUS = {"lr": 1e-3, "rank": 8, "scale": 1.0, "refresh_every": 5, "moments": "rotate"}


def ends(method: str, modes: tuple[dict[str, Any], ...], *, parts: int = 1, steps: int = 16, **more: Any) -> float:
    """Return the largest relative difference of a weight after training in two modes."""
    preset, options = options_of(method)
    found = []
    for mode in modes:
        model = llama()
        if (reentrant := more.get("reentrant")) is not None:
            model.config.use_cache = False
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = create_optimizer(model, preset, **options, accumulation_steps=parts, **mode)
        train(optimizer, model, range(steps), parts=parts)
        optimizer.merge()
        found.append([p.detach() for p in model.parameters()])
    return max(float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True))


COMPACT, LAYERWISE, BOTH = ({"gradients": mode} for mode in ("compact", "layerwise", "compact-layerwise"))


@pytest.mark.parametrize("method", ["crosslore", "crosslore-no-warmup", "crosslore-select", "plus-window", "galore"])
def test_it_is_the_method_of_compact(method: str) -> None:
    assert ends(method, (COMPACT, BOTH)) < 1e-9


@pytest.mark.parametrize("method", ["crosslore", "crosslore-no-warmup", "crosslore-select", "plus-window", "galore"])
def test_with_accumulation_bases_are_those_of_layerwise(method: str) -> None:
    # Fitted to the first micro-batch: with their sum, all gradients would be held at once in the first step.
    assert ends(method, (LAYERWISE, BOTH), parts=2) < 1e-9


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    assert ends("crosslore", (COMPACT, BOTH), reentrant=reentrant) < 1e-9


@pytest.mark.parametrize("method", ["crosslore", "plus"])
def test_deferred_weights_step_inside_backward_too(method: str) -> None:
    assert ends(method, (COMPACT, {**BOTH, "weights": "deferred"})) < 1e-9


@pytest.mark.parametrize("clip", ["weight", "stale-global"])
def test_without_accumulation_clipping_is_that_of_layerwise(clip: str) -> None:
    # Stale-global sums norms of compact gradients here, and of whole ones there: a full basis keeps all of a norm. (Its
    # directions without any gradient are arbitrary, so the comparison ends with the first interval.)
    options = {**PLUS, "rank": 64, "targets": ["q_proj"]} if clip == "stale-global" else PLUS
    limits: dict[str, Any] = {"max_grad_norm": 0.01, "clip": clip}
    found = []
    for more in ({"gradients": "layerwise", **limits}, {"gradients": "compact-layerwise", **limits}, {}):
        model = llama(num_hidden_layers=1)
        train(create_optimizer(model, "crosslore_plus", **options, **more), model, range(5))
        found.append([p.detach() for p in model.parameters()])
    ours, theirs, unclipped = found
    same = max(float((a - b).norm() / a.norm()) for a, b in zip(ours, theirs, strict=True))
    other = max(float((a - b).norm() / a.norm()) for a, b in zip(ours, unclipped, strict=True))
    assert same < 1e-9 and other > 1e-5


def handle(optimizer: LowRankOptimizer) -> CompactGradients:
    assert optimizer.compact is not None
    return optimizer.compact


def test_weights_have_stepped_and_nothing_is_held_after_backward() -> None:
    model = llama()
    optimizer = create_optimizer(model, "crosslore", **OPTIONS, **BOTH)
    for step in range(9):
        before = [p.detach().clone() for p in model.parameters()]
        loss_of(model, step).backward()
        assert all(p.grad is None for p in model.parameters())
        assert not any(handle(optimizer).holds(p) for p in model.parameters())
        assert all(not torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True))
        stepped = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(old, p) for old, p in zip(stepped, model.parameters(), strict=True))


def test_one_compact_gradient_is_alive_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    optimizer = create_optimizer(model, "crosslore", **OPTIONS, **BOTH)
    alive: list[int] = []
    take = CompactGradients.take

    def counted(self: CompactGradients, weight: torch.Tensor, factors: Any) -> None:
        take(self, weight, factors)
        alive.append(sum(self.holds(p) for p in model.parameters()))

    monkeypatch.setattr(CompactGradients, "take", counted)
    handle(optimizer).detach()
    optimizer = create_optimizer(model, "crosslore", **OPTIONS, **BOTH)
    train(optimizer, model, range(3))
    assert len(alive) == 3 * 2 * len(LINEAR) and set(alive) == {1}


@pytest.mark.parametrize("parts", [1, 2])
def test_layers_used_twice_shared_or_elsewhere_train_alike(parts: int) -> None:
    found = []
    for mode in ({"gradients": "full"}, {**BOTH, "accumulation_steps": parts}):
        model = Mixed()
        optimizer = create_optimizer(model, "golore", **PLUS, random_after=0, **mode)
        train(optimizer, model, range(12), parts=parts)
        found.append([p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_fewer_backward_passes_than_announced_are_finished_by_step() -> None:
    found = []
    for mode in (LAYERWISE, BOTH):
        model = llama()
        optimizer = create_optimizer(model, "crosslore_plus", **PLUS, **mode, accumulation_steps=3)
        train(optimizer, model, range(7), parts=2)
        found.append([p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class Breaks(torch.autograd.Function):
    """Ends a backward pass with an error."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise ValueError("broken")


def test_what_a_broken_pass_has_left_is_stepped_before_the_next_one_is_taken() -> None:
    found = []
    for mode in (LAYERWISE, BOTH):
        torch.manual_seed(0)
        first, last = nn.Linear(16, 16).double(), nn.Linear(16, 16).double()
        options = {"lr": 1e-2, "rank": 4, "random_after": 0}
        optimizer = create_optimizer(nn.Sequential(first, last), "golore", **options, **mode)
        x = torch.linspace(-1, 1, 48).double().view(3, 16)
        with pytest.raises(ValueError, match="broken"):
            last(Breaks.apply(first(x))).sum().backward()
        last(first(2 * x).detach()).sum().backward()
        optimizer.step()
        assert optimizer.state[last.weight]["step"] == 2
        found.append(last.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_weights_step_at_the_end_of_a_pass_after_a_broken_one() -> None:
    first, last = nn.Linear(16, 16), nn.Linear(16, 16)
    optimizer = create_optimizer(nn.Sequential(first, last), "golore", lr=1e-2, rank=4, random_after=0, **BOTH)
    with pytest.raises(ValueError, match="broken"):
        last(Breaks.apply(first(torch.ones(3, 16)))).sum().backward()
    first(torch.ones(3, 16)).sum().backward()
    assert optimizer.state[first.weight]["step"] == optimizer.state[last.weight]["step"] == 1


@pytest.mark.parametrize("tied", [False, True])
def test_weights_step_after_the_model_was_moved(tied: bool) -> None:
    # Autograd gives a weight that is cast or moved another node.
    model = llama(dtype=torch.float32, tie_word_embeddings=tied)
    optimizer = create_optimizer(model, "crosslore_plus", **PLUS, **BOTH)
    loss_of(model, 0).backward()
    before = [p.detach().clone() for p in model.to(torch.bfloat16).to(torch.float32).parameters()]
    loss_of(model, 1).backward()
    for old, p in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, p) and optimizer.state[p]["step"] == 2


def test_the_norm_is_that_of_what_is_applied() -> None:
    norms = []
    for mode in (COMPACT, BOTH):
        model = llama()
        optimizer = create_optimizer(model, "crosslore_plus", **PLUS, **mode)
        loss_of(model, 0).backward()
        norms.append((optimizer.layerwise or handle(optimizer)).grad_norm())
    assert norms[1] == pytest.approx(norms[0], rel=1e-9)


def test_a_gradient_that_is_not_finite_skips_its_weights() -> None:
    model = llama()
    optimizer = create_optimizer(model, "crosslore_plus", **PLUS, **BOTH)
    train(optimizer, model, range(2))
    before = [p.detach().clone() for p in model.parameters()]
    (loss_of(model, 2) * float("nan")).backward()
    optimizer.step()
    assert all(torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True))
    assert len(optimizer.nonfinite_skips) == len(before)
    train(optimizer, model, range(3, 5))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("half", ["compact", "layerwise"])
def test_detaching_either_half_goes_back_to_whole_gradients(half: str) -> None:
    model = llama()
    optimizer = create_optimizer(model, "crosslore_plus", **PLUS, **BOTH)
    train(optimizer, model, range(3))
    getattr(optimizer, half).detach()
    assert optimizer.compact is None and optimizer.layerwise is None
    assert not any(isinstance(module, CompactLinear) for module in model.modules())
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 3).backward()
    assert all(p.grad is not None and torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True))
    optimizer.step()
    assert all(not torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True))


def test_resume_is_exact() -> None:
    model, copy = llama(), llama()
    optimizer = create_optimizer(model, "crosslore", **OPTIONS, **BOTH)
    train(optimizer, model, range(6))
    copy.load_state_dict(model.state_dict())
    again = create_optimizer(copy, "crosslore", **OPTIONS, **BOTH)
    again.load_state_dict(optimizer.state_dict())
    for one, net in ((optimizer, model), (again, copy)):
        train(one, net, range(6, 12))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


@pytest.mark.parametrize("gradients", ["layerwise", "compact-layerwise"])
def test_model_and_optimizer_can_be_freed(gradients: str) -> None:
    model = llama()
    optimizer = create_optimizer(model, "crosslore", **OPTIONS, gradients=gradients)
    train(optimizer, model, range(3))
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    del optimizer, model
    gc.collect()
    assert weight() is None


def test_loss_scaling_is_refused() -> None:
    layer = nn.Sequential(nn.Linear(16, 16))
    optimizer = create_optimizer(layer, "galore", lr=1e-3, rank=4, **BOTH)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(layer(torch.ones(2, 16)).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler is not for gradients='compact-layerwise'"):
        scaler.step(optimizer)
