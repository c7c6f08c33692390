"""What every registered update rule must do."""

import subprocess
import sys

import pytest
import torch
from tests.unit.models import tiny_decoder, train

from crosslore import create_optimizer
from crosslore.config import Hyper
from crosslore.registry import REGISTRY, build_rule

HP = Hyper(lr=1e-2, scale=1.0, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8)
RULES = sorted(REGISTRY["rule"])


def rule_of(name: str):
    if name.endswith("8bit"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra bnb)")
    return build_rule(name, eps_placement="corrected")


def twin(name: str, p: torch.nn.Parameter) -> torch.optim.Optimizer:
    """The optimizer of torch or transformers that a rule follows at full rank."""
    if name == "adagrad":
        return torch.optim.Adagrad([p], lr=1.0, eps=HP.eps)
    if name == "sgd":
        return torch.optim.SGD([p], lr=1.0, momentum=HP.betas[0])
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor([p], lr=1.0, scale_parameter=False, relative_step=False)
    return torch.optim.AdamW([p], lr=1.0, betas=HP.betas, weight_decay=0.0)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(3,), (8, 5), (80, 70), (2, 3, 4)])
def test_updates_follow_the_known_optimizer(name: str, shape: tuple[int, ...]) -> None:
    """Exactly for fp32 moments; within the quantiser's few percent for 8-bit ones."""
    if name == "adafactor" and len(shape) == 3:
        pytest.skip("transformers takes the mean of the row statistics over all stacked matrices, we over each one's")
    rule, p = rule_of(name), torch.nn.Parameter(torch.zeros(shape))
    optimizer, state = twin(name, p), {}
    for t in range(1, 6):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(t)) + 1
        state = state or rule.init(grad)
        p.grad, before = grad.clone(), p.detach().clone()
        optimizer.step()
        update = rule.update(grad, state, t, HP)
        tolerance = 0.05 if name.endswith("8bit") else 1e-5
        assert update.dtype == torch.float32
        assert ((before - p.detach()) - update).norm() <= tolerance * update.norm()


@pytest.mark.parametrize("name", [name for name in RULES if "adamw" in name])
def test_moments_are_what_adam_keeps(name: str) -> None:
    rule, grad = rule_of(name), torch.randn(80, 70, generator=torch.Generator().manual_seed(0))
    state = rule.init(grad)
    rule.update(grad, state, 1, HP)
    torch.testing.assert_close(rule.first_moment(state), 0.1 * grad, rtol=0.1, atol=1e-3)
    torch.testing.assert_close(rule.second_moment(state), 0.01 * grad * grad, rtol=0.2, atol=1e-3)


