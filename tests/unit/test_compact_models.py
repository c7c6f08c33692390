"""Compact gradients on models of every kind: what is compact, what stays whole, what is refused."""

import copy
import gc
import io
import logging
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from crosslore import attach_compact, attach_layerwise, create_optimizer
from crosslore.compact.linear import CompactLinear

from .models import tiny_decoder
from .test_compact import LINEAR, OPTIONS, llama, loss_of, train

transformers = pytest.importorskip("transformers", reason="needs transformers")
PLUS = {key: OPTIONS[key] for key in ("lr", "rank", "scale", "refresh_every")}


def ends_of(make: Any, preset: str = "crosslore_plus", *, steps: int = 16, **options: Any) -> list[list[torch.Tensor]]:
    """Return the weights after training with whole and with compact gradients."""
    ends = []
    for gradients in ("full", "compact"):
        model = make()
        train(create_optimizer(model, preset, **{**PLUS, **options}, gradients=gradients), model, range(steps))
        ends.append([p.detach() for p in model.parameters()])
    return ends


def assert_same(ends: list[list[torch.Tensor]]) -> None:
    for a, b in zip(*ends, strict=True):
        bound = 1e-9 if a.dtype == torch.float64 else 1e-5
        assert float((a - b).norm()) <= bound * float(a.norm()) + 1e-12


def small(kind: str, **config: Any) -> nn.Module:
    """A random model of a transformers architecture."""
    torch.manual_seed(0)
    configs = {
        "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=97,
                                                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        "phi3": lambda: transformers.Phi3Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                                num_attention_heads=8, num_key_value_heads=4, vocab_size=97,
                                                max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
                                                eos_token_id=2, resid_pdrop=0.0),
        "mixtral": lambda: transformers.MixtralConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                                      num_attention_heads=4, num_key_value_heads=2, vocab_size=97,
                                                      num_local_experts=4, max_position_embeddings=64),
        "qwen2": lambda: transformers.Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                                  num_attention_heads=8, num_key_value_heads=4, vocab_size=97,
                                                  max_position_embeddings=64, tie_word_embeddings=True),
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(configs[kind](**config))
    return (model if kind == "mixtral" else model.double()).train()  # torch's grouped product takes no doubles


def compact_names(model: nn.Module) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, CompactLinear)}


# Architectures


