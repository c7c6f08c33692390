"""`finetuning_type: crosslore` in LLaMA-Factory's parser: what it accepts, what it refuses, what it leaves alone."""

import dataclasses
import importlib.metadata
import pickle
import sys

import pytest
from llamafactory.hparams import get_infer_args, get_train_args
from llamafactory.hparams import parser as upstream_parser
from llamafactory.hparams.finetuning_args import FinetuningArguments

from crosslore.integrations.llamafactory import compat

from .conftest import run


def parsed(config: dict) -> FinetuningArguments:
    return get_train_args(config)[3]


def test_the_type_trains_all_weights_and_shows_its_own_name(config: dict) -> None:
    args = parsed(config)
    assert args.finetuning_type == "full" and args.use_crosslore
    assert args.to_dict()["finetuning_type"] == "crosslore"
    assert (args.rank, args.alpha, args.residual_ratio, args.warmup_k) == (4, 8.0, 0.05, 2)


def test_the_type_survives_replace_and_pickle(config: dict) -> None:
    args = parsed(config)
    for again in (dataclasses.replace(args, plot_loss=True), pickle.loads(pickle.dumps(args))):
        assert again.use_crosslore and again.to_dict()["finetuning_type"] == "crosslore"


def test_fields_that_are_left_out_keep_the_presets_values(config: dict) -> None:
    for name in ("alpha", "residual_ratio", "warmup_k", "crosslore_refresh_every"):
        del config[name]
    assert parsed(config).crosslore_overrides(training_seed=7) == {"seed": 7, "rank": 4}


def test_every_field_reaches_the_optimizers_configuration(config: dict) -> None:
    config |= {
        "crosslore_preset": "galore", "crosslore_projector": "svd", "crosslore_target": "q_proj, v_proj",
        "crosslore_cross_head_target": "none", "crosslore_residual_target": "all", "crosslore_residual_rule": "exact",
        "crosslore_residual_select": "residual", "crosslore_embeddings": "frozen", "crosslore_seed": 3,
        "crosslore_gradients": "full", "crosslore_weights": "direct", "crosslore_stochastic_rounding": True,
        "crosslore_moments": "rotate", "crosslore_refresh_stagger": True, "crosslore_head_choice": "energy",
        "crosslore_random_after": 5, "crosslore_fit_window": 1,
    }  # fmt: skip
    assert parsed(config).crosslore_overrides(training_seed=7) == {
        "rank": 4, "scale": 8.0, "residual_ratio": 0.05, "warmup_steps": 2, "refresh_every": 3, "projector": "svd",
        "targets": ("q_proj", "v_proj"), "cross_head_targets": None, "residual_targets": None,
        "residual_rule": "exact", "residual_select": "residual", "embeddings": "frozen", "seed": 3,
        "stochastic_rounding": True, "moments": "rotate", "refresh_stagger": True, "head_choice": "energy",
        "random_after": 5, "fit_window": 1,
    }  # fmt: skip


def test_fields_that_belong_together_are_checked_together(config: dict) -> None:
    """Alone the projector would contradict the preset."""
    config |= {"crosslore_projector": "random", "crosslore_cross_head_target": "none"}
    assert parsed(config).crosslore_overrides(training_seed=0)["cross_head_targets"] is None


def test_command_line_words_work_as_a_file_does(config: dict) -> None:
    words = [f"--{name}={value}" for name, value in config.items()]
    assert parsed(words).crosslore_overrides(training_seed=0)["rank"] == 4


@pytest.mark.parametrize("words", [["--finetuning-type", "crosslore"], ["--finetuning-type=crosslore"]])
def test_options_may_be_written_with_dashes(config: dict, words: list[str]) -> None:
    del config["finetuning_type"]
    args = parsed([*(f"--{name.replace('_', '-')}={value}" for name, value in config.items()), *words])
    assert args.use_crosslore and args.rank == 4


def test_values_are_not_taken_for_options(config: dict) -> None:
    words = [f"--{name}={value}" for name, value in config.items()]
    assert parsed([*words, "--run_name", "fsdp", "--fsdp="]).use_crosslore