@pytest.mark.parametrize("name", RULES)
def test_stored_moments_come_back(name: str) -> None:
    """A moment policy loads them, changes them and stores them; what a rule lacks is None on both ways."""
    rule, grad = rule_of(name), torch.rand(80, 70, generator=torch.Generator().manual_seed(0)) + 0.5
    state = rule.init(grad)
    rule.update(grad, state, 1, HP)
    doubled = tuple(None if m is None else 2 * m for m in rule.load(state))
    rule.store_(state, *doubled)
    for asked, found in zip(doubled, rule.load(state), strict=True):
        if asked is not None:
            torch.testing.assert_close(found, asked, rtol=0.1, atol=1e-4)
    assert all(isinstance(value, torch.Tensor) for value in state.values())


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_weight_stepped_in_pieces_equals_one_stepped_whole(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for piece in (1 << 20, 512):
        monkeypatch.setattr("crosslore.rules.base.PIECE", piece)
        monkeypatch.setattr("crosslore.rules.adamw8bit.PIECE", piece)
        rule, weight = rule_of(name), torch.zeros(70, 80, dtype=dtype)
        state = rule.init(weight)
        for t in range(1, 4):
            grad = torch.randn(70, 80, generator=torch.Generator().manual_seed(t)).to(dtype)
            rule.step_weight_(weight, grad, state, t, HP)
        results.append(weight)
    assert results[0].any() and torch.equal(*results)


def test_8bit_moments_take_a_quarter_of_the_memory_and_small_ones_stay_fp32() -> None:
    rule = rule_of("adamw8bit")
    large, small = rule.init(torch.zeros(128, 64)), rule.init(torch.zeros(8, 8))
    assert large["exp_avg"].dtype == torch.uint8 and small["exp_avg"].dtype == torch.float32
    held = sum(v.numel() * v.element_size() for v in large.values())
    assert held == 2 * (128 * 64 + 4 * 128 * 64 // 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8bit_training_resumes_bitwise(dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra bnb)")
    options = {"lr": 1e-3, "rank": 32, "rule": "adamw8bit", "warmup_steps": 1, "residual_ratio": 0.1}
    models = [tiny_decoder(width=128).to(dtype) for _ in range(2)]
    first, second = (create_optimizer(m, **options) for m in models)
    train(models[0], first, range(3))
    assert first.state[models[0].up_proj.weight]["exp_avg"].dtype == torch.uint8
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(first.state_dict())
    assert train(models[0], first, range(3, 6)) == train(models[1], second, range(3, 6))


def test_the_kernel_of_paged_moments_gives_the_same_update() -> None:
    """On a GPU paged moments are advanced by bitsandbytes' own kernel; it runs on a CPU too."""
    rule, plain = rule_of("paged_adamw8bit"), rule_of("adamw8bit")
    states = [r.init(torch.zeros(80, 70)) for r in (rule, plain)]
    for t in range(1, 6):
        grad = torch.randn(80, 70, generator=torch.Generator().manual_seed(t)) + 1
        theirs = rule.update_by_bitsandbytes(grad, states[0], t, HP)
        ours = plain.update(grad, states[1], t, HP)
        assert (ours - theirs).norm() <= 0.02 * ours.norm()


def test_8bit_moments_of_fp64_weights_work() -> None:
    rule, grad = rule_of("adamw8bit"), torch.randn(80, 70, dtype=torch.float64)
    assert rule.update(grad, rule.init(grad), 1, HP).isfinite().all()


def test_a_missing_bitsandbytes_names_the_line_that_installs_it() -> None:
    code = (
        "import sys; sys.modules['bitsandbytes'] = None; import torch; from crosslore import LowRankOptimizer; "
        "p = torch.nn.Parameter(torch.ones(3)); o = LowRankOptimizer([{'params': [p], 'rule': 'adamw8bit'}]); "
        "p.grad = torch.ones(3); o.step()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "crosslore[bnb]"' in result.stderr


def test_importing_the_package_loads_torch_and_nothing_heavier() -> None:
    code = "import sys, crosslore; print(sorted({'transformers', 'llamafactory', 'bitsandbytes'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_entries_that_rest_between_gradients_keep_a_bounded_update(name: str) -> None:
    """Rows of an embedding, entries of very different size: a second moment rounded to 0 would divide by eps."""
    rule = rule_of(name)
    size = torch.where(torch.arange(64 * 256).view(64, 256) % 2 == 0, 1.0, 1e-4)
    state = rule.init(size)
    for t in range(1, 10):
        grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(t)).sign() * size * (t % 3 == 1)
        assert rule.update(grad, state, t, HP).abs().max() < 1.5


def test_small_entries_of_a_block_move_as_far_as_large_ones_in_8_bits() -> None:
    rule = rule_of("adamw8bit")
    grad = torch.randn(64, 250, generator=torch.Generator().manual_seed(0)).sign()  # no whole number of blocks
    grad[:, 1::2] *= 1e-3
    state = rule.init(grad)
    for t in range(1, 11):
        update = rule.update(grad, state, t, HP).abs()
    assert update[:, ::2].mean() == pytest.approx(1, abs=0.02)
    assert update[:, 1::2].mean() == pytest.approx(1, abs=0.2)  # 1e-6 of the block's largest square: coarse codes


@pytest.mark.parametrize("signed", [True, False])
def test_codes_on_a_cpu_are_the_nearest_or_beside_it(signed: bool) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra bnb)")
    from crosslore.rules.adamw8bit import BLOCK_SIZE, _code, quantise

    draws = torch.Generator().manual_seed(0)
    values = torch.randn(70, 71, generator=draws) * 10.0 ** torch.randint(-7, 1, (70, 71), generator=draws)
    values = values if signed else values.abs()
    values[:4] = 0
    code = _code(signed, values.device)
    codes, scale = quantise(values, code)
    assert codes.shape == values.shape
    scales = scale.clamp_min(1e-30).repeat_interleave(BLOCK_SIZE)[: values.numel()].view(values.shape)
    nearest = (values[..., None] / scales[..., None] - code).abs().argmin(-1)
    gap = (codes.int() - nearest).abs()[4:]
    assert gap.max() <= 1 and (gap > 0).float().mean() < 0.02
    tiny = (values.abs() < 1e-4 * scales)[4:]
    assert tiny.any() and not gap[tiny].any()
