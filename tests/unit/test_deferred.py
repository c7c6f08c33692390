"""Deferred weights: the same method as direct ones, with the updates of an interval beside the weight."""

import copy
import io
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from crosslore import attach_compact, create_optimizer
from crosslore.compact.deferred import deferred_of

from .test_compact import METHODS, OPTIONS, llama, loss_of, options_of, train

transformers = pytest.importorskip("transformers", reason="needs transformers")
PLUS = {key: OPTIONS[key] for key in ("lr", "rank", "scale", "refresh_every")}


def start(method: str = "plus", **more: Any) -> tuple[nn.Module, Any]:
    dtype = more.pop("dtype", torch.float64)
    model = llama(dtype=dtype)
    preset, options = options_of(method)
    return model, create_optimizer(model, preset, **{**options, "gradients": "compact", "weights": "deferred", **more})


def assert_same(ours: nn.Module, theirs: nn.Module, bound: float = 1e-9) -> None:
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert float((a - b).norm()) <= bound * float(b.norm()) + 1e-12, name


@pytest.mark.parametrize("method", METHODS)
def test_deferred_equals_direct_across_refreshes(method: str) -> None:
    model, optimizer = start(method)
    direct, other = start(method, weights="direct")
    train(optimizer, model, range(30))
    train(other, direct, range(30))
    assert_same(model, direct, 1e-6 if "8bit" in method else 1e-9)  # one rounding turns an 8-bit code


@pytest.mark.parametrize("parts", [2, 4])
def test_deferred_equals_full_with_accumulation_and_checkpointing(parts: int) -> None:
    model, optimizer = start("crosslore", accumulation_steps=parts, weight_decay=0.1)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": parts == 2})
    full, other = start("crosslore", gradients="full", weights="direct", weight_decay=0.1)
    train(optimizer, model, range(20), parts=parts)
    train(other, full, range(20), parts=parts)
    assert_same(model, full)


def test_deferred_equals_direct_in_fp32() -> None:
    size = {"rows": 4, "length": 24}
    model, optimizer = start("crosslore", dtype=torch.float32, weight_decay=0.1)
    direct, other = start("crosslore", dtype=torch.float32, weight_decay=0.1, weights="direct")
    train(optimizer, model, range(50), **size)
    train(other, direct, range(50), **size)
    assert_same(model, direct, 1e-5)


def test_weights_stay_until_they_are_merged_and_forward_knows_what_is_pending() -> None:
    model, optimizer = start(refresh_every=100)
    direct, other = start(refresh_every=100, weights="direct")
    train(optimizer, model, range(3))
    train(other, direct, range(3))
    weight = model.model.layers[0].mlp.up_proj.weight
    held = deferred_of(weight)
    assert held is not None and held.is_pending
    before = weight.detach().clone()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(loss_of(model, 9), loss_of(direct, 9), rtol=1e-12, atol=1e-12)
    assert torch.equal(weight, before)
    optimizer.merge()
    assert not held.is_pending and not torch.equal(weight, before)
    torch.testing.assert_close(loss_of(model, 9), loss_of(direct, 9), rtol=1e-12, atol=1e-12)


READERS = {
    "state_dict": lambda model: model.state_dict(),
    "deepcopy": lambda model: copy.deepcopy(model).state_dict(),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)).state_dict(),
    "to": lambda model: dict(model.to(torch.float64).named_parameters()),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("steps", [1, 3, 7, 8])
