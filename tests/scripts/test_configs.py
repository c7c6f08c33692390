"""Configurations of cells: the paper's settings, what identifies them, their data, and LLaMA-Factory's own parser."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from crosslore_eval.tasks import TASKS
from crosslore_eval.tasks.loading import load_rows

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "yaml_configs"
PLACES = {"model": "M", "data": "D", "output": "O"}


@pytest.fixture(scope="module")
def lib(load_script):
    """The modules of `scripts/reproduction`, and the program that writes the configurations."""
    names = ("experiments", "configs", "profiles", "paper", "samples", "tiny_model", "cells")
    modules = {name: load_script(f"reproduction.{name}") for name in names}
    return SimpleNamespace(**modules, make_configs=load_script("make_configs"))


def cell_of(lib, profile="paper", target="table1", **wanted):
    cells = lib.experiments.experiments(target, profile=profile)
    return next(cell for cell in cells if all(getattr(cell, name) == value for name, value in wanted.items()))


def config_of(lib, cell, **places):
    settings = {"learning_rate": 1e-4, **cell.settings} if cell.profile == "small" else cell.settings
    return lib.configs.training_config(replace(cell, settings=settings), **{**PLACES, **places})


# The paper's settings


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("lora", {"finetuning_type": "lora", "lora_rank": 128, "lora_alpha": 256, "lora_target": "all"}),
        ("dora", {"finetuning_type": "lora", "use_dora": True, "lora_rank": 128}),
        ("galore_stock", {"finetuning_type": "full", "use_galore": True, "galore_rank": 128, "galore_scale": 64,
                          "galore_update_interval": 200, "galore_layerwise": True}),
        ("galore", {"finetuning_type": "crosslore", "crosslore_preset": "galore", "rank": 128, "alpha": 64}),
        ("crosslore", {"finetuning_type": "crosslore", "rank": 128, "alpha": 64, "residual_ratio": 0.012,
                       "warmup_k": 100, "crosslore_refresh_every": 200}),
        ("crosslore_plus", {"finetuning_type": "crosslore", "crosslore_preset": "crosslore_plus", "rank": 128}),
    ],
)  # fmt: skip
def test_a_method_has_its_keys_with_the_values_of_table_3(lib, method, wanted):
    config = config_of(lib, cell_of(lib, method=method, dataset="gsm8k", rank=128))
    assert wanted.items() <= config.items()
    assert ("residual_ratio" in config) == (method == "crosslore")
    assert {"learning_rate": 1e-6, "num_train_epochs": 1, "optim": "adamw_8bit"}.items() <= config.items()


def test_settings_follow_the_papers_tables_by_model_and_data(lib):
    thirteen = config_of(lib, cell_of(lib, target="table8", method="crosslore", rank=256))
    assert (thirteen["per_device_train_batch_size"], thirteen["alpha"]) == (4, 64)
    mawps = config_of(lib, cell_of(lib, target="table5", method="crosslore", dataset="mawps", rank=32))
    assert (mawps["num_train_epochs"], mawps["alpha"], mawps["dataset"]) == (3, 16, "mawps_train")


def test_settings_that_the_paper_lacks_are_borrowed(lib):
    """LLaMA2-13B has batch 4 on E2E in table 4, and its times on CNN/DM are those of batch 1."""
    summary = config_of(lib, cell_of(lib, target="table9", model="llama2-13b", method="lora", dataset="cnn_dm"))
    assert (summary["per_device_train_batch_size"], summary["max_samples"]) == (1, 2000)
    llama3 = config_of(lib, cell_of(lib, target="table10", model="llama3-8b", dataset="gsm8k", column="1.8"))
    assert (llama3["alpha"], llama3["residual_ratio"], llama3["rank"]) == (32, 0.018, 256)


def test_settings_of_a_cell_win(lib):
    plain = config_of(lib, cell_of(lib, target="ablations", method="crosslore-no-residual"))
    assert plain["residual_ratio"] == 0.0
    whole = config_of(lib, cell_of(lib, target="ablations", method="crosslore-whole-svd"))
    assert (whole["crosslore_projector"], whole["crosslore_cross_head_target"]) == ("svd", "none")


def test_the_written_file_of_the_readme_is_the_matrix_cell(lib):
    """yaml_configs/crosslore_gsm8k.yaml and table1/crosslore_gsm8k_r128.yaml train the same."""
    by_hand = yaml.safe_load((CONFIGS / "crosslore_gsm8k.yaml").read_text(encoding="utf-8"))
    cell = yaml.safe_load((CONFIGS / "table1" / "crosslore_gsm8k_r128.yaml").read_text(encoding="utf-8"))
    differs = {key for key in by_hand if by_hand[key] != cell.get(key)}
    assert differs == {"output_dir", "seed"}
    assert set(cell) - set(by_hand) == {"crosslore_refresh_every", "overwrite_cache", "weight_decay"}


def test_a_run_for_tuning_ends_with_its_held_out_loss(lib):
    cell = cell_of(lib, "small", "tuning", method="lora", dataset="mawps")
    config = config_of(lib, cell)
    assert (config["eval_dataset"], config["do_eval"]) == ("mawps_dev", True)
    assert config["max_steps"] < config_of(lib, cell_of(lib, "small", method="lora", dataset="mawps"))["max_steps"]
    with pytest.raises(ValueError, match="held-out loss"):
        lib.configs.evaluation_command(cell, model="M", data="D", out="O")


def test_a_cell_without_a_learning_rate_is_refused(lib):
    with pytest.raises(ValueError, match="has no learning rate: profile small tunes them"):
        lib.configs.training_config(cell_of(lib, "small", method="lora"), **PLACES)


def test_evaluation_uses_the_template_of_training_and_the_papers_protocol(lib):
    cell = cell_of(lib, "small", "table2", method="lora", rank=16)
    words = lib.configs.evaluation_command(cell, model="out", data="D", out="f.jsonl", base="B")
    assert words[:3] == ["crosslore-eval", "run", "e2e"]
    for option, value in {"--template": config_of(lib, cell)["template"], "--protocol": "paper", "--model": "out",
                          "--data": "D", "--out": "f.jsonl", "--base-model": "B"}.items():  # fmt: skip
        assert words[words.index(option) + 1] == value
    for dataset, protocol in lib.configs.PROTOCOLS.items():
        assert protocol in {known.name for known in TASKS[dataset].protocols}


def test_evaluation_commands_are_understood(lib):
    from crosslore_eval.options import build_parser

    for target in ("table2", "table9"):
        cell = cell_of(lib, target=target, method="lora")
        words = lib.configs.evaluation_command(cell, model="M", data="D", out="O")
        args = build_parser().parse_args(words[1:])
        assert args.max_new_tokens == TASKS[cell.dataset].max_new_tokens and args.json and args.confidence


# The hash


def hash_of(lib, cell, **places):
    return lib.configs.config_hash(config_of(lib, cell, **places), exp=cell)


def test_the_hash_is_the_same_wherever_a_cell_runs_and_whatever_table_it_is_of(lib):
    cell = cell_of(lib, "small", method="crosslore", dataset="gsm8k", rank=16)
    first = hash_of(lib, cell)
    assert len(first) == 16 and int(first, 16)
    assert hash_of(lib, cell, model="/other/model", data="/other/data", output="/other/output") == first
    variant = cell_of(lib, "small", "ablation-residual", method="crosslore", dataset="gsm8k", rank=16)
    assert hash_of(lib, variant) == first


def test_the_hash_tells_apart_what_decides_the_result(lib):
    cell = cell_of(lib, method="crosslore", dataset="gsm8k", rank=128)
    others = [
        replace(cell, seed=2), replace(cell, model="llama3-8b"), replace(cell, rank=16), replace(cell, dataset="mawps"),
        replace(cell, method="galore"), replace(cell, settings={"learning_rate": 2e-6}),
        replace(cell, settings={"residual_ratio": 0.0}),
    ]  # fmt: skip
    hashes = {hash_of(lib, other) for other in (cell, *others)}
    assert len(hashes) == len(others) + 1


def test_the_hash_covers_the_evaluation_and_the_rows(lib, monkeypatch):
    cell = cell_of(lib, "smoke", method="crosslore", dataset="gsm8k", rank=4)
    first, profiles = hash_of(lib, cell), lib.profiles.load_profiles()
    for change in ({"max_new_tokens": 9}, {"test_rows": 4}, {"train_rows": 13}):
        profile = profiles.by_name["smoke"]
        datasets = {**profile.datasets, "gsm8k": replace(profile.datasets["gsm8k"], **change)}
        changed = replace(profiles, by_name={"smoke": replace(profile, datasets=datasets)})
        monkeypatch.setattr(lib.configs, "load_profiles", lambda changed=changed: changed)
        assert hash_of(lib, cell) != first, change


# The written files


def test_the_written_configurations_are_up_to_date(lib):
    found = {path.relative_to(CONFIGS): path.read_text(encoding="utf-8") for path in CONFIGS.glob("table*/*.yaml")}
    assert found == lib.make_configs.all_configs()


def test_a_written_configuration_is_its_cell(lib):
    cell = cell_of(lib, target="table9", model="llama2-13b", method="galore_stock", dataset="xsum", rank=32)
    written = CONFIGS / "table9" / "llama2-13b_galore_stock_xsum_r32.yaml"
    places = {"model": "meta-llama/Llama-2-13b-hf", "data": "data/prepared",
              "output": "saves/table9/llama2-13b_galore_stock_xsum_r32"}  # fmt: skip
    assert yaml.safe_load(written.read_text(encoding="utf-8")) == config_of(lib, cell, **places)


def test_values_of_the_paper_are_marked_and_ours_are_not():
    text = (CONFIGS / "table1" / "lora_gsm8k_r16.yaml").read_text(encoding="utf-8")
    comments = {line.split(":")[0]: line.partition(" # ")[2] for line in text.splitlines() if " # " in line}
    assert comments["num_train_epochs"] == "paper, table 3" and "our choice" in comments["seed"]
    assert "Section 5.2" in comments["learning_rate"]
    full = (CONFIGS / "table1" / "full_gsm8k.yaml").read_text(encoding="utf-8")
    assert "1.0e-05             # ours" in full


def test_check_names_what_is_out_of_date_and_writing_repairs_it(tmp_path):
    def run(*words):
        command = [sys.executable, ROOT / "scripts" / "make_configs.py", "--folder", tmp_path, *words]
        return subprocess.run(command, capture_output=True, text=True)

    assert run().returncode == 0 and run("--check").returncode == 0
    edited, stale, missing = (tmp_path / "table1" / name for name in ("full_gsm8k.yaml", "x.yaml", "full_mawps.yaml"))
    edited.write_text(edited.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    stale.write_text("", encoding="utf-8")
    missing.unlink()
    checked = run("--check")
    assert checked.returncode == 1
    assert [Path(line.split(" is out of date")[0]) for line in checked.stderr.splitlines()] == [edited, missing, stale]
    assert run().returncode == 0 and run("--check").returncode == 0 and not stale.exists()


@pytest.mark.slow
def test_llamafactorys_parser_takes_every_configuration(lib, monkeypatch):
    """In one process: importing it is what takes long. bf16 is refused on a CPU, so a GPU is claimed."""
    pytest.importorskip("llamafactory", reason="llamafactory is not installed (extra llamafactory)")
    from llamafactory.hparams import get_train_args, parser

    monkeypatch.setattr(parser, "is_torch_bf16_gpu_available", lambda: True)
    configs = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(CONFIGS.glob("table*/*.yaml"))]
    cells = [cell for profile, target in (("small", "all"), ("smoke", "table1"), ("paper", "table10"))
             for cell in lib.experiments.experiments(target, profile=profile)]  # fmt: skip
    configs += [config_of(lib, cell) for cell in cells]
    for config in configs:
        model, data, training, tuning, _ = get_train_args(dict(config))
        shown = {**vars(model), **vars(data), **vars(training), **tuning.to_dict()}
        # Those that the parser makes something else of.
        for key in config.keys() - {"dataset", "eval_dataset", "lora_target", "galore_target", "report_to"}:
            value = shown[key].value if hasattr(shown[key], "value") else shown[key]
            assert value == config[key], (key, config)
        assert data.dataset == [config["dataset"]]


# The rows


@pytest.fixture(scope="module")
def smoke_data(lib, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    cells = lib.experiments.experiments("all", profile="smoke")
    return folder, lib.samples.prepare_profile_data(cells, None, folder)


def test_every_data_set_has_bundled_rows_of_its_own(smoke_data):
    folder, files = smoke_data
    assert sorted(files) == ["cnn_dm", "e2e", "gsm8k", "mawps", "xsum"]
    inputs = [
        row["input"]
        for name in files
        for row in map(json.loads, (folder / f"{name}_train.jsonl").read_text(encoding="utf-8").splitlines())
    ]
    assert len(inputs) == len(set(inputs)) == 5 * files["e2e"]["train"].rows


@pytest.mark.parametrize("name", ["cnn_dm", "e2e", "gsm8k", "mawps", "xsum"])
def test_the_evaluation_reads_the_sample_as_the_tasks_own(smoke_data, name):
    folder, files = smoke_data
    task = TASKS[name]
    rows = load_rows(task, task.split(None), folder=folder)
    assert len(rows) == files[name]["test"].rows == 3 and all(row[task.reference] for row in rows)


def test_the_sums_are_those_of_the_files_and_the_same_again(lib, smoke_data, tmp_path):
    import hashlib

    folder, files = smoke_data
    for name, parts in files.items():
        for part, file in parts.items():
            assert hashlib.sha256((folder / f"{name}_{part}.jsonl").read_bytes()).hexdigest() == file.sha256
    cells = lib.experiments.experiments("table2", profile="smoke")
    assert lib.samples.prepare_profile_data(cells, None, tmp_path) == {"e2e": files["e2e"]}


def test_cells_of_two_profiles_are_refused(lib, tmp_path):
    cells = [cell_of(lib, "smoke", method="lora"), cell_of(lib, "paper", method="lora")]
    with pytest.raises(ValueError, match="must be of one profile, got paper, smoke"):
        lib.samples.prepare_profile_data(cells, None, tmp_path)


@pytest.mark.parametrize(
    ("count", "total", "expected"), [(3, 9, [1, 4, 7]), (2, 5, [1, 3]), (0, 3, [0, 1, 2]), (7, 2, [0, 1])]
)
def test_samples_are_evenly_spaced(lib, count, total, expected):
    assert lib.samples.evenly_spaced(range(total), count) == expected


@pytest.mark.skipif("CROSSLORE_DATA_DIR" not in os.environ, reason="CROSSLORE_DATA_DIR names no data sets")
def test_rows_of_the_small_profile_are_apart_and_whole(lib, tmp_path):
    cells = lib.experiments.experiments("tuning", profile="small")
    files = lib.samples.prepare_profile_data(cells, Path(os.environ["CROSSLORE_DATA_DIR"]), tmp_path)
    profile = lib.profiles.load_profiles().by_name["small"]
    for name, parts in files.items():
        found = {
            part: [json.loads(line) for line in (tmp_path / f"{name}_{part}.jsonl").read_text("utf-8").splitlines()]
            for part in parts
        }
        choice = profile.datasets[name]
        assert len(found["train"]) == choice.train_rows and len(found["dev"]) == choice.dev_rows
        inputs = {part: {row["input"] for row in rows} for part, rows in found.items()}
        assert not inputs["dev"] & inputs["train"]
        if name == "e2e":  # rows of one input are its references, all of them
            assert len(inputs["test"]) == choice.test_rows < len(found["test"])
            original = TASKS["e2e"]
            rows = load_rows(original, original.split(None), folder=Path(os.environ["CROSSLORE_DATA_DIR"]))
            assert len([row for row in rows if row["input"] in inputs["test"]]) == len(found["test"])


def test_data_that_are_not_there_are_an_error(lib, tmp_path):
    from crosslore_eval.tasks.files import DataError

    with pytest.raises(DataError, match=r"gsm8k/train\.jsonl"):
        lib.samples.prepare_profile_data([cell_of(lib, "small", dataset="gsm8k")], tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The tiny model


@pytest.mark.slow
def test_the_tiny_model_is_the_same_each_time_and_has_all_parts(lib, tmp_path):
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoTokenizer

    first, second = (lib.tiny_model.make_tiny_model(tmp_path / name, tokenizer=None) for name in "ab")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
    config = AutoConfig.from_pretrained(first)
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (4, 2, 2)
    words = AutoTokenizer.from_pretrained(first)
    text = words.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert words.decode(words("A tap gives 9 litres.")["input_ids"]) == "A tap gives 9 litres."


@pytest.mark.slow
def test_the_tiny_model_takes_the_embedded_models_tokenizer(lib, tmp_path):
    pytest.importorskip("transformers")
    source = lib.tiny_model.EMBEDDED_MODEL
    if not (source / "tokenizer.json").is_file():
        pytest.skip("the embedded model is not there: python scripts/get_model.py")
    from transformers import AutoConfig, AutoTokenizer

    folder = lib.tiny_model.make_tiny_model(tmp_path)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()
    assert AutoConfig.from_pretrained(folder).vocab_size == len(AutoTokenizer.from_pretrained(source))
