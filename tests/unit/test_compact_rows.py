"""Embeddings and heads stepped in rows: the same steps as with their whole gradient, which is never formed."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from crosslore import LowRankOptimizer, create_optimizer
from crosslore.compact import rows as in_rows
from crosslore.compact.linear import CompactEmbedding

from .test_compact import llama, options_of, train

transformers = pytest.importorskip("transformers", reason="needs transformers")


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """97 rows in four parts; the last is shorter."""
    monkeypatch.setattr(in_rows, "AT_ONCE", {"cpu": 32 * 64})
    monkeypatch.setattr(in_rows, "ROWS", 32)


def both(
    *, steps: int = 12, dtype: torch.dtype = torch.float64, config: dict[str, Any] | None = None, **more: Any
) -> Any:
    """Return models and optimizers after the same steps, layerwise with whole and with compact gradients."""
    preset, options = options_of("plus")
    found = []
    for mode in ("layerwise", "compact-layerwise"):
        model = llama(dtype=dtype, **(config or {}))
        optimizer = create_optimizer(model, preset, **{**options, **more}, gradients=mode)
        train(optimizer, model, range(steps))
        found.append((model, optimizer))
    return found


def difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((x - y).detach().norm() / x.detach().norm()) for x, y in pairs)


def stepper(optimizer: LowRankOptimizer) -> in_rows.RowStepper:
    assert optimizer.compact is not None and optimizer.compact.layerwise is not None
    assert optimizer.compact.layerwise.rows is not None
    return optimizer.compact.layerwise.rows


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "more",
    [{}, {"weight_decay": 0.1}, {"rule": "sgd"}, {"rule": "adagrad"}, {"weight_decay": 0.1, "decay_order": "after"},
     {"max_grad_norm": 1e-3}, {"max_grad_norm": 1e-3, "clip": "stale-global"}],
)  # fmt: skip
def test_rows_take_the_steps_of_the_whole(tied: bool, more: dict[str, Any]) -> None:
    if more.get("clip"):  # norms of compact gradients are not those of whole ones
        more = {**more, "rank": 64, "targets": ["q_proj"], "refresh_every": 100}
    (whole, _), (rows, optimizer) = both(config={"tie_word_embeddings": tied}, **more)
    assert len(stepper(optimizer).modules) == (1 if tied else 2) + 12 * ("targets" in more)
    assert difference(whole, rows) < 1e-9


@pytest.mark.parametrize("tied", [False, True])
def test_8bit_moments_are_those_of_the_whole(tied: bool) -> None:
    options = {"rule": "adamw8bit", "steps": 4, "dtype": torch.float32}
    config = {"tie_word_embeddings": tied, "vocab_size": 97}
    (whole, a), (rows, b) = both(config=config, **options)
    assert difference(whole, rows) < 1e-5
    for x, y in zip(whole.parameters(), rows.parameters(), strict=True):
        for key, value in a.state[x].items():
            assert key == "step" or (value.float() - b.state[y][key].float()).abs().max() <= 1


def test_a_row_of_padding_is_not_touched() -> None:
    (whole, _), (rows, optimizer) = both(config={"pad_token_id": 5, "tie_word_embeddings": False})
    assert rows.model.embed_tokens.padding_idx == 5 and isinstance(rows.model.embed_tokens, CompactEmbedding)
    assert difference(whole, rows) < 1e-9
    fresh = llama(pad_token_id=5, tie_word_embeddings=False)
    assert torch.equal(rows.model.embed_tokens.weight[5], fresh.model.embed_tokens.weight[5])


def test_no_gradient_of_the_whole_size_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(vocab_size=970)
    optimizer = create_optimizer(model, "crosslore_plus", lr=1e-3, rank=8, gradients="compact-layerwise")
    sizes: list[int] = []
    original = in_rows.RowGradient.rows
    monkeypatch.setattr(
        in_rows.RowGradient, "rows", lambda *words: sizes.append(len(found := original(*words))) or found
    )
    train(optimizer, model, range(2))
    assert sizes and max(sizes) == 32
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    models = []
    for checkpointing in (False, True):
        model = llama()
        if checkpointing:
            model.config.use_cache = False
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        options = {"lr": 1e-3, "rank": 8, "moments": "rotate", "refresh_every": 5}
        train(create_optimizer(model, "crosslore_plus", **options, gradients="compact-layerwise"), model, range(8))
        models.append(model)
    assert difference(*models) < 1e-9


class TwoUses(nn.Module):
    """An embedding that is read through its module and by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.outside = True

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.linear(self.embed(tokens))
        return y @ self.embed.weight.mT if self.outside else y

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed


