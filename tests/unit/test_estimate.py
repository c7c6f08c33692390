"""`crosslore.estimate` against what models, optimizers and autograd hold; tiny random models."""

import contextlib
import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "crosslore[estimate]"')

from crosslore.estimate import (  # noqa: E402
    EstimateError,
    Estimator,
    Method,
    Setting,
    chosen_method,
    known_models,
    load_config,
    side_by_side,
)
from crosslore.estimate.activations import DecoderShape, activations  # noqa: E402
from crosslore.estimate.counting import adapter_weights  # noqa: E402
from crosslore.estimate.peak import largest  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 300,
    "tie_word_embeddings": False,
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPACT, LAYERWISE = chosen_method("crosslore", "compact", "direct"), chosen_method("crosslore", "layerwise", "direct")
BOTH = chosen_method("crosslore", "compact-layerwise", "direct")


def llama_config(**changes: object) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "use_cache": False, **changes})


def estimator(**changes: object) -> Estimator:
    return Estimator(llama_config(**changes))


@pytest.fixture(scope="module")
def check() -> Iterator[ModuleType]:
    """`benchmarks/estimate_check.py`."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("estimate_check")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("trained", ["all", "lora", "dora"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16 without autocast"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"num_key_value_heads": 4, "intermediate_size": 96, "hidden_size": 96}])
def test_activations_are_what_autograd_saves(
    trained: str, dtype: str, checkpointing: bool, sizes: dict[str, int], check: ModuleType
) -> None:
    config, rank, (batch, seq) = llama_config(**sizes), 4, (2, 32)
    dtype, cast = dtype.split()[0], dtype == "bf16"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(DTYPES[dtype]).train()
    autocast = contextlib.nullcontext()
    if trained != "all":
        peft = pytest.importorskip("peft", reason='needs peft: pip install "crosslore[llamafactory]"')
        options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "use_dora": trained == "dora"}
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, **options))
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=cast)
    if checkpointing:  # the reentrant kind saves what it keeps; the other one holds it in closures
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    tokens = torch.randint(config.vocab_size, (batch, seq))
    with autocast:
        measured = check.saved_bytes(model, lambda: model(input_ids=tokens, labels=tokens).loss)
    found = activations(
        DecoderShape.of(config), batch=batch, seq=seq, itemsize=DTYPES[dtype].itemsize, checkpointing=checkpointing,
        trained=trained, rank=rank, autocast=cast,
    )  # fmt: skip
    # The formula leaves out that the first layer's input has no gradient, and the input of a frozen model's checkpoint.
    exact = trained == "all" and not checkpointing
    assert found.saved == pytest.approx(measured, rel=1e-4 if exact else 0.05)


@pytest.mark.parametrize(
    ("method", "accumulation"),
    [
        (Method(name="AdamW", rule="adamw"), 1),
        (Method(name="LoRA", trained="lora"), 1),
        (chosen_method("crosslore", "full", "direct"), 1),
        (chosen_method("galore", "layerwise", "direct"), 1),
        (LAYERWISE, 4),
        (COMPACT, 1),
        (COMPACT, 4),
        (BOTH, 1),
        (BOTH, 4),
        (chosen_method("crosslore", "compact", "deferred"), 1),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_state_gradients_and_peak_are_those_of_real_steps(method: Method, accumulation: int, check: ModuleType) -> None:
    """State and gradients to the byte; the peak by what the allocator gave out, the very first step's too."""
    if method.trained != "all":
        pytest.importorskip("peft", reason='needs peft: pip install "crosslore[llamafactory]"')
    setting = Setting(
        batch=2, seq=16, rank=4, dtype="fp32", rule="adamw", accumulation=accumulation, checkpointing=False,
        device="cpu", cuda_gb=0.0,
    )  # fmt: skip
    row = check.compared(method, setting, check.Options(out=Path(), profile="tiny", threads=1))
    assert row["state"]["estimated"] == row["state"]["measured"]
    assert row["gradients"]["estimated"] == row["gradients"]["measured"]
    assert abs(row["peak"]["difference_percent"]) < 5
    assert abs(row["first step"]["difference_percent"]) < 5


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_pefts(dora: bool) -> None:
    peft = pytest.importorskip("peft", reason='needs peft: pip install "crosslore[llamafactory]"')
    model = transformers.LlamaForCausalLM(llama_config()).to(torch.bfloat16)
    ours = adapter_weights(model, 4, dora=dora)
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "use_dora": dora}
    theirs = [p for p in peft.get_peft_model(model, peft.LoraConfig(r=4, **options)).parameters() if p.requires_grad]
    assert Counter((p.shape, p.dtype) for p in ours) == Counter((p.shape, p.dtype) for p in theirs)


