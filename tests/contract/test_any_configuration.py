"""Configurations that nobody wrote down: drawn by hypothesis, they train and resume, or are refused with a reason."""

import io

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from crosslore import LowRankConfig, LowRankOptimizer
from crosslore.registry import REGISTRY

configurations = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 6),
        "scale": st.sampled_from([0.25, 1.0, 8.0]),
        "refresh_every": st.integers(1, 5),
        "refresh_phase": st.integers(-1, 3),
        "refresh_stagger": st.booleans(),
        "projector": st.sampled_from(sorted(set(REGISTRY["projector"]) - {"cross_head"})),
        "oversampling": st.integers(0, 4),
        "power_iterations": st.integers(0, 2),
        "fit_window": st.integers(1, 3),
        "fit_momentum": st.sampled_from([0.0, 0.5, 1.0]),
        "random_after": st.sampled_from([None, 0, 3]),
        "square_side": st.sampled_from(["right", "left"]),
        "basis_dtype": st.sampled_from(["weight", "float32"]),
        "moments": st.sampled_from(sorted(REGISTRY["moments"])),
        "residual": st.sampled_from([None, *sorted(REGISTRY["residual"])]),
        "residual_ratio": st.sampled_from([0.0, 0.01, 0.5, 1.0]),
        "residual_rule": st.sampled_from(["guarded", "paper", "exact"]),
        "residual_select": st.sampled_from(["moment", "residual"]),
        "warmup_steps": st.integers(0, 4),
        "norm_granularity": st.sampled_from(["channel", "tensor"]),
        "rule": st.sampled_from(sorted(REGISTRY["rule"])),
        "eps_placement": st.sampled_from(["corrected", "uncorrected"]),
        "decay_order": st.sampled_from(["before", "after"]),
        "stochastic_rounding": st.booleans(),
    }
)


def mostly_valid(options: dict) -> dict:
    """Take out the combinations whose refusal is tested elsewhere, so that most draws train."""
    if options["residual"] not in (None, "sparse"):
        options["residual_ratio"] = 0.0
    if options["projector"] not in ("power", "randomized"):
        options["fit_window"] = 1
    return options


shapes = st.sampled_from([(6, 6), (12, 7), (7, 12), (6, 40)])


def train(weights: list[nn.Parameter], optimizer: LowRankOptimizer, steps: range) -> None:
    for step in steps:
        draws = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=draws).to(weight.dtype)
        optimizer.step()


def trains_and_resumes(config: LowRankConfig, shape: tuple[int, int], dtype: torch.dtype) -> None:
    def build() -> tuple[list[nn.Parameter], LowRankOptimizer]:
        draws = torch.Generator().manual_seed(7)
        weights = [nn.Parameter(torch.randn(shape, generator=draws).to(dtype)) for _ in range(2)]
        group = {"params": weights, "rank": config.rank}
        return weights, LowRankOptimizer([group], lr=1e-2, weight_decay=0.1, config=config)

    weights, optimizer = build()
    train(weights, optimizer, range(4))
    others, fresh = build()
    for mine, other in zip(weights, others, strict=True):
        other.data.copy_(mine)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    train(weights, optimizer, range(4, 9))
    train(others, fresh, range(4, 9))
    for mine, other in zip(weights, others, strict=True):
        assert mine.isfinite().all() and torch.equal(mine, other)


def test_it_trains_finitely_and_resumes_bitwise_or_is_refused_with_the_options_name() -> None:
    accepted = []

    @settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(options=configurations.map(mostly_valid), shape=shapes, bf16=st.booleans())
    def check(options: dict, shape: tuple[int, int], bf16: bool) -> None:
        try:
            config = LowRankConfig(**options)
        except ValueError as error:
            assert any(name in str(error) for name in options)
            return
        accepted.append(config)
        trains_and_resumes(config, shape, torch.bfloat16 if bf16 else torch.float32)

    check()
    assert len(accepted) >= 150  # else this would test refusals only
    assert {c.residual for c in accepted} >= {None, "sparse", "error_feedback", "norm_scaled"}