REFUSED = [
    ({"rnak": 4}, "unknown field 'rnak'.*Did you mean rank"),
    ({"crosslore_pressed": "galore"}, "Did you mean crosslore_preset"),
    ({"crosslore_preset": "galor"}, "unknown preset 'galor'. Did you mean 'galore'"),
    ({"rank": 0}, "rank must be an integer >= 1, got 0"),
    ({"rank": "32"}, "rank must be an integer >= 1, got '32'"),
    ({"alpha": 0}, "alpha must be a number > 0, got 0"),
    ({"alpha": -1.0}, "alpha must be a number > 0, got -1"),
    ({"residual_ratio": 1.2}, "residual_ratio must be a number >= 0 and <= 1, got 1.2"),
    ({"warmup_k": -1}, "warmup_k must be an integer >= 0, got -1"),
    ({"crosslore_refresh_every": 0}, "crosslore_refresh_every must be"),
    ({"crosslore_projector": "qr"}, "unknown crosslore_projector 'qr'.*Known: .*svd"),
    ({"crosslore_residual_rule": "best"}, "unknown crosslore_residual_rule 'best'"),
    ({"crosslore_cross_head_target": "all"}, "crosslore_cross_head_target must name modules or be 'none'"),
    ({"crosslore_gradients": "compat"}, "unknown crosslore_gradients 'compat'. Did you mean 'compact'"),
    ({"crosslore_clip": "global"}, "unknown crosslore_clip 'global'.*stale-global"),
    (
        {"crosslore_projector": "random"},
        "crosslore_cross_head_target must be `none` for crosslore_projector 'random'.*Set it to `none`",
    ),
    ({"crosslore_fit_window": 0}, "crosslore_fit_window must be an integer >= 1, got 0"),
    ({"crosslore_moments": "turn"}, "unknown crosslore_moments 'turn'"),
    ({"crosslore_gradients": "layerwise", "fp16": True}, "fp16 must be false with crosslore_gradients 'layerwise'"),
    ({"crosslore_weights": "late"}, "unknown crosslore_weights 'late'"),
    (
        {"crosslore_weights": "deferred", "crosslore_gradients": "full"},
        "crosslore_weights 'deferred' is for crosslore_gradients 'compact'",
    ),
    ({"scale": 32}, "unknown field 'scale'.*It is `alpha` in a configuration"),
    ({"update_proj_gap": 200}, "unknown field 'update_proj_gap'.*It is `crosslore_refresh_every` in a configuration"),
    ({"crosslore_telemetry": "no"}, "crosslore_telemetry must be True or False, got 'no'"),
    ({"crosslore_clip": "stale-global"}, "crosslore_clip 'stale-global' is for .*'layerwise'.*, got 'auto'"),
    (
        {"crosslore_preset": "apollo", "residual_ratio": None, "crosslore_gradients": "compact"},
        "crosslore_gradients must be 'full' or 'layerwise' for residual='scaled_gradient', got 'compact'",
    ),
    ({"lora_rank": 4}, "options of other methods: lora_rank=4"),
    ({"lora_rank": 8, "lora_target": "all"}, "options of other methods: lora_rank=8, lora_target='all'"),
    ({"use_galore": True}, "options of other methods: use_galore=True"),
    ({"use_apollo": True}, "options of other methods: use_apollo=True"),
    ({"use_badam": True}, "options of other methods: use_badam=True"),
    ({"use_muon": True}, "options of other methods: use_muon=True"),
    ({"quantization_bit": 4}, "quantization_bit must be unset.*got 4"),
    ({"deepspeed": "ds_z2.json"}, "does not work with DeepSpeed ZeRO yet"),
    ({"fsdp": "full_shard"}, "does not work with FSDP yet"),
    ({"optim": "lomo"}, "unknown optim for finetuning_type crosslore: 'lomo'.*Known: .*adamw_8bit"),
]