def test_what_waits_where_weights_step_inside_backward_is_far_less_than_an_embedding() -> None:
    held = Estimator(load_config("LLaMA2-7B")).estimate(BOTH, Setting(rank=128)).tensors
    assert held.carried == 0 and held.head_rows == 2 * 4096 * 4096
    assert held.head_rows < held.gradients < 2 * 32000 * 4096 / 3


@pytest.mark.parametrize("accumulation", [1, 4])
def test_compact_gradients_are_r_and_whole_ones_of_what_is_not_compact(accumulation: int) -> None:
    rank, kept = 8, round(0.012 * 64 * 64) + round(0.012 * 32 * 64)
    held = estimator().estimate(COMPACT, Setting(rank=rank, accumulation=accumulation)).tensors
    low = rank * ((64 + 32) + 64 + 64 + 3 * 176)  # q and k on the right; v on the left; o; gate, up, down
    compact = 3 * 4 * (low + kept)
    whole = 2 * (2 * 300 * 64 + 7 * 64)  # both embeddings and the norms, bf16
    assert held.gradients == compact + whole
    assert held.carried == (held.gradients if accumulation > 1 else 0)


def test_factors_wait_in_the_first_step_when_there_are_several_micro_batches() -> None:
    one, four = (estimator().estimate(COMPACT, Setting(rank=8, seq=8, accumulation=n, device="cpu")) for n in (1, 4))
    assert "first step" not in one.moments and four.peak_at == "first step"
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (176, 64), (176, 64), (64, 176)]
    waiting = 3 * 2 * sum(min(4 * 8 * (rows + cols), rows * cols) for rows, cols in shapes)  # bf16
    compact = four.tensors.gradients - 2 * (2 * 300 * 64 + 7 * 64)  # which are not there yet
    assert four.tensors.first_step == waiting - compact
    assert "first step" not in estimator().estimate(BOTH, Setting(rank=8, seq=8, accumulation=4, device="cpu")).moments
    on_gpu = estimator().estimate(COMPACT, Setting(rank=8, seq=8, accumulation=4))
    assert "first step" not in on_gpu.moments


def test_deferred_weights_hold_as_much_as_r() -> None:
    found = estimator().estimate(chosen_method("crosslore_plus", "compact", "deferred"), Setting(rank=8)).tensors
    whole = 2 * (2 * 300 * 64 + 7 * 64)
    assert found.deferred == found.gradients - whole


