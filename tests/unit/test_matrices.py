"""Weights that are matrices in another form: stacked experts, convolutions, Conv1D, square ones."""

import copy

import pytest
import torch
from torch import Tensor, nn

from crosslore import LowRankConfig, LowRankOptimizer, create_optimizer
from crosslore.layout import Block, MatrixLayout, RowSpan

OPTIONS = {"lr": 1e-2, "rank": 3, "scale": 1.0, "refresh_every": 3}


class Experts(nn.Module):
    """Stacked weights as transformers' mixture-of-experts models keep them."""

    def __init__(self, number: int = 4) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(number, 12, 6))
        self.down_proj = nn.Parameter(torch.randn(number, 6, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->ebo", x, self.gate_up_proj).relu()


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gate = Experts(), nn.Linear(6, 4)


def one_by_one(weight: Tensor, grads: list[Tensor], preset: str, **options: object) -> Tensor:
    """The same method on each stacked matrix by itself; with exact bases, which draw nothing."""
    singles = [nn.Linear(*w.shape[::-1], bias=False) for w in weight]
    for i, single in enumerate(singles):
        single.weight.data.copy_(weight[i])
        optimizer = create_optimizer(nn.ModuleList([single]), preset, **options)
        for grad in grads:
            single.weight.grad = grad[i].clone()
            optimizer.step()
    return torch.stack([single.weight.detach() for single in singles])


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize(("preset", "every"), [("galore", 3), ("ldadam", 1)])
def test_stacked_matrices_equal_single_ones(name: str, preset: str, every: int) -> None:
    torch.manual_seed(0)
    model = Mixture()
    weight, options = getattr(model.experts, name), {**OPTIONS, "refresh_every": every}
    optimizer = create_optimizer(model, preset, **options)
    grads = [torch.randn_like(weight) for _ in range(5)]
    expected = one_by_one(weight.detach().clone(), grads, preset, **options)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-5)


def test_all_linear_takes_stacked_experts_and_leaves_the_router() -> None:
    optimizer = create_optimizer(Mixture(), "galore", **OPTIONS)
    names = [n for g in optimizer.param_groups for n, b in zip(g["param_names"], g["blocks"], strict=True) if b]
    assert names == ["experts.gate_up_proj", "experts.down_proj"]
    assert optimizer.param_groups[0]["blocks"][0][0]["layout"]["batch"] == (4,)


def test_an_expert_without_tokens_keeps_its_basis_at_a_refresh() -> None:
    torch.manual_seed(0)
    model = Mixture()
    optimizer, weight = create_optimizer(model, "crosslore", **OPTIONS, refresh_stagger=False), model.experts.down_proj
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    before = optimizer.state[weight]["basis"].clone()
    weight.grad = torch.randn_like(weight)
    weight.grad[1] = 0
    optimizer.step()
    after = optimizer.state[weight]["basis"]
    assert torch.equal(after[1], before[1]) and not torch.allclose(after[0], before[0])


def test_a_residual_on_stacked_weights_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"residual_targets names experts\.down_proj, whose 4 matrices are stacked"):
        create_optimizer(Mixture(), **OPTIONS, residual_targets=("down_proj",))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_the_matrix_of_its_flattened_kernels(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 8, 3).to(memory_format=memory_format)
    flat = nn.Linear(36, 8, bias=False)
    flat.weight.data.copy_(convolution.weight.detach().flatten(1))
    first = create_optimizer(nn.ModuleDict({"conv": convolution}), "galore", **OPTIONS, targets=("conv",))
    second = create_optimizer(nn.ModuleDict({"conv": flat}), "galore", **OPTIONS)
    for _ in range(5):
        grad = torch.randn(8, 4, 3, 3)
        convolution.weight.grad = grad.to(memory_format=memory_format)
        flat.weight.grad = grad.flatten(1)
        first.step()
        second.step()
    torch.testing.assert_close(convolution.weight.detach().flatten(1), flat.weight.detach())


def test_all_linear_leaves_convolutions_at_full_rank() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 8, 3), "proj": nn.Linear(8, 8)})
    optimizer = create_optimizer(model, "galore", **OPTIONS)
    low = [n for g in optimizer.param_groups for n, b in zip(g["param_names"], g["blocks"], strict=True) if b]
    assert low == ["proj.weight"]