@pytest.mark.parametrize(
    ("kind", "compact"),
    [
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("qwen2", set(LINEAR)),
        ("mixtral", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_architectures_train_alike(kind: str, compact: set[str]) -> None:
    model = small(kind)
    create_optimizer(model, "crosslore", **OPTIONS, gradients="compact")
    assert compact_names(model) == compact
    steps = 6 if kind == "mixtral" else 16  # a router in fp32 sends a token elsewhere, sooner or later
    assert_same(
        ends_of(lambda: small(kind), "crosslore", steps=steps, warmup_steps=3, residual_ratio=0.05, moments="rotate")
    )


def test_a_model_without_linear_layers_is_refused_with_the_reason() -> None:
    # GPT-2's Conv1D is no nn.Linear.
    with pytest.raises(ValueError, match="finds no layer that can be compact: 8 x Conv1D is not nn.Linear itself"):
        create_optimizer(small("gpt2"), "crosslore_plus", **PLUS, gradients="compact")


def test_a_line_in_the_log_says_what_is_compact_and_what_is_not(caplog: pytest.LogCaptureFixture) -> None:
    model = small("mixtral")
    with caplog.at_level(logging.INFO, logger="crosslore"):
        create_optimizer(model, "crosslore_plus", **PLUS, gradients="compact")
    (line,) = [record.getMessage() for record in caplog.records if "Compact gradients" in record.getMessage()]
    assert line.startswith("Compact gradients: 8 of ")
    assert "Experts is not nn.Linear itself" in line


class OwnForward(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * 2, self.bias)


class Mixed(nn.Module):
    """An ordinary layer, a subclass, one that is used twice, and one whose weight is used outside it too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.own = nn.Linear(32, 32), OwnForward(32, 32)
        self.twice, self.outside = nn.Linear(32, 32), nn.Linear(32, 32)
        self.shared_a, self.shared_b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.shared_b.weight = self.shared_a.weight
        self.double()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        generator = torch.Generator().manual_seed(int(input_ids.sum()))
        x = torch.randn(20, 32, generator=generator, dtype=torch.float64)
        x = self.twice(self.twice(self.own(self.first(x)).tanh()).tanh())
        x = self.shared_b(self.shared_a(x).tanh())
        x = self.outside(x) + x @ self.outside.weight
        return transformers.utils.ModelOutput(loss=x.square().mean())


@pytest.mark.parametrize("parts", [1, 2])
def test_layers_used_twice_shared_or_elsewhere_train_alike(parts: int) -> None:
    ends = []
    for gradients in ("full", "compact"):
        model = Mixed()
        # Bases that look at no gradient: with several uses in one backward a fit sees the first one only.
        more = {"accumulation_steps": parts} if gradients == "compact" else {}
        optimizer = create_optimizer(model, "golore", **PLUS, random_after=0, gradients=gradients, **more)
        train(optimizer, model, range(12), parts=parts)
        ends.append([p.detach() for p in model.parameters()])
        if gradients == "compact":
            assert not isinstance(model.own, CompactLinear) and isinstance(model.first, CompactLinear)
    assert_same(ends)


def test_in_place_operations_after_a_layer_work() -> None:
    layer = nn.Linear(16, 16)
    optimizer = create_optimizer(nn.Sequential(layer), "crosslore_plus", lr=1e-3, rank=4, gradients="compact")
    nn.functional.relu(layer(torch.randn(3, 16)), inplace=True).sum().backward()
    optimizer.step()


def test_one_dimensional_and_empty_inputs_work() -> None:
    layer = nn.Linear(16, 16)
    optimizer = create_optimizer(nn.Sequential(layer), "crosslore_plus", lr=1e-3, rank=4, gradients="compact")
    layer(torch.randn(16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = layer.weight.detach().clone()
    layer(torch.randn(0, 16)).sum().backward()
    optimizer.step()
    assert bool(layer.weight.isfinite().all()) and before.shape == layer.weight.shape


def test_a_frozen_layer_stays_ordinary() -> None:
    model = llama()
    frozen = model.model.layers[0].mlp.up_proj
    frozen.weight.requires_grad_(False)
    create_optimizer(model, "crosslore_plus", **PLUS, gradients="compact")
    assert type(frozen) is nn.Linear


def test_frozen_inputs_do_not_stop_a_layer_from_training() -> None:
    assert_same(ends_of(llama, embeddings="frozen"))


@pytest.mark.slow
def test_a_compiled_model_trains_alike() -> None:
    def compiled() -> nn.Module:
        model = llama()
        model.model.layers[0].mlp.compile(backend="eager")
        return model

    assert_same(ends_of(compiled, steps=4))


# Copies, files, resume


def test_a_copied_model_has_ordinary_gradients() -> None:
    model = llama()
    optimizer = create_optimizer(model, "crosslore_plus", **PLUS, gradients="compact")
    train(optimizer, model, range(2))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loss_of(twin, 0).backward()
        assert twin.model.layers[0].mlp.up_proj.weight.grad is not None
    assert model.model.layers[0].mlp.up_proj.weight.grad is None


def test_saved_models_are_those_of_ordinary_layers(tmp_path: Any) -> None:
    model = llama()
    before = set(model.state_dict())
    optimizer = create_optimizer(model, "crosslore_plus", **PLUS, gradients="compact")
    train(optimizer, model, range(2))
    assert set(model.state_dict()) == before
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cut", [3, 5, 7, 8])  # in the warm-up, at its end, before and after a refresh
def test_resume_is_exact(cut: int) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = llama(dtype=torch.float32)
        return model, create_optimizer(model, "crosslore", **OPTIONS, gradients="compact")

    model, optimizer = start()
    train(optimizer, model, range(cut))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(optimizer, model, range(cut, 12))
    file.seek(0)
    held = torch.load(file, weights_only=True)
    again, resumed = start()
    again.load_state_dict(held["model"])
    resumed.load_state_dict(held["optimizer"])
    train(resumed, again, range(cut, 12))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("modes", [("full", "compact"), ("compact", "full"), ("layerwise", "compact")])
def test_a_checkpoint_goes_on_in_another_mode(modes: tuple[str, str]) -> None:
    model = llama()
    optimizer = create_optimizer(model, "crosslore", **OPTIONS, gradients=modes[0])
    train(optimizer, model, range(8))
    twin = copy.deepcopy(model)
    train(optimizer, model, range(8, 12))
    resumed = create_optimizer(twin, "crosslore", **OPTIONS, gradients=modes[1])
    resumed.load_state_dict(optimizer_state_at_8(modes[0]))
    train(resumed, twin, range(8, 12))
    assert_same([list(model.parameters()), list(twin.parameters())])


def optimizer_state_at_8(mode: str) -> dict[str, Any]:
    model = llama()
    optimizer = create_optimizer(model, "crosslore", **OPTIONS, gradients=mode)
    train(optimizer, model, range(8))
    return optimizer.state_dict()


def test_a_dropped_backward_pass_leaves_no_trace() -> None:
    ends = []
    for drops in (False, True):
        model = llama()
        optimizer = create_optimizer(model, "crosslore", **{**OPTIONS, "refresh_every": 100}, gradients="compact")
        train(optimizer, model, range(4))
        if drops:
            loss_of(model, 99).backward()  # no refresh is due: nothing but R was computed
        train(optimizer, model, range(4, 12))
        ends.append([p.detach() for p in model.parameters()])
    assert_same(ends)


def test_fewer_backward_passes_than_announced_are_a_step_too() -> None:
    ends = []
    for parts in (1, 4):
        model = llama()
        optimizer = create_optimizer(model, "crosslore", **OPTIONS, gradients="compact", accumulation_steps=parts)
        train(optimizer, model, range(10))
        ends.append([p.detach() for p in model.parameters()])
    assert_same(ends)


def test_detaching_goes_back_to_whole_gradients() -> None:
    model = llama()
    optimizer = create_optimizer(model, "crosslore_plus", **PLUS, gradients="compact")
    train(optimizer, model, range(2))
    assert optimizer.compact is not None
    optimizer.compact.detach()
    assert compact_names(model) == set() and optimizer.compact is None
    loss_of(model, 0).backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_gradients_of_other_tensors_hand_nothing_over() -> None:
    layer = nn.Linear(16, 16)
    optimizer = create_optimizer(nn.Sequential(layer), "crosslore_plus", lr=1e-3, rank=4, gradients="compact")
    x = torch.randn(3, 16, requires_grad=True)
    before = layer.weight.detach().clone()
    (found,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(found, layer.weight.detach().sum(0).expand(3, -1))
    layer(x).sum().backward(inputs=[x])
    (asked,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    torch.testing.assert_close(asked, x.detach().sum(0).expand(16, -1))
    optimizer.step()
    assert torch.equal(layer.weight, before) and layer.weight.grad is None


@pytest.mark.parametrize("weights", ["direct", "deferred"])
def test_model_and_optimizer_can_be_freed(weights: str) -> None:
    model = llama()
    optimizer = create_optimizer(model, "crosslore", **OPTIONS, gradients="compact", weights=weights)
    train(optimizer, model, range(3))
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    del optimizer
    gc.collect()
    loss_of(model, 0).backward()  # nobody takes R any more: an ordinary gradient
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    create_optimizer(model, "crosslore", **OPTIONS, gradients="compact")
    del model
    gc.collect()
    assert weight() is None


# Refused by name


@pytest.mark.parametrize("preset", ["fira", "apollo", "apollo_mini", "ldadam", "flora"])
def test_methods_that_need_the_gradient_on_every_step_are_refused(preset: str) -> None:
    model = llama()
    with pytest.raises(ValueError, match="gradients must be 'full' or 'layerwise' for residual="):
        create_optimizer(model, preset, lr=1e-3, gradients="compact")
    assert compact_names(model) == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradients": "compakt"}, "unknown gradients 'compakt'. Did you mean 'compact'?"),
        (
            {"gradients": "compact", "layerwise": True},
            "layerwise=True is gradients='layerwise', got gradients='compact'",
        ),
        ({"gradients": "compact", "compile": True}, "compile must be False for gradients='compact'"),
        ({"gradients": "compact", "clip": "stale-global", "max_grad_norm": 1.0}, "clip is for layerwise, got clip"),
        ({"gradients": "compact", "max_grad_norm": 0.0}, "max_grad_norm"),
        ({"gradients": "compact", "accumulation_steps": 0}, "accumulation_steps must be an integer >= 1, got 0"),
        ({"max_grad_norm": 1.0}, "accumulation_steps and max_grad_norm are for layerwise=True and gradients='compact'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_optimizer(tiny_decoder(), "crosslore_plus", lr=1e-3, rank=4, **options)


def test_two_modes_at_once_are_refused() -> None:
    model = llama()
    optimizer = create_optimizer(model, "crosslore_plus", **PLUS, gradients="compact")
    with pytest.raises(ValueError, match="the optimizer is compact already"):
        attach_compact(optimizer, model)
    with pytest.raises(ValueError, match="the optimizer is compact already"):
        attach_layerwise(optimizer)


def test_a_second_optimizer_on_a_compact_model_is_refused() -> None:
    model = llama()
    first = create_optimizer(model, "crosslore_plus", **PLUS, gradients="compact")
    with pytest.raises(ValueError, match="q_proj.weight hands its gradient to another optimizer already"):
        create_optimizer(model, "crosslore_plus", **PLUS)
    assert first.compact is not None
    first.compact.detach()
    create_optimizer(model, "crosslore_plus", **PLUS)


def test_an_optimizer_that_nobody_holds_is_in_nobodys_way() -> None:
    model = llama()
    for mode in ("compact", "compact-layerwise", "compact"):
        optimizer = create_optimizer(model, "crosslore_plus", **PLUS, gradients=mode)
        train(optimizer, model, range(2))
        del optimizer
