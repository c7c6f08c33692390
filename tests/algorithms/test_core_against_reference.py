"""The optimizer held against the float64 reference, step by step, on float64 weights and on fp32 ones."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crosslore.config import LowRankConfig
from crosslore.layout import Block, MatrixLayout, shorter_side
from crosslore.optimizer import LowRankOptimizer
from crosslore.projectors.cross_head import drawn
from crosslore.refresh import draw_generator
from crosslore.residuals.sparse import PAPER_FLOOR

from . import reference as ref
from .samples import gradients, normal

NAME = "attn.q_proj.weight"
LR = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}


def optimizer_for(weight: Tensor, block: Block, config: LowRankConfig, **options: object) -> LowRankOptimizer:
    p = torch.nn.Parameter(weight.clone())
    group = {"params": [(NAME, p)], "blocks": [[block.to_plain()]]}
    return LowRankOptimizer([group], config=config, **{**LR, **options})


def reference_basis(opt: LowRankOptimizer, block: Block, config: LowRankConfig):
    """Return what the reference calls at a refresh: its own SVD basis, of the heads that the seed draws."""
    layout, p = block.layout, opt.param_groups[0]["params"][0]

    def basis(G: Tensor, t: int) -> Tensor:
        if block.cross_head:
            heads = drawn(layout, draw_generator(config.seed, NAME, (t - 1) // config.refresh_every))
            P = ref.cross_head_basis(G, layout.head_width, layout.heads, layout.rank, heads)
        else:
            P = ref.svd_basis(G, layout.rank)
        return ref.align_signs(P, opt.state[p]["basis"])

    return basis


def run_both(weight: Tensor, grads: list[Tensor], block: Block, config: LowRankConfig, **options: object):
    """Yield (step, our weight, the reference's weight, both objects) after each step."""
    opt = optimizer_for(weight, block, config, **options)
    p = opt.param_groups[0]["params"][0]

    def floor(radicand: Tensor) -> Tensor:
        paper, b2 = model.paper, LR["betas"][1]
        guarded = ((paper.P * paper.P) @ paper.V)[paper.L].mean() * PAPER_FLOOR / (1 - b2**paper.t)
        return torch.maximum(radicand, guarded)

    model = ref.LinearReference(
        weight, side=block.layout.side, basis=reference_basis(opt, block, config), scale=config.scale,
        refresh_every=config.refresh_every, residual_rule=config.residual_rule if block.residual else None,
        residual_ratio=config.residual_ratio, residual_select=config.residual_select,
        warmup_steps=config.warmup_steps, placement=config.eps_placement, decay=config.decay_order, floor=floor,
        **{**LR, **options},
    )  # fmt: skip
    for t, grad in enumerate(grads, start=1):
        p.grad = grad.to(p.dtype)
        opt.step()
        yield t, p.detach(), model.step(grad), opt, model


CONFIG = LowRankConfig(
    rank=4, scale=0.5, refresh_every=4, projector="svd", residual="sparse", residual_ratio=0.1, warmup_steps=3
)
PLAIN = [(24, 40), (40, 24), (32, 32)]


def block_for(rows: int, cols: int, rank: int, **options: object) -> Block:
    return Block(layout=MatrixLayout(rows=rows, cols=cols, rank=rank, side=shorter_side(rows, cols)), **options)


@pytest.mark.parametrize("warmup", [0, 1, 3, 5])
@pytest.mark.parametrize("select", ["moment", "residual"])
@pytest.mark.parametrize("rule", ["guarded", "paper", "exact"])
@pytest.mark.parametrize(("rows", "cols"), PLAIN)
def test_every_residual_rule_follows_the_reference(rows: int, cols: int, rule: str, select: str, warmup: int) -> None:
    """Both sides, across two refreshes (T = 4, 10 steps) and the end of the warm-up."""
    config = replace(CONFIG, residual_rule=rule, residual_select=select, warmup_steps=warmup)
    block = block_for(rows, cols, 4, residual=True)
    path = run_both(normal(rows, cols, seed=7), gradients(rows, cols, 10), block, config)
    for t, ours, theirs, opt, model in path:  # noqa: B007 (looked at after the last step)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda m, t=t: f"step {t}: {m}")
    state = next(iter(opt.state.values()))
    assert torch.equal(state["res_index"].long(), model.kept.flatten().nonzero().flatten())
    if rule != "paper" or select == "moment":
        assert model.paper.delta.abs().max() > 0


@pytest.mark.parametrize(
    ("heads", "width", "rank"),
    [(8, 4, 4), (8, 4, 2), (2, 8, 8), (2, 8, 6), (8, 4, 6), (2, 8, 12), (1, 16, 5), (4, 6, 24)],
    ids=["r=d_k", "r<d_k", "gqa", "gqa r<d_k", "r>d_k", "gqa r>d_k", "one head", "all heads"],
)
@pytest.mark.parametrize("rule", ["guarded", "exact"])
def test_cross_head_sharing_follows_the_reference(heads: int, width: int, rank: int, rule: str) -> None:
    """The basis of the drawn heads is shared by all; keys with fewer rows than columns use the right side too."""
    rows, cols = heads * width, 32
    layout = MatrixLayout(rows=rows, cols=cols, rank=rank, side="right", heads=heads)
    config = replace(CONFIG, rank=rank, residual_rule=rule)
    block = Block(layout=layout, cross_head=True, residual=True)
    for _, ours, theirs, _, _ in run_both(normal(rows, cols, seed=3), gradients(rows, cols, 10), block, config):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("placement", "order"), [("uncorrected", "after"), ("corrected", "before")])