def test_gpt2_trains_with_its_transposed_fused_weights() -> None:
    """Conv1D keeps (in, out): the matrix is the transpose, its fused rows have query, key and value as parts."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    optimizer = create_optimizer(
        model, "crosslore", lr=1e-3, rank=4, scale=4.0, warmup_steps=2, refresh_every=3, residual_ratio=0.1
    )
    weight = model.transformer.h[0].attn.c_attn.weight
    tokens = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = optimizer.state[weight]
    assert state["q_proj.basis"].shape == (32, 4) and state["q_proj.exp_avg"].shape == (32, 4)
    assert {"k_proj.res_index", "v_proj.basis"} <= set(state) and "v_proj.res_index" not in state


def test_a_transposed_weight_steps_as_the_plain_one() -> None:
    torch.manual_seed(0)
    start, layout = torch.randn(12, 6), MatrixLayout(rows=12, cols=6, rank=3, side="right")
    plain, transposed = nn.Parameter(start.clone()), nn.Parameter(start.mT.contiguous())
    optimizers = [
        LowRankOptimizer([{"params": [p], "rank": 3, "blocks": [[Block(layout=layout, transposed=flag).to_plain()]]}])
        for p, flag in ((plain, False), (transposed, True))
    ]
    for _ in range(4):
        grad = torch.randn(12, 6)
        plain.grad, transposed.grad = grad.clone(), grad.mT.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(transposed.detach().mT, plain.detach())


@pytest.mark.parametrize(("square_side", "shape"), [("right", (6, 6)), ("left", (6, 6))])
def test_the_side_of_square_matrices_is_a_choice(square_side: str, shape: tuple[int, int]) -> None:
    optimizer = create_optimizer(nn.ModuleList([nn.Linear(*shape)]), "galore", **OPTIONS, square_side=square_side)
    assert optimizer.param_groups[0]["blocks"][0][0]["layout"]["side"] == square_side


@pytest.mark.parametrize("window", [1, 2])
def test_an_expert_without_tokens_never_gets_the_coordinate_axes(window: int) -> None:
    """QR of zeros would give e_1 ... e_r: at the first fit, and from an empty sketch."""
    torch.manual_seed(0)
    model = Mixture()
    weight = model.experts.gate_up_proj
    optimizer = create_optimizer(
        model, "crosslore", **OPTIONS, projector="power", fit_window=window, refresh_stagger=False
    )
    for step in range(5):
        weight.grad = torch.randn_like(weight)
        weight.grad[2] = 0
        if step:
            weight.grad[1] = 0
        optimizer.step()
        basis = optimizer.state[weight]["basis"]
        assert not torch.equal(basis[2].abs(), torch.eye(6, 3)) and not torch.equal(basis[1].abs(), torch.eye(6, 3))
        torch.testing.assert_close(basis.mT @ basis, torch.eye(3).expand(4, 3, 3))


def test_two_layers_with_and_without_a_part_called_module_are_two() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "module": nn.ModuleDict({"fc": nn.Linear(8, 8)})})
    optimizer = create_optimizer(model, "galore", **OPTIONS)
    names = [n for g in optimizer.param_groups for n, b in zip(g["param_names"], g["blocks"], strict=True) if b]
    assert names == ["fc.weight", "module.fc.weight"]


def test_a_compiled_model_has_the_names_of_the_plain_one() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(8, 8)})
    optimizers = [create_optimizer(m, "galore", **OPTIONS) for m in (model, torch.compile(model))]
    assert optimizers[0].param_groups[0]["param_names"] == optimizers[1].param_groups[0]["param_names"]


def test_a_weight_that_is_computed_is_no_target() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))})
    optimizer = create_optimizer(model, "galore", **OPTIONS)
    assert sum(bool(b) for g in optimizer.param_groups for b in g["blocks"]) == 1


def test_a_residual_on_more_entries_than_int32_counts_is_refused() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"q_proj": nn.Linear(50_000, 50_000, bias=False)})
    with pytest.raises(ValueError, match="q_proj has 50000 x 50000 entries, the sparse residual counts up to 214748"):
        create_optimizer(model, **OPTIONS, cross_head_targets=None)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_the_experts_of_transformers_models_train_in_low_rank(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 4, "moe_intermediate_size": 24} if name == "Qwen3Moe" else {"num_local_experts": 4}
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, **experts, num_experts_per_tok=2)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    optimizer = create_optimizer(
        model, "crosslore", lr=1e-3, rank=4, scale=4.0, warmup_steps=1, refresh_every=2, residual_ratio=0.1
    )
    tokens, losses = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(0)), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    stacked = {n: p for n, p in model.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))}
    assert len(stacked) == 2 and all(optimizer.state[p]["basis"].dim() == 3 for p in stacked.values())


@pytest.mark.parametrize("preset", ["fira", "apollo", "apollo_mini"])
def test_stacked_matrices_have_a_limiter_each(preset: str) -> None:
    """A spike of one expert's norm damps that one alone."""
    torch.manual_seed(0)
    model = Mixture()
    weight = model.experts.down_proj
    others = [torch.randn_like(weight) for _ in range(4)]
    ends = []
    for spike in (1.0, 50.0):
        twin = copy.deepcopy(model)
        optimizer = create_optimizer(twin, preset, **{**OPTIONS, "rank": 1})
        for i, grad in enumerate(others):
            twin.experts.down_proj.grad = grad.clone()
            twin.experts.down_proj.grad[1] *= spike if i == 2 else 1.0
            optimizer.step()
        ends.append(twin.experts.down_proj.detach())
    changed = [not torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(*ends, strict=True)]
    assert changed == [False, True, False, False]


def test_a_window_is_not_lost_by_a_part_that_got_no_gradient_at_the_refresh() -> None:
    spans = [RowSpan(start=16 * i, length=16, stride=48) for i in range(3)]
    layout = MatrixLayout(rows=16, cols=12, rank=4, side="right")
    blocks = [Block(layout=layout, key=f"part{i}.", span=span).to_plain() for i, span in enumerate(spans)]
    weight = torch.nn.Parameter(torch.zeros(48, 12))
    group = {"params": [weight], "rank": 4, "blocks": [blocks]}
    config = LowRankConfig(rank=4, projector="power", fit_window=2, refresh_every=4)
    optimizer = LowRankOptimizer([group], lr=1e-3, config=config)
    for t in range(1, 6):
        weight.grad = torch.randn(48, 12, generator=torch.Generator().manual_seed(t))
        if t == 5:
            weight.grad[:16] = 0
            before = optimizer.state[weight]["part0.basis"].clone()
            assert optimizer.state[weight]["part0.sketch"].any()
        optimizer.step()
    assert not optimizer.state[weight]["part0.sketch"].any()
    assert not torch.equal(optimizer.state[weight]["part0.basis"], before)
