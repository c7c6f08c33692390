"""Telemetry against what it says it is, in every mode; and that it is nothing while it is off."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from crosslore import create_optimizer
from crosslore.compact.factors import PIECE, GradientFactors
from crosslore.optimizer import LowRankOptimizer
from crosslore.telemetry import Telemetry

from .models import loss_of, tiny_decoder, train

MODES = {
    "full": {},
    "foreach": {"foreach": True},
    "layerwise": {"layerwise": True},
    "compact": {"gradients": "compact"},
    "compact-layerwise": {"gradients": "compact-layerwise"},
    "deferred": {"gradients": "compact", "weights": "deferred"},
}


def build(seed: int = 0, **options: object) -> tuple[torch.nn.Module, LowRankOptimizer]:
    model = tiny_decoder(seed)
    chosen = {"lr": 1e-3, "rank": 4, "refresh_every": 4, "refresh_stagger": False, "residual_ratio": 0.1,
              "warmup_steps": 1, **options}  # fmt: skip
    return model, create_optimizer(model, "crosslore", **chosen)


def true_errors(model: torch.nn.Module, optimizer: LowRankOptimizer, step: int) -> dict[str, float]:
    """|G - P P^T G| / |G| of every low-rank weight, for the batch of a step and the bases in use."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, weight in enumerate(group["params"]):
            for block in optimizer.item(g, i).blocks:
                (grad,) = torch.autograd.grad(loss_of(model, step), weight)
                basis = optimizer.state[weight]["basis"].double()
                grad = grad.double() if block.layout.side == "left" else grad.double().mT
                lost = grad - basis @ (basis.mT @ grad)
                found[names[id(weight)].removesuffix(".weight")] = float(lost.norm() / grad.norm())
    return found


@pytest.mark.parametrize("mode", MODES)
def test_the_error_of_every_weight_is_what_its_basis_misses_of_the_gradient(mode: str) -> None:
    model, optimizer = build(**MODES[mode])
    telemetry = Telemetry(optimizer, every=3, per_layer=True)
    train(model, optimizer, range(2))
    telemetry.take_logs()
    expected = true_errors(model, optimizer, step=2)  # of weights and bases as step 3 finds them
    train(model, optimizer, range(2, 3))
    logs = telemetry.take_logs()
    errors = {key.removeprefix("crosslore/subspace_error/"): v for key, v in logs.items() if "error/" in key}
    assert errors.keys() == expected.keys() and len(errors) == 6
    for name, value in errors.items():
        assert value == pytest.approx(expected[name], rel=1e-4), name
    assert 0.1 < min(errors.values()) and max(errors.values()) < 1
    assert logs["crosslore/subspace_error"] == pytest.approx(sum(errors.values()) / 6)
    assert logs["crosslore/subspace_error_max"] == max(errors.values())