def test_the_model_is_as_before() -> None:
    """Also after a method that freezes the embeddings and changes the layers."""
    one = estimator()
    one.estimate(BOTH, Setting(rank=8, embeddings="frozen"))
    model = one.model("bf16")
    assert all(p.requires_grad and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    assert all(p.is_meta for p in model.parameters())


def test_frozen_embeddings_have_neither_gradient_nor_state() -> None:
    trained, frozen = (estimator().estimate(COMPACT, Setting(rank=8, embeddings=e)).tensors for e in ("full", "frozen"))
    assert trained.gradients - frozen.gradients == 2 * 2 * 300 * 64
    assert trained.weights == frozen.weights and trained.state > frozen.state


def test_known_models_have_the_weights_of_the_published_ones() -> None:
    counts = {
        name: sum(p.numel() for p in Estimator(load_config(name)).model("bf16").parameters()) for name in known_models()
    }
    assert counts == {"LLaMA2-7B": 6_738_415_616, "LLaMA2-13B": 13_015_864_320, "LLaMA3-8B": 8_030_261_248}


def test_state_is_that_of_the_committed_counts() -> None:
    rows = json.loads((ROOT / "results" / "memory_7b.json").read_text(encoding="utf-8"))
    one = Estimator(load_config("llama2-7b"))
    for row in rows:
        if row["rank"] != 128:
            continue
        setting = Setting(rank=128, rule=row["rule"], embeddings=row["embeddings"])
        found = one.estimate(chosen_method(row["preset"], "full", "direct"), setting).tensors
        assert (found.weights, found.state + found.residual) == (row["weights"], row["state"])
        assert found.gradients == row["gradients_full"]


def test_checkpointing_and_a_smaller_batch_take_less() -> None:
    one, setting = Estimator(load_config("LLaMA2-7B")), Setting(batch=4, checkpointing=False)
    plain = one.estimate(LAYERWISE, setting)
    assert (
        plain.activations.saved > 10 * one.estimate(LAYERWISE, replace(setting, checkpointing=True)).activations.saved
    )
    assert one.estimate(LAYERWISE, replace(setting, batch=1)).activations.saved < plain.activations.saved / 3.9


@pytest.mark.parametrize("limit", [1, 2, 7, 100, 4096])
def test_the_largest_that_fits_is_found(limit: int) -> None:
    for size in (lambda n: 5 + 3 * n, lambda n: n * n, lambda n: 10 * (n // 16), lambda n: 2 ** min(n, 60)):
        for available in (-1, 0, 4, 8, 100, 305, 10**6):
            expected = max((n for n in range(1, limit + 1) if size(n) <= available), default=0)
            assert largest(size, available, limit) == expected


def test_the_largest_batch_and_rank_fit_and_one_more_does_not() -> None:
    one, setting = estimator(), Setting(rank=8, seq=8, cuda_gb=0.0)
    gpu = one.estimate(COMPACT, replace(setting, rank=17)).peak
    batch, rank = one.largest_batch(COMPACT, setting, gpu), one.largest_rank(COMPACT, setting, gpu)
    assert 1 < batch < 4096 and rank == 17
    assert one.estimate(COMPACT, replace(setting, batch=batch)).peak <= gpu
    assert one.estimate(COMPACT, replace(setting, batch=batch + 1)).peak > gpu
    assert one.estimate(COMPACT, replace(setting, rank=rank + 1)).peak > gpu
    assert one.largest_rank(Method(name="AdamW"), setting, gpu) is None


def test_the_chosen_method_is_in_the_table_once() -> None:
    for method in (COMPACT, chosen_method("fira", "layerwise", "direct")):
        assert side_by_side(method).count(method) == 1


def test_a_method_that_cannot_be_compact_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the whole gradient on every step"):
        estimator().estimate(chosen_method("fira", "compact", "direct"), Setting(rank=8))


def test_flora_takes_its_own_rule() -> None:
    assert estimator().estimate(chosen_method("flora", "full", "direct"), Setting(rank=8)).tensors.state > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be an integer >= 1"),
        ({"rule": "adam8"}, "unknown optim 'adam8'"),
        ({"dtype": "fp16"}, "unknown dtype 'fp16'"),
        ({"cuda_gb": -1.0}, "cuda_gb must be a number >= 0"),
    ],
)
def test_a_setting_checks_itself(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setting(**options)


def test_a_folder_and_its_file_are_the_same_model(tmp_path: Path) -> None:
    llama_config().save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        assert DecoderShape.of(load_config(str(source))) == DecoderShape.of(llama_config())


@pytest.mark.parametrize(
    ("text", "message"), [(None, "no configuration at"), ("{", "is no configuration"), ('{"model_type": "x"}', "is no")]
)
def test_what_is_no_configuration_says_so(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(EstimateError, match=message):
        load_config(str(tmp_path))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(EstimateError, match="unknown model 'llama-7b'. Known: LLaMA2-13B, .* A folder"):
        load_config("llama-7b")


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EstimateError, match=r'pip install "crosslore\[estimate\]"'):
        load_config("LLaMA2-7B")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("We couldn't connect.\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(
        EstimateError, match=r"cannot be had from the hub \(We couldn't connect\)\. Give a folder"
    ) as held:
        load_config("owner/name")
    assert "\n" not in str(held.value)
