"""The same method on a GPU: its modes agree there, and an exact basis gives what the CPU gives."""

import copy
from typing import Any

import pytest
import torch
from tests.unit.test_compact import llama, options_of

from crosslore import create_optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODES: dict[str, dict[str, Any]] = {
    "layerwise": {"gradients": "layerwise"},
    "compact": {"gradients": "compact"},
    "compact-layerwise": {"gradients": "compact-layerwise"},
    "deferred": {"gradients": "compact", "weights": "deferred"},
    "loop": {"foreach": False},
}


def trained(
    method: str,
    *,
    steps: int = 22,
    parts: int = 1,
    batches: int = 1000,
    dtype: torch.dtype = torch.float64,
    device: str = "cuda",
    **more: Any,
) -> tuple[torch.nn.Module, torch.optim.Optimizer, list[float]]:
    """Train the small Llama of the other tests; return it, its optimizer and the losses."""
    model = llama(dtype=dtype).to(device)
    preset, options = options_of(method)
    if more.get("gradients") and parts > 1:
        more["accumulation_steps"] = parts
    optimizer = create_optimizer(model, preset, **{**options, **more})
    losses = []
    for step in range(steps):
        for part in range(parts):
            draws = torch.Generator().manual_seed((parts * step + part) % batches)
            ids = torch.randint(97, (4, 24), generator=draws).to(device)
            loss = model(input_ids=ids, labels=ids).loss / parts
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parts * loss.item())
    if optimizer.compact is not None:
        optimizer.merge()
    return model, optimizer, losses


def difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((x.detach().cpu() - y.detach().cpu()).norm() / x.detach().norm().cpu()) for x, y in pairs)


@pytest.mark.parametrize(
    "method", ["crosslore", "crosslore-exact", "crosslore-select", "plus", "plus-window", "galore"]
)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_whole_gradients(method: str, mode: str) -> None:
    assert difference(trained(method)[0], trained(method, **MODES[mode])[0]) < 1e-8


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_compact_gradients_wait_in_host_memory_and_are_the_same(parts: int) -> None:
    whole, compact = trained("crosslore", parts=parts)[0], trained("crosslore", parts=parts, gradients="compact")[0]
    assert difference(whole, compact) < 1e-8


def test_an_exact_basis_gives_what_the_cpu_gives() -> None:
    # Rotary embeddings are fp32 in transformers, and cosines of the two devices differ in the last place.
    assert difference(trained("galore", device="cpu")[0], trained("galore")[0]) < 1e-5


@pytest.mark.parametrize("mode", ["layerwise", "compact", "compact-layerwise", "deferred"])
@pytest.mark.parametrize("rule", ["adamw", "adamw8bit"])
def test_bf16_learns_as_fp32_does(mode: str, rule: str) -> None:
    options = {"rule": rule, "lr": 3e-3, "steps": 40, "batches": 2, **MODES[mode]}
    *_, narrow = trained("plus", dtype=torch.bfloat16, stochastic_rounding=True, **options)
    *_, wide = trained("plus", dtype=torch.float32, **options)
    assert wide[-1] < wide[0] - 0.5 and abs(narrow[-1] - wide[-1]) < 0.1 * (wide[0] - wide[-1])


@pytest.mark.parametrize("rule", ["adamw8bit", "paged_adamw8bit"])
def test_8bit_moments_follow_fp32_ones(rule: str) -> None:
    *_, whole = trained("plus", dtype=torch.float32, steps=30, batches=2, lr=3e-3)
    *_, short = trained("plus", dtype=torch.float32, steps=30, batches=2, lr=3e-3, rule=rule)
    assert whole[-1] < whole[0] - 0.5 and abs(short[-1] - whole[-1]) < 0.1 * (whole[0] - whole[-1])


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_bitwise_the_same(mode: str) -> None:
    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for step in numbers:
            ids = torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(step)).cuda()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    preset, options = options_of("crosslore-8bit")
    options |= MODES[mode]
    model = llama(dtype=torch.float32).cuda()
    optimizer = create_optimizer(model, preset, **options)
    steps(model, optimizer, range(9))
    saved = copy.deepcopy(optimizer.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    steps(model, optimizer, range(9, 16))
    other = llama(dtype=torch.float32).cuda()
    other.load_state_dict(saved[1])
    again = create_optimizer(other, preset, **options)
    again.load_state_dict(saved[0])
    steps(other, again, range(9, 16))
    for one in (optimizer, again):
        one.merge()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rule", ["adamw", "adamw8bit"])
def test_embeddings_in_rows_take_the_steps_of_the_whole(tied: bool, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosslore.compact.rows.AT_ONCE", {"cpu": 32 * 64, "cuda": 32 * 64})
    monkeypatch.setattr("crosslore.compact.rows.ROWS", 32)
    ends = []
    for mode in ("layerwise", "compact-layerwise"):
        model = llama(dtype=torch.float32, tie_word_embeddings=tied).cuda()
        optimizer = create_optimizer(model, "crosslore_plus", lr=1e-3, rank=8, rule=rule, gradients=mode)
        for step in range(3):
            ids = torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(step)).cuda()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        ends.append(model)
    assert difference(*ends) < (1e-4 if rule == "adamw" else 1e-3)


@pytest.mark.parametrize("mode", ["layerwise", "compact-layerwise"])
def test_layerwise_holds_one_gradient(mode: str) -> None:
    model = llama(dtype=torch.float32, hidden_size=512, intermediate_size=1024, num_hidden_layers=6).cuda()
    weights = sum(p.numel() * 4 for p in model.parameters())
    optimizer = create_optimizer(model, "crosslore_plus", lr=1e-4, rank=8, gradients=mode)
    ids = torch.randint(97, (1, 8)).cuda()
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.cuda.max_memory_allocated() - before < weights / 4