def test_nobody_reads_a_weight_without_its_pending_part(reader: str, steps: int) -> None:
    model, optimizer = start("crosslore")
    direct, other = start("crosslore", weights="direct")
    train(optimizer, model, range(steps))
    train(other, direct, range(steps))
    read = READERS[reader](model)
    for name, value in direct.state_dict().items():
        if name in read:
            torch.testing.assert_close(read[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("cut", [3, 5, 7, 8])
def test_resume_is_exact(cut: int, optimizer_first: bool) -> None:
    model, optimizer = start("crosslore", dtype=torch.float32)
    train(optimizer, model, range(cut))
    file = io.BytesIO()
    parts = [lambda: optimizer.state_dict(), lambda: model.state_dict()]
    saved = [part() for part in (parts if optimizer_first else parts[::-1])]
    torch.save(saved if optimizer_first else saved[::-1], file)
    train(optimizer, model, range(cut, 12))
    file.seek(0)
    of_optimizer, of_model = torch.load(file, weights_only=True)
    again, resumed = start("crosslore", dtype=torch.float32)
    train(resumed, again, range(2))  # something pending, which loading replaces
    loads = [lambda: resumed.load_state_dict(of_optimizer), lambda: again.load_state_dict(of_model)]
    for load in loads if optimizer_first else loads[::-1]:
        load()
    train(resumed, again, range(cut, 12))
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_bf16_is_rounded_at_a_merge_only() -> None:
    """Steps far below bf16's spacing add up; stepped directly they are lost."""
    moved = {}
    for weights in ("direct", "deferred"):
        model, optimizer = start(dtype=torch.bfloat16, lr=1e-6, refresh_every=100, weights=weights, moments="keep")
        before = [p.detach().clone() for p in model.parameters()]
        train(optimizer, model, range(90))
        optimizer.merge()
        weight = model.model.layers[0].mlp.up_proj.weight
        old = before[[p is weight for p in model.parameters()].index(True)]
        moved[weights] = float((weight.float() - old.float()).norm())
    assert moved["deferred"] > 3 * moved["direct"]


def test_a_step_between_forward_and_backward_is_refused() -> None:
    model, optimizer = start(refresh_every=100)
    train(optimizer, model, range(2))
    optimizer.zero_grad()
    old = loss_of(model, 2)
    loss_of(model, 3).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="stepped between the forward and the backward pass|modified by an inplace"):
        old.backward()


def test_a_weight_that_is_used_outside_its_layer_is_stepped_directly(caplog: pytest.LogCaptureFixture) -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(16, 16).double(), nn.Linear(16, 16).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).tanh() + x @ self.a.weight)

    ends = []
    for weights in ("direct", "deferred"):
        model = Outside()
        optimizer = create_optimizer(
            model, "crosslore_plus", **{**PLUS, "rank": 4}, gradients="compact", weights=weights
        )
        for step in range(5):
            optimizer.zero_grad()
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            model(x).square().mean().backward()
            optimizer.step()
        assert (deferred_of(model.a.weight) is None) and (deferred_of(model.b.weight) is not None) == (
            weights != "direct"
        )
        ends.append(model)
    assert_same(*ends)
    assert "used outside" not in caplog.text  # found in the first step, when nothing was pending


def test_fused_layers_are_compact_but_direct() -> None:
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=97, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, resid_pdrop=0.0,
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config).train()
    create_optimizer(model, "crosslore", **OPTIONS, gradients="compact", weights="deferred")
    layer = model.model.layers[0]
    assert deferred_of(layer.self_attn.qkv_proj.weight) is None
    assert deferred_of(layer.self_attn.o_proj.weight) is not None


def test_detaching_merges() -> None:
    model, optimizer = start("crosslore")
    direct, other = start("crosslore", weights="direct")
    train(optimizer, model, range(4))
    train(other, direct, range(4))
    optimizer.compact.detach()
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    for a, b in zip(model.parameters(), direct.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_log_says_nothing_unusual(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model, optimizer = start("crosslore")
        train(optimizer, model, range(10))
    assert not caplog.records


@pytest.mark.parametrize("gradients", ["full", "layerwise"])
def test_deferred_needs_compact_gradients(gradients: str) -> None:
    with pytest.raises(ValueError, match=f"weights='deferred' is for gradients='compact', got gradients='{gradients}'"):
        create_optimizer(llama(), "crosslore_plus", **PLUS, gradients=gradients, weights="deferred")
    with pytest.raises(ValueError, match="unknown weights 'late'"):
        create_optimizer(llama(), "crosslore_plus", **PLUS, gradients="compact", weights="late")
    optimizer = create_optimizer(llama(), "crosslore_plus", **PLUS)
    with pytest.raises(ValueError, match="unknown weights 'late'"):
        attach_compact(optimizer, llama(), weights="late")