@pytest.mark.parametrize("outside", [False, True])
def test_a_weight_that_is_used_elsewhere_too_has_its_whole_gradient(outside: bool) -> None:
    ends = []
    for mode in ("layerwise", "compact-layerwise"):
        torch.manual_seed(0)
        model = TwoUses().double()
        model.outside = outside
        optimizer = create_optimizer(model, "crosslore_plus", lr=1e-2, rank=4, gradients=mode)
        for step in range(5):
            tokens = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(step))
            model(tokens).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model)
    assert difference(*ends) < 1e-9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    model = TwoUses()
    model.outside = False
    optimizer = create_optimizer(model, "crosslore_plus", lr=1e-2, rank=4, gradients="compact-layerwise")
    tokens = torch.randint(50, (3, 7))
    for scale in (1.0, bad):
        before = [p.detach().clone() for p in model.parameters()]
        state = {k: v.clone() for k, v in optimizer.state[model.embed.weight].items()}
        (model(tokens).square().mean() * scale).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(v, optimizer.state[model.embed.weight][k]) for k, v in state.items())
    assert "embed.weight" in optimizer.nonfinite_skips


def test_entries_that_their_bound_does_not_prove_finite_are_looked_at() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    nn.init.eye_(model[0].weight)
    options = {"lr": 1e-38, "rank": 4, "targets": ["0"], "rule": "sgd", "gradients": "compact-layerwise"}
    optimizer = create_optimizer(model, "crosslore_plus", **options)
    x, grad = torch.full((2, 8), 1e19), torch.ones(2, 8)
    x[1], grad[1] = 1.0, 3e19  # token by token 1e19 and 3e19, the product of the largest is beyond fp32
    before = model[1].weight.detach().clone()
    model(x).backward(grad)
    optimizer.step()
    assert model[1].weight in stepper(optimizer).modules and "1.weight" not in optimizer.nonfinite_skips
    torch.testing.assert_close(optimizer.state[model[1].weight]["exp_avg"], torch.full((8, 8), 4e19))
    assert torch.equal(before, model[1].weight)  # 4e19 * 1e-38 is nothing


def test_a_resumed_run_is_bitwise_the_same() -> None:
    def fresh() -> tuple[nn.Module, LowRankOptimizer]:
        model = llama(dtype=torch.float32)
        return model, create_optimizer(
            model, "crosslore", lr=1e-3, rank=8, warmup_steps=2, rule="adamw8bit", gradients="compact-layerwise"
        )

    model, optimizer = fresh()
    train(optimizer, model, range(4))
    saved = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()
    other, again = fresh()
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(optimizer, model, range(4, 7))
    train(again, other, range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_detached_modules_are_ordinary_and_form_their_gradient() -> None:
    model = llama()
    optimizer = create_optimizer(model, "crosslore_plus", lr=1e-3, rank=8, gradients="compact-layerwise")
    assert optimizer.compact is not None
    optimizer.compact.detach()
    assert type(model.model.embed_tokens) is nn.Embedding and type(model.lm_head) is nn.Linear
    model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_autograd_grad_gets_the_gradient_and_nothing_steps() -> None:
    model = llama()
    ids = torch.arange(9)[None]
    weights = [model.model.embed_tokens.weight, model.lm_head.weight]
    wanted = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, weights)
    optimizer = create_optimizer(model, "crosslore_plus", lr=1e-3, rank=8, gradients="compact-layerwise")
    before = [w.detach().clone() for w in weights]
    found = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, weights)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(wanted, found, strict=True))
    assert all(torch.equal(a, w) for a, w in zip(before, weights, strict=True))
    assert not any(optimizer.state[weight] for weight in weights)  # which is there still to take them


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embeddings_of_another_kind_keep_their_whole_gradient(options: dict[str, Any]) -> None:
    model = TwoUses()
    model.embed = nn.Embedding(50, 16, **options)
    optimizer = create_optimizer(model, "crosslore_plus", lr=1e-3, rank=4, gradients="compact-layerwise")
    assert type(model.embed) is nn.Embedding
    assert optimizer.compact is not None and optimizer.compact.layerwise is not None
    assert optimizer.compact.layerwise.rows is None


@pytest.mark.parametrize("more", [{"rule": "adafactor"}, {"accumulation_steps": 2}])
def test_what_needs_the_whole_gradient_keeps_it(more: dict[str, Any]) -> None:
    model = llama()
    optimizer = create_optimizer(model, "crosslore_plus", lr=1e-3, rank=8, gradients="compact-layerwise", **more)
    assert optimizer.compact is not None and optimizer.compact.layerwise is not None
    assert optimizer.compact.layerwise.rows is None and type(model.model.embed_tokens) is nn.Embedding


def test_nothing_of_the_weight_is_kept_for_backward() -> None:
    model = llama()
    optimizer = create_optimizer(model, "crosslore_plus", lr=1e-3, rank=8, gradients="compact-layerwise")
    saved: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model.model.embed_tokens(torch.arange(5))
    assert [t.dtype for t in saved] == [torch.int64] and stepper(optimizer).modules