@pytest.mark.parametrize(("change", "text"), REFUSED, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(REFUSED)])
def test_wrong_fields_are_refused_by_name(config: dict, change: dict, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        get_train_args(config | change)


def test_options_of_other_methods_may_be_switched_off(config: dict) -> None:
    """The WebUI writes them for every type."""
    assert parsed(config | {"use_galore": False, "use_apollo": False, "additional_target": None}).use_crosslore


def test_accelerates_fsdp_is_refused_too(config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="does not work with FSDP yet"):
        get_train_args(config)


def test_a_prequantised_model_is_refused_before_it_is_loaded(config: dict, tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(ValueError, match="must be an unquantised model"):
        get_train_args(config | {"model_name_or_path": str(tmp_path)})


def test_inference_accepts_a_training_configuration(config: dict) -> None:
    names = ("model_name_or_path", "template", "finetuning_type", "rank", "alpha", "residual_ratio", "warmup_k")
    assert get_infer_args({name: config[name] for name in names})[2].finetuning_type == "full"


def test_without_bitsandbytes_the_moments_stay_in_fp32_and_it_is_said(monkeypatch, caplog) -> None:
    from crosslore.integrations.llamafactory import optimizer

    monkeypatch.setattr(optimizer.importlib.util, "find_spec", lambda name: None)
    assert optimizer.choose_rule("adamw_8bit") == "adamw"
    assert 'pip install "crosslore[bnb]"' in caplog.text


def test_messages_have_the_names_of_a_configuration_but_for_names_of_layers() -> None:
    from crosslore.integrations.llamafactory.arguments import in_yaml_names

    given = {"embeddings": "full", "scale": 8.0, "targets": "x"}
    assert in_yaml_names("scale must be > 0 for embeddings='full'", given) == (
        "alpha must be > 0 for crosslore_embeddings='full'"
    )
    layers = "targets names 'x'. Layers: encoder.embeddings.proj, decoder.scale, h.0.moments."
    assert in_yaml_names(layers, given) == layers.replace("targets", "crosslore_target")


# What belongs to LLaMA-Factory stays as it is


@pytest.mark.parametrize("kind", ["lora", "oft", "freeze", "full"])
def test_other_types_get_upstreams_own_class(config: dict, kind: str) -> None:
    for name in ("rank", "alpha", "residual_ratio", "warmup_k", "crosslore_refresh_every"):
        del config[name]
    args = parsed(config | {"finetuning_type": kind})
    assert type(args) is FinetuningArguments
    assert args.to_dict() == FinetuningArguments(finetuning_type=kind).to_dict() | {"use_mca": False}


def test_our_fields_under_another_type_are_named_with_the_type_that_they_need(config: dict) -> None:
    with pytest.raises(
        ValueError, match="rank, alpha, .*: these fields are for `finetuning_type: crosslore`, got 'lora'"
    ):
        get_train_args(config | {"finetuning_type": "lora"})


@pytest.mark.parametrize("kind", ["crosslor", "CrossLore", "cross-lore"])
def test_a_misspelt_type_is_answered_with_the_right_one(config: dict, kind: str) -> None:
    with pytest.raises(
        ValueError, match=f"unknown finetuning_type '{kind}'. Did you mean `finetuning_type: crosslore`"
    ):
        get_train_args(config | {"finetuning_type": kind})
    with pytest.raises(ValueError, match=f"unknown finetuning_type '{kind}'"):
        get_train_args([f"--{name}={value}" for name, value in (config | {"finetuning_type": kind}).items()])


def test_a_preset_for_a_type_is_answered_with_both_fields(config: dict) -> None:
    with pytest.raises(ValueError, match="finetuning_type: crosslore` with `crosslore_preset: crosslore_plus`"):
        get_train_args(config | {"finetuning_type": "crosslore_plus"})


def test_other_wrong_types_and_keys_are_upstreams_to_refuse(config: dict) -> None:
    ours = ("rank", "alpha", "residual_ratio", "warmup_k", "crosslore_refresh_every")
    others = {name: value for name, value in config.items() if name not in ours}
    with pytest.raises(AssertionError, match="Invalid fine-tuning method"):
        get_train_args(others | {"finetuning_type": "best"})
    with pytest.raises(ValueError, match="Some keys are not used by the HfArgumentParser"):
        get_train_args(others | {"finetuning_type": "lora", "rnak": 3})


def test_switched_off_the_type_is_unknown_and_nothing_is_loaded() -> None:
    code = (
        "import sys; from llamafactory.hparams import parser, FinetuningArguments; "
        "assert not hasattr(parser._parse_args, '__crosslore__'); "
        "assert not any(name.startswith('crosslore') for name in sys.modules); "
        "FinetuningArguments(finetuning_type='crosslore')"
    )
    result = run(sys.executable, "-c", code, CROSSLORE_LLAMAFACTORY="0")
    assert result.returncode == 1 and "Invalid fine-tuning method" in result.stderr


# What does not fit is one clear error, for this type only


@pytest.fixture
def other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(compat.importlib.metadata, "version", lambda n: "0.9.9" if n == "llamafactory" else real(n))


def test_an_untested_version_is_refused_for_this_type_only(config: dict, other_version: None) -> None:
    with pytest.raises(compat.UnsupportedError, match=r"llamafactory 0\.9\.9.*Tested: 0\.9\.5.*pip install"):
        get_train_args(config)
    full = {k: v for k, v in config.items() if not k.startswith("crosslore") and k not in ("rank", "alpha")}
    del full["residual_ratio"], full["warmup_k"]
    assert parsed(full | {"finetuning_type": "full"}).finetuning_type == "full"


def test_help_still_works_on_an_untested_version(other_version: None, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        get_train_args(["--finetuning_type", "lora", "-h"])
    assert "--lora_rank" in capsys.readouterr().out


def test_a_seam_that_moved_is_named(config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import ModuleType

    from crosslore.integrations.llamafactory.hooks import patch

    monkeypatch.setattr(compat, "_problems", [])
    patch(ModuleType("llamafactory.train.trainer_utils"))
    with pytest.raises(compat.UnsupportedError, match="trainer_utils has no function create_custom_optimizer"):
        get_train_args(config)


def test_a_field_name_that_llamafactory_came_to_own_is_named(config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = dataclasses.make_dataclass(
        "FinetuningArguments", [("rank", int, dataclasses.field(default=3))], bases=(FinetuningArguments,)
    )
    monkeypatch.setattr(upstream_parser, "FinetuningArguments", newer)
    monkeypatch.setattr(
        upstream_parser, "_TRAIN_ARGS", [newer if a is FinetuningArguments else a for a in upstream_parser._TRAIN_ARGS]
    )
    with pytest.raises(compat.UnsupportedError, match=r"fields of its own called \['rank'\]"):
        get_train_args(config)


def test_a_torchaudio_of_another_cuda_version_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise RuntimeError("Detected that PyTorch and TorchAudio were compiled with different CUDA versions.")

    monkeypatch.setattr(compat.importlib, "import_module", refuse)
    with pytest.raises(compat.UnsupportedError, match=r"do not belong together.*pip install torch==2\.11\.0"):
        compat.require_matching_torch()


def test_help_lists_the_fields() -> None:
    result = run(sys.executable, "-m", "llamafactory.cli", "train", "-h")
    assert "--residual_ratio" in result.stdout and "crosslore" in result.stdout, result.stderr[-500:]


@pytest.mark.parametrize("words", [["version"], []])
def test_commands_without_a_configuration_work_as_upstreams(words: list[str]) -> None:
    ours = run(sys.executable, "-m", "llamafactory.cli", *words)
    theirs = run(sys.executable, "-m", "llamafactory.cli", *words, CROSSLORE_LLAMAFACTORY="0")
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout) and ours.returncode == 0


def test_only_training_commands_become_torchrun_workers() -> None:
    result = run(sys.executable, "-m", "crosslore.integrations.llamafactory", "version", LOCAL_RANK="0")
    assert result.returncode == 0 and "Welcome to LLaMA Factory" in result.stdout
