"""What a step allocates beside its state, in units of one gradient."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from crosslore import PRESETS, LowRankConfig, LowRankOptimizer, MatrixLayout
from crosslore.layout import Block, RowSpan
from crosslore.memory import state_bytes

ROWS, COLS, RANK = 512, 384, 4
# The presets whose refresh is an exact SVD: LAPACK's work space is theirs, not ours.
SVD = {"galore", "fira"}


class Peak(TorchDispatchMode):
    """Counts the bytes of new results that are alive at once, by storage; `known` ones were there before."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key and key not in self.alive and key not in self.known:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(tensor, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def peaks(preset: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, **options: object) -> list[float]:
    """The peak of steps 2 to 7, over one gradient's bytes; pieces are small against the weight, as in a real model."""
    for name in ("rules.base", "rules.adamw8bit", "residuals.sparse", "residuals.norm_scaled", "kernels.rounding"):
        monkeypatch.setattr(f"crosslore.{name}.PIECE", 4096)
    monkeypatch.setattr("crosslore.kernels.reference.CHUNK_ELEMENTS", 4096)
    chosen = PRESETS[preset]
    config = replace(chosen.config, **{"rank": min(RANK, chosen.config.rank), "refresh_every": 1, **options})
    if config.residual == "sparse":
        config = replace(config, warmup_steps=3, residual_ratio=0.002)
    weight = nn.Parameter(torch.randn(ROWS, COLS).to(dtype))
    optimizer = LowRankOptimizer([{"params": [weight], "rank": config.rank}], lr=1e-2, config=config)
    found = []
    for _ in range(7):
        weight.grad = torch.randn(ROWS, COLS).to(dtype)
        known = [weight, weight.grad, *optimizer.state[weight].values()]
        with Peak(*known) as mode:
            optimizer.step()
        found.append(mode.peak / weight.grad.nbytes)
    return found[1:]


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - SVD))
def test_a_step_with_a_refresh_takes_one_gradient_sized_buffer_at_most(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert max(peaks(preset, torch.float32, monkeypatch)) <= 1.1


@pytest.mark.parametrize("preset", ["galore", "crosslore", "crosslore_plus", "apollo", "fira", "golore"])
def test_a_step_without_one_takes_almost_nothing(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compact tensors only: at rank 4 they are a hundredth of the weight."""
    assert max(peaks(preset, torch.float32, monkeypatch, refresh_every=100)) <= 0.25


@pytest.mark.parametrize("preset", ["crosslore", "crosslore_plus"])
def test_choosing_the_kept_positions_takes_no_matrix_of_the_weights_size(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third step ends the warm-up."""
    found = peaks(preset, torch.float32, monkeypatch, refresh_every=100)
    assert found[1] <= 0.25


@pytest.mark.parametrize("rule", ["adamw", "adamw8bit", "adagrad", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_at_full_rank_is_stepped_piece_by_piece(
    rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rule == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra bnb)")
    for name in ("rules.base", "rules.adamw8bit"):
        monkeypatch.setattr(f"crosslore.{name}.PIECE", 4096)
    weight = nn.Parameter(torch.randn(ROWS, COLS).to(dtype))
    optimizer = LowRankOptimizer([{"params": [weight], "rule": rule}], lr=1e-2)
    for step in range(3):
        weight.grad = torch.randn(ROWS, COLS).to(dtype)
        with Peak(weight, weight.grad, *optimizer.state[weight].values()) as mode:
            optimizer.step()
        assert step == 0 or mode.peak <= 0.3 * weight.grad.nbytes


@pytest.mark.parametrize("preset", ["crosslore", "galore", "apollo"])
def test_stochastic_rounding_takes_one_fp32_scratch(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bf16 gradients, the second half of it in pieces."""
    found = peaks(preset, torch.bfloat16, monkeypatch, refresh_every=100, stochastic_rounding=True)
    assert max(found) <= 3.5


def test_crosslore_takes_less_than_galore_and_twelve_bytes_for_each_kept_position() -> None:
    """Square 4096 x 4096 weights, as a 7B model's query: only the residual is added."""
    weights = [nn.Parameter(torch.empty(1024, 1024, device="meta")) for _ in range(2)]
    plain, residual = (
        LowRankOptimizer([{"params": [w], "rank": 128}], lr=1e-2, config=PRESETS[preset].config)
        for w, preset in zip(weights, ("galore", "crosslore"), strict=True)
    )
    assert state_bytes(residual) <= state_bytes(plain) + 12 * round(0.012 * 1024 * 1024)


def test_the_exact_basis_holds_no_view_of_a_larger_matrix() -> None:
    """In galore-torch the basis is a view that keeps the whole of U or V alive."""
    weight = nn.Parameter(torch.randn(64, 64))
    optimizer = LowRankOptimizer([{"params": [weight], "rank": 4, "projector": "svd"}], lr=1e-2)
    weight.grad = torch.randn(64, 64)
    optimizer.step()
    basis = optimizer.state[weight]["basis"]
    assert basis.untyped_storage().nbytes() == 4 * 64 * basis.element_size()


def test_copies_of_interleaved_parts_are_not_alive_together() -> None:
    layout = MatrixLayout(rows=ROWS // 2, cols=COLS, rank=RANK, side="right")
    spans = [RowSpan(start=16 * i, length=16, stride=32) for i in range(2)]
    blocks = [Block(layout=layout, key=f"part{i}.", span=span).to_plain() for i, span in enumerate(spans)]
    weights = [nn.Parameter(torch.randn(ROWS, COLS)) for _ in range(6)]
    group = {"params": weights, "rank": RANK, "blocks": [blocks] * 6}
    optimizer = LowRankOptimizer([group], lr=1e-2, config=LowRankConfig(rank=RANK), foreach=True)
    for step in range(2):
        for weight in weights:
            weight.grad = torch.randn(ROWS, COLS)
        known = [t for w in weights for t in (w, w.grad, *optimizer.state[w].values())]
        with Peak(*known) as mode:
            optimizer.step()
        assert step == 0 or mode.peak <= 1.3 * weights[0].nbytes
