"""The preset `galore` against the package galore-torch."""

import pytest
import torch

from crosslore import PRESETS
from crosslore.optimizer import LowRankOptimizer

from .samples import SHAPES, gradients, normal

galore_adamw = pytest.importorskip("galore_torch.adamw", reason="galore-torch is not installed (extra dev)")


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_galore_equals_the_package_galore_torch(rows: int, cols: int, weight_decay: float) -> None:
    """Seven steps across two refreshes (T = 3), error at most 1e-6 in fp32."""
    preset = PRESETS["galore"]
    start = 0.1 * normal(rows, cols, seed=1).float()  # of a real weight's size, so that 1e-6 is well above fp32 noise
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"lr": 1e-2, "weight_decay": weight_decay}
    mine = LowRankOptimizer(
        [{"params": [ours], "rank": 4, "refresh_every": 3}], betas=preset.betas, eps=preset.eps, **options,
        config=preset.config,
    )  # fmt: skip
    group = {"params": [theirs], "rank": 4, "update_proj_gap": 3, "scale": preset.config.scale, "proj_type": "std"}
    package = galore_adamw.AdamW([group], **options, no_deprecation_warning=True)
    for grad in gradients(rows, cols, 7):
        ours.grad, theirs.grad = grad.float(), grad.float()
        mine.step()
        package.step()
        assert (ours - theirs).abs().max() <= 1e-6
    assert (ours - start).abs().max() > 1e-3
