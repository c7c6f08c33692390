"""Hugging Face's Trainer and TRL's SFTTrainer with `trainer_optimizer`."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "crosslore[llamafactory]"')
pytest.importorskip("accelerate", reason="needs accelerate")

from crosslore import LowRankOptimizer, create_optimizer  # noqa: E402
from crosslore.integrations.transformers import trainer_optimizer  # noqa: E402

OPTIONS = {"rank": 4, "scale": 1.0, "refresh_every": 5}
MODES = ("full", "compact", "layerwise", "compact-layerwise")


def model() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 61}  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))


def rows(count: int = 48) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(61, (count, 10), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def arguments(folder: Path, **more: Any) -> Any:
    options = {
        "per_device_train_batch_size": 2, "max_steps": 8, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True,
    }  # fmt: skip
    return transformers.TrainingArguments(output_dir=str(folder), **{**options, **more})


def run(folder: Path, *, gradients: str = "full", resume: str | None = None, **more: Any) -> Any:
    args = arguments(folder, **more)
    choice = trainer_optimizer(args, "crosslore_plus", gradients=gradients, **OPTIONS)
    trainer = transformers.Trainer(model(), args, train_dataset=rows(), optimizer_cls_and_kwargs=choice)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def log(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("gradients", MODES)
def test_every_mode_trains_as_a_plain_loop_does(gradients: str, tmp_path: Path) -> None:
    (row,) = rows(1)  # the same row again and again: the Trainer's order does not matter
    args = arguments(tmp_path)
    choice = trainer_optimizer(args, "crosslore_plus", gradients=gradients, **OPTIONS)
    trainer = transformers.Trainer(model(), args, train_dataset=[row] * 32, optimizer_cls_and_kwargs=choice)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, LowRankOptimizer)
    net = model().train()
    optimizer = create_optimizer(net, "crosslore_plus", lr=1e-2, weight_decay=0.0, **OPTIONS)
    losses = []
    for _ in range(8):
        # The Trainer divides by all labels, the first of a row too.
        loss = net(**{name: torch.stack([tensor] * 2) for name, tensor in row.items()}, num_items_in_batch=20).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert log(trainer) == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("gradients", ["compact", "compact-layerwise"])
def test_modes_agree_with_whole_gradients(gradients: str, tmp_path: Path) -> None:
    whole, ours = run(tmp_path / "a"), run(tmp_path / "b", gradients=gradients)
    assert log(ours) == pytest.approx(log(whole), rel=1e-3)
    assert all(norm > 0 for norm in log(ours, "grad_norm"))


@pytest.mark.parametrize("gradients", MODES)
def test_accumulation_and_clipping_reach_the_optimizer(gradients: str, tmp_path: Path) -> None:
    trainer = run(tmp_path, gradients=gradients, gradient_accumulation_steps=3, max_grad_norm=0.5)
    optimizer = trainer.optimizer.optimizer
    assert len(log(trainer)) == 8 and all(norm > 0 for norm in log(trainer, "grad_norm"))
    mode = optimizer.layerwise or optimizer.compact
    assert mode is None or mode.accumulation_steps == 3
    if gradients == "compact":
        assert optimizer.compact.max_grad_norm == 0.5


@pytest.mark.parametrize("gradients", MODES)
def test_a_run_goes_on_from_its_checkpoint_with_the_same_losses(gradients: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", gradients=gradients, save_strategy="steps", save_steps=4)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    again = run(tmp_path / "again", gradients=gradients, resume=str(tmp_path / "again" / "checkpoint-4"))
    assert log(again) == log(whole)


def test_bf16_weights_train(tmp_path: Path) -> None:
    args = arguments(tmp_path, bf16=True)
    choice = trainer_optimizer(args, "crosslore", gradients="compact", warmup_steps=2, **OPTIONS)
    net = model().to(torch.bfloat16)
    trainer = transformers.Trainer(net, args, train_dataset=rows(), optimizer_cls_and_kwargs=choice)
    trainer.train()
    assert log(trainer)[-1] < log(trainer)[0]


def test_the_sft_trainer_of_trl_works(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    keep = {"per_device_train_batch_size", "max_steps", "learning_rate", "logging_steps", "report_to", "use_cpu"}
    values = {name: value for name, value in vars(arguments(tmp_path)).items() if name in keep}
    args = trl.SFTConfig(output_dir=str(tmp_path), save_strategy="no", max_length=16, bf16=False, **values)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_letters(), pad_token="p", eos_token="e")
    trainer = trl.SFTTrainer(
        model(), args, train_dataset=data, processing_class=tokenizer,
        optimizer_cls_and_kwargs=trainer_optimizer(args, "crosslore_plus", gradients="compact", **OPTIONS),
    )  # fmt: skip
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, LowRankOptimizer) and trainer.state.global_step == 8


def _letters() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel({letter: place for place, letter in enumerate("pe" + "abcdefghij")}, unk_token="a"))


def test_what_is_no_training_arguments_is_named() -> None:
    with pytest.raises(TypeError, match="takes transformers' TrainingArguments, got dict"):
        trainer_optimizer({})


def test_loss_scaling_with_layerwise_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.fp16 = True
    with pytest.raises(ValueError, match="fp16 must be False for gradients='layerwise'"):
        trainer_optimizer(args, layerwise=True)


def test_an_optim_that_is_not_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_optimizer(arguments(tmp_path))
    assert "is not read" not in caplog.text
    trainer_optimizer(arguments(tmp_path, optim="adamw_8bit"), rule="adamw8bit")
    assert "is not read" not in caplog.text
    trainer_optimizer(arguments(tmp_path, optim="adamw_8bit"))
    assert "optim='adamw_8bit' is not read" in caplog.text and "rule='adamw8bit'" in caplog.text


def test_a_norm_that_the_trainer_clips_by_is_an_argument_of_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="max_grad_norm must be given to TrainingArguments for gradients='full', got 1"
    ):
        trainer_optimizer(arguments(tmp_path), max_grad_norm=1.0)
    assert trainer_optimizer(arguments(tmp_path), gradients="compact", max_grad_norm=2.0)[1]["max_grad_norm"] == 2.0


@pytest.mark.parametrize(("name", "what"), [("deepspeed", "DeepSpeed ZeRO"), ("fsdp", "FSDP")])
def test_sharding_is_refused_by_name(name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args, plain = arguments(tmp_path), arguments(tmp_path)
    setattr(args, name, "zero.json")
    with pytest.raises(ValueError, match=f"{what} does not work with crosslore: .*Remove `{name}`"):
        trainer_optimizer(args)
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ValueError, match=f"{what} does not work"):
        trainer_optimizer(plain)


def test_a_batch_over_several_gpus_needs_whole_gradients(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    assert args.n_gpu <= 1
    args._n_gpu = 2
    with pytest.raises(ValueError, match="gradients must be 'full' .*got 'compact' and 2 GPUs"):
        trainer_optimizer(args, gradients="compact")
    assert trainer_optimizer(args)[1]["preset"] == "crosslore"


def test_a_transformers_without_factories_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.trainer, "is_optimizer_factory")
    with pytest.raises(RuntimeError, match="needs a transformers whose Trainer gives its model .*pip install -U"):
        trainer_optimizer(arguments(tmp_path))


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("norm", [0.0, 0.3])
def test_the_last_window_of_an_epoch_may_be_short(gradients: str, norm: float, tmp_path: Path) -> None:
    """Five batches, two a step: the third step of an epoch has one."""
    options = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2, "max_grad_norm": norm}
    args = arguments(tmp_path, **options)
    choice = trainer_optimizer(args, "crosslore_plus", gradients=gradients, **OPTIONS)
    trainer = transformers.Trainer(model(), args, train_dataset=rows(10), optimizer_cls_and_kwargs=choice)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert len(log(trainer)) == 6 and steps == {6}