@pytest.mark.parametrize(("rows", "cols"), PLAIN)
def test_fp32_weights_follow_the_float64_reference(rows: int, cols: int, placement: str, order: str) -> None:
    """fp32 against float64 over 10 steps at a learning rate that moves every entry by about its own size."""
    config = replace(CONFIG, eps_placement=placement, decay_order=order, residual_rule="exact")
    block = block_for(rows, cols, 4, residual=True)
    weight = normal(rows, cols, seed=7).float()
    for _, ours, theirs, _, _ in run_both(weight, gradients(rows, cols, 10), block, config):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)  # |W| up to 4: 1e-6 is 2 fp32 ulp


def test_bf16_weights_stay_near_the_reference_for_a_few_steps() -> None:
    """bf16 rounds weight, gradient and basis to 3 digits: 5 x the default rtol of bf16 after 3 steps."""
    config, block = replace(CONFIG, residual_ratio=0.05, warmup_steps=1), block_for(40, 24, 4, residual=True)
    weight = normal(40, 24, seed=7).bfloat16()
    grads = [g.bfloat16().double() for g in gradients(40, 24, 3)]
    for _, ours, theirs, opt, _ in run_both(weight, grads, block, config):  # noqa: B007
        torch.testing.assert_close(ours.double(), theirs, rtol=5 * 1.6e-2, atol=2e-2)
    state = next(iter(opt.state.values()))
    assert ours.dtype == torch.bfloat16 and state["basis"].dtype == torch.bfloat16
    assert state["exp_avg"].dtype == state["res_avg"].dtype == torch.float32


def test_the_comparison_can_fail() -> None:
    """A wrong factor on the residual, by one percent, is seen."""
    block = block_for(24, 40, 4, residual=True)
    pairs = run_both(normal(24, 40, seed=7), gradients(24, 40, 10), block, CONFIG)
    for t, ours, theirs, _, model in pairs:
        if t == 6:
            wrong = theirs - 0.01 * LR["lr"] * CONFIG.scale * model.turn(model.paper.delta)
            with pytest.raises(AssertionError):
                torch.testing.assert_close(ours, wrong, rtol=1e-9, atol=1e-11)