@pytest.mark.parametrize("mode", MODES)
def test_looking_changes_no_bit_of_the_training(mode: str) -> None:
    (one, optimizer_one), (other, optimizer_other) = build(**MODES[mode]), build(**MODES[mode])
    Telemetry(optimizer_one, every=1)
    assert train(one, optimizer_one, range(6)) == train(other, optimizer_other, range(6))
    optimizer_one.merge()
    optimizer_other.merge()
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", ["full", "compact", "compact-layerwise"])
def test_refreshes_are_counted_timed_and_looked_at(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(float(n) for n in range(1000))
    monkeypatch.setattr("crosslore.telemetry.time.perf_counter", lambda: next(ticks))
    model, optimizer = build(**MODES[mode])
    telemetry = Telemetry(optimizer, every=100)
    train(model, optimizer, range(1))
    logs = telemetry.take_logs()
    assert (logs["crosslore/refreshes"], logs["crosslore/refresh_seconds"]) == (6, 6.0)
    fresh = errors_at_first_refresh()
    assert logs["crosslore/refresh_error"] == pytest.approx(sum(fresh) / len(fresh), rel=1e-4)
    assert "crosslore/subspace_error" not in logs
    train(model, optimizer, range(1, 4))
    assert telemetry.take_logs() == {}
    train(model, optimizer, range(4, 5))
    assert telemetry.take_logs()["crosslore/refreshes"] == 6
    summary = telemetry.summary()
    assert (summary["refreshes"], summary["refresh_seconds"], summary["looks"]) == (12, 12.0, 0)


def errors_at_first_refresh() -> list[float]:
    """Errors of the first step's gradients under the bases that were fitted to them; the weights stay as they were."""
    model, optimizer = build(lr=0.0)
    train(model, optimizer, range(1))
    return list(true_errors(model, optimizer, step=0).values())


def test_the_norm_of_the_residual_is_that_of_what_it_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of SGD from one state: with the residual and without it."""
    model, optimizer = build(refresh_every=100)
    telemetry = Telemetry(optimizer, every=3)
    train(model, optimizer, range(2))
    copied = copy.deepcopy(model)
    bare = create_optimizer(copied, "crosslore", lr=1e-3, rank=4, refresh_every=100, refresh_stagger=False,
                            residual_ratio=0.1, warmup_steps=1)  # fmt: skip
    bare.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    monkeypatch.setattr("crosslore.residuals.sparse.SparseResidual.apply_", lambda *_: None)
    train(copied, bare, range(2, 3))
    monkeypatch.undo()
    train(model, optimizer, range(2, 3))
    pairs = zip(model.parameters(), copied.parameters(), strict=True)
    expected = math.sqrt(sum(float((ours - theirs).detach().double().square().sum()) for ours, theirs in pairs))
    assert expected > 0
    assert telemetry.take_logs()["crosslore/residual_norm"] == pytest.approx(expected, rel=1e-3)


def test_skipped_weights_are_counted_and_their_errors_left_out() -> None:
    model, optimizer = build()
    telemetry = Telemetry(optimizer, every=2, per_layer=True)
    train(model, optimizer, range(1))
    optimizer.zero_grad()
    loss_of(model).backward()
    model.up_proj.weight.grad[0, 0] = float("nan")
    optimizer.step()
    logs = telemetry.take_logs()
    assert logs["crosslore/skipped"] == 1 and telemetry.summary()["skipped"] == 1
    assert "crosslore/subspace_error/up_proj" not in logs
    assert math.isfinite(logs["crosslore/subspace_error"])


def test_the_summary_is_over_all_looks() -> None:
    model, optimizer = build()
    telemetry = Telemetry(optimizer, every=2)
    assert telemetry.summary()["subspace_error"] is None
    means, largest = [], []
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        logs = telemetry.take_logs()
        if "crosslore/subspace_error" in logs:
            means.append(logs["crosslore/subspace_error"])
            largest.append(logs["crosslore/subspace_error_max"])
    found = telemetry.summary()
    assert found["looks"] == len(means) == 3 and len(set(means)) == 3
    assert found["subspace_error"] == pytest.approx(sum(means) / 3) and found["subspace_error_max"] == max(largest)


def test_without_an_orthonormal_basis_there_is_no_subspace_error() -> None:
    model = tiny_decoder()
    optimizer = create_optimizer(model, "apollo", lr=1e-3, rank=4)
    telemetry = Telemetry(optimizer, every=1)
    train(model, optimizer, range(2))
    assert not any("error" in key for key in telemetry.take_logs())


@pytest.mark.parametrize("mode", MODES)
def test_nothing_looks_by_default(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No observer, and none of what one would need is computed."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("computed for nobody")

    for name in ("crosslore.compact.factors.GradientFactors.norm_squared", "crosslore.stepping.all_refreshing",
                 "crosslore.telemetry.norm_squared"):  # fmt: skip
        monkeypatch.setattr(name, fail)
    model, optimizer = build(**MODES[mode])
    assert optimizer.observers == []
    train(model, optimizer, range(3))
    Telemetry(optimizer)
    with pytest.raises(AssertionError, match="for nobody"):  # the same would be seen
        train(model, optimizer, range(3, 6))


def test_steps_between_looks_compute_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build(gradients="compact", refresh_every=100)
    telemetry = Telemetry(optimizer, every=4)
    train(model, optimizer, range(1))
    calls: list[int] = []
    original = GradientFactors.norm_squared
    monkeypatch.setattr(GradientFactors, "norm_squared", lambda self: (calls.append(telemetry.step), original(self))[1])
    train(model, optimizer, range(1, 5))
    assert calls == [3] * 6


def test_after_detaching_and_in_a_copy_nobody_looks() -> None:
    model, optimizer = build()
    telemetry = Telemetry(optimizer, every=1)
    assert copy.deepcopy(optimizer).observers == []
    telemetry.detach()
    train(model, optimizer, range(1))
    assert optimizer.observers == [] and telemetry.take_logs() == {} and telemetry.step == 0


def test_options_are_checked() -> None:
    _, optimizer = build()
    with pytest.raises(ValueError, match="every must be an integer >= 1, got 0"):
        Telemetry(optimizer, every=0)
    with pytest.raises(TypeError, match="Telemetry takes a LowRankOptimizer, got SGD"):
        Telemetry(torch.optim.SGD([torch.zeros(1, requires_grad=True)]))
    assert optimizer.observers == []


@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
@pytest.mark.parametrize("piece", [1, 50, PIECE])
def test_the_norm_of_a_gradient_comes_from_its_factors(
    tokens: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crosslore.compact.factors.PIECE", piece)
    outputs, inputs = torch.randn(tokens, 12), torch.randn(tokens, 20)
    expected = (outputs.double().mT @ inputs.double()).square().sum()
    found = GradientFactors(outputs=outputs, inputs=inputs).norm_squared()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_the_norm_of_a_large_gradient_needs_no_tensor_of_the_weights_size() -> None:
    rows, cols, largest = 1024, 1024, 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN202
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    for tokens in (64, 1024):
        factors = GradientFactors(outputs=torch.randn(tokens, rows), inputs=torch.randn(tokens, cols))
        with pytest.MonkeyPatch.context() as patch, Sizes():
            patch.setattr("crosslore.compact.factors.PIECE", 1 << 14)
            factors.norm_squared()
        assert largest <= tokens * max(rows, cols) if tokens == 1024 else largest <= tokens * rows


def test_the_torch_part_needs_no_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; import crosslore.telemetry as t; t.Telemetry\n"
        "try: t.TelemetryCallback\n"
        "except ImportError as error: assert 'pip install transformers' in str(error)\n"
        "else: raise SystemExit('no error')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
