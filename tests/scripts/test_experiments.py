"""The matrix of cells: complete, each once, and its learning rates chosen on held-out rows."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

ROWS = {"lora", "dora", "galore_stock", "crosslore", "galore", "crosslore_plus"}


@pytest.fixture(scope="module")
def lib(load_script):
    """The modules of `scripts/reproduction`."""
    names = ("experiments", "cells", "tuning", "costs", "profiles", "paper", "reading")
    return SimpleNamespace(**{name: load_script(f"reproduction.{name}") for name in names})


def cells(lib, target, profile="paper", **kwargs):
    return lib.experiments.experiments(target, profile=profile, **kwargs)


def test_every_cell_of_the_papers_tables_is_run(lib):
    paper = lib.paper.load_paper()
    for number in (1, 2, 5, 6, 7, 8, 9):
        found = {(c.model, c.method, c.dataset, c.rank) for c in cells(lib, f"table{number}")}
        for row in paper.tables[number].rows:
            for cell in row.cells:
                method = "galore_stock" if cell.key.method == "galore" else cell.key.method
                assert (cell.key.model, method, cell.key.dataset, cell.key.rank) in found


@pytest.mark.parametrize(
    ("target", "profile", "count"),
    [
        ("table1", "paper", 2 * 2 * 6 + 2), ("table2", "paper", 2 * 6 + 1), ("table6", "paper", 4 * 2 * 6 + 2),
        ("table9", "paper", 2 * 2 * 7), ("table10", "paper", 6 * 4 * 4), ("figure3", "paper", 3 * 4 * 4),
        ("figure4", "paper", 3 * 4 * 4), ("figure1", "paper", 3 * 2 * 2), ("ablation-residual", "paper", 2 * 2 * 3),
        ("ablation-cross-head", "paper", 3 * 2 * 3), ("ablations", "paper", 5 * 2 * 3), ("table3", "paper", 0),
        ("figure2a", "paper", 0), ("table1", "small", 26), ("table2", "small", 13), ("tuning", "small", 7 * 3 * 4),
        ("ablations", "small", 5 * 3), ("all", "small", 39 + 15 + 84), ("table1", "smoke", 26),
        ("table9", "smoke", 14), ("table10", "smoke", 12),
    ],
)  # fmt: skip
def test_targets_have_as_many_cells_as_their_tables(lib, target, profile, count):
    found = cells(lib, target, profile)
    assert len(found) == count
    assert len({(cell.table, cell.name) for cell in found}) == count


def test_a_table_has_all_methods_and_full_once(lib):
    found = cells(lib, "table2")
    assert {cell.method for cell in found if cell.rank} == ROWS
    assert [cell.rank for cell in found if cell.method == "full"] == [0]


def test_names_tell_cells_apart(lib):
    assert "llama2-7b--crosslore--gsm8k--r128--s1" in {cell.name for cell in cells(lib, "table1")}
    assert "llama3-8b--crosslore--e2e--r256--s4--x0.6" in {cell.name for cell in cells(lib, "table10")}
    assert "smollm2-135m--lora--gsm8k--r16--s1--lr2e-4" in {cell.name for cell in cells(lib, "tuning", "small")}
    identity = cells(lib, "table10")[0].identity
    assert type(identity).__name__ == "Identity" and identity.name == cells(lib, "table10")[0].name


def test_table_10_changes_the_residual_ratio_alone(lib):
    found = {(cell.column, cell.settings["residual_ratio"]) for cell in cells(lib, "table10")}
    assert found == {("0.0", 0.0), ("0.6", 0.006), ("1.2", 0.012), ("1.8", 0.018)}
    assert all(set(cell.settings) == {"residual_ratio"} for cell in cells(lib, "table10"))


def test_variants_of_ablations_are_of_crosslore(lib):
    found = {cell.method: cell for cell in cells(lib, "ablations")}
    assert found["crosslore-no-residual"].base_method == "crosslore"
    assert found["crosslore-whole-svd"].settings["crosslore_projector"] == "svd"
    assert found["crosslore-no-residual"].table == "ablation-residual"


def test_seeds_are_counted_from_one_and_the_papers_ablation_has_four(lib):
    assert {cell.seed for cell in cells(lib, "table1", seeds=3)} == {1, 2, 3}
    assert {cell.seed for cell in cells(lib, "table1")} == {1}
    assert {cell.seed for cell in cells(lib, "table10")} == {1, 2, 3, 4}
    assert {cell.seed for cell in cells(lib, "table10", seeds=2)} == {1, 2}


def test_profiles_put_their_model_and_ranks_in_place_of_the_papers(lib):
    assert {(cell.model, cell.rank) for cell in cells(lib, "table1", "small")} == {
        ("smollm2-135m", rank) for rank in (0, 16, 32)
    }
    assert {cell.rank for cell in cells(lib, "ablations", "small")} == {16}
    assert {cell.model for cell in cells(lib, "all", "smoke")} == {"tiny-llama"}
    assert {cell.rank for cell in cells(lib, "table1", "smoke")} == {0, 4, 8}


def test_the_cheapest_comes_first_and_tuning_before_what_needs_it(lib):
    for profile in ("paper", "small", "smoke"):
        times = [lib.costs.estimated_seconds(cell) for cell in cells(lib, "table1", profile)]
        assert times == sorted(times)
    everything = [cell.table for cell in cells(lib, "all", "small")]
    assert everything.index("table1") > max(i for i, table in enumerate(everything) if table == "tuning")


def test_the_papers_estimate_is_its_own_time(lib):
    """Within a tenth of what table 1 prints for stock GaLore and LoRA on GSM8K."""
    hours = {cell.method: lib.costs.estimated_seconds(cell) / 3600 for cell in cells(lib, "table1", seeds=1)
             if cell.dataset == "gsm8k" and cell.rank in (0, 128)}  # fmt: skip
    assert hours["lora"] == pytest.approx(0.53, rel=0.1) and hours["galore_stock"] == pytest.approx(3.5, rel=0.1)


def test_the_estimate_of_13b_is_the_papers_time_too(lib):
    """Tables 6 and 8 at rank 16: LoRA, and GaLore with its refreshes."""
    hours = {(cell.dataset, cell.method): lib.costs.estimated_seconds(cell) / 3600
             for table in ("table6", "table8") for cell in cells(lib, table, seeds=1) if cell.rank == 16}  # fmt: skip
    for place, printed in (
        (("gsm8k", "lora"), 0.73), (("gsm8k", "galore_stock"), 7.18), (("mawps", "lora"), 0.50),
        (("mawps", "galore_stock"), 5.39), (("e2e", "lora"), 2.03), (("e2e", "galore_stock"), 11.29),
    ):  # fmt: skip
        assert hours[place] == pytest.approx(printed, rel=0.1), place


def test_a_variant_with_the_exact_svd_refreshes_as_galore_does(lib):
    some = [cell for cell in cells(lib, "ablation-cross-head") if (cell.dataset, cell.rank) == ("gsm8k", 16)]
    refresh = {cell.method: lib.costs.step_and_refresh(cell)[1] for cell in some}
    assert refresh == {"crosslore": 0.0, "crosslore-whole-randomized": 0.0, "crosslore-whole-svd": 280.0}


def test_the_small_profile_fits_into_its_hours(lib):
    """Tuning and tables 1 and 2, 123 trainings, in 3.5 hours of two processes."""
    runs = [cell for target in ("tuning", "table1", "table2") for cell in cells(lib, target, "small")]
    hours = sum(lib.costs.estimated_seconds(run) for run in runs) / 3600
    assert len(runs) == 123 and 4 < hours < 2 * 3.5


@pytest.mark.parametrize(
    ("target", "profile", "message"),
    [
        ("table11", "paper", r"target must be one of table1, .*'table11'"),
        ("table6", "small", r"in profile small, got 'table6'"),
        ("tuning", "paper", r"in profile paper, got 'tuning'"),
        ("table1", "smal", r"Did you mean 'small'"),
    ],
)
def test_unknown_targets_and_profiles_are_refused(lib, target, profile, message):
    with pytest.raises(ValueError, match=message):
        cells(lib, target, profile)


def test_no_seed_is_refused(lib):
    with pytest.raises(ValueError, match="seeds must be 1 or more, got 0"):
        cells(lib, "table1", seeds=0)


# Learning rates


def write_run(folder: Path, cell, *, loss, status="ok") -> None:
    path = folder / "tuning" / f"{cell.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = {} if loss is None else {"eval_loss": {"value": loss}}
    path.write_text(json.dumps({"status": status, "scores": scores}), encoding="utf-8")


def grid_of(lib, method, dataset):
    runs = [cell for cell in cells(lib, "tuning", "small") if (cell.method, cell.dataset) == (method, dataset)]
    return sorted(runs, key=lambda cell: cell.settings["learning_rate"])


def a_cell(lib, method, dataset="e2e", target="table2"):
    return next(c for c in cells(lib, target, "small") if (c.method, c.dataset) == (method, dataset))


def test_every_method_has_the_same_budget(lib):
    runs = cells(lib, "tuning", "small")
    assert {(len(grid_of(lib, m, d))) for m in (*ROWS, "full") for d in ("gsm8k", "mawps", "e2e")} == {4}
    assert len({lib.costs.training_steps(run) for run in runs if run.dataset == "e2e"}) == 1
    assert {run.seed for run in runs} == {1} and {run.rank for run in runs} == {0, 16}


def test_the_rate_of_the_lowest_held_out_loss_is_taken(lib, tmp_path):
    low, middle, *high = grid_of(lib, "lora", "e2e")
    for run, loss in ((low, 1.3), (middle, 1.1), *((run, 1.2) for run in high)):
        write_run(tmp_path, run, loss=loss)
    cell = a_cell(lib, "lora")
    assert lib.tuning.chosen_lr(tmp_path, cell) == middle.settings["learning_rate"]
    assert lib.tuning.with_lr(cell, tmp_path).settings == {"learning_rate": middle.settings["learning_rate"]}


def test_runs_that_diverged_are_passed_over(lib, tmp_path):
    low, *high = grid_of(lib, "full", "e2e")
    write_run(tmp_path, low, loss=2.0)
    for run in high:
        write_run(tmp_path, run, loss=float("nan"))
    assert lib.tuning.chosen_lr(tmp_path, a_cell(lib, "full")) == low.settings["learning_rate"]


def test_variants_take_the_rate_of_crosslore(lib, tmp_path):
    for run, loss in zip(grid_of(lib, "crosslore", "e2e"), (1.2, 1.3, 1.4, 1.1), strict=True):
        write_run(tmp_path, run, loss=loss)
    cell = a_cell(lib, "crosslore-no-residual", target="ablation-residual")
    best = grid_of(lib, "crosslore", "e2e")[-1].settings["learning_rate"]
    assert lib.tuning.with_lr(cell, tmp_path).settings == {"residual_ratio": 0.0, "learning_rate": best}


def test_missing_runs_are_named_with_the_command(lib, tmp_path):
    low, middle, *_, high = grid_of(lib, "dora", "e2e")
    write_run(tmp_path, middle, loss=1.0)
    with pytest.raises(lib.tuning.TuningError) as error:
        lib.tuning.chosen_lr(tmp_path, a_cell(lib, "dora"))
    assert low.name in str(error.value) and high.name in str(error.value) and middle.name not in str(error.value)
    assert "python scripts/reproduce.py tuning --profile small" in str(error.value)


def test_a_grid_that_diverged_and_a_file_that_is_none_are_errors(lib, tmp_path):
    runs = grid_of(lib, "lora", "e2e")
    for run in runs:
        write_run(tmp_path, run, loss=float("nan"))
    with pytest.raises(lib.tuning.TuningError, match="all 4 in .* diverged"):
        lib.tuning.chosen_lr(tmp_path, a_cell(lib, "lora"))
    write_run(tmp_path, runs[0], loss=None)
    with pytest.raises(lib.tuning.TuningError, match=r"lr2e-4\.json must be the result .*no score `eval_loss`"):
        lib.tuning.chosen_lr(tmp_path, a_cell(lib, "lora"))
    (tmp_path / "tuning" / f"{runs[0].name}.json").write_text("{", encoding="utf-8")
    with pytest.raises(lib.tuning.TuningError, match="cannot be used"):
        lib.tuning.chosen_lr(tmp_path, a_cell(lib, "lora"))


def test_cells_with_a_rate_keep_it(lib, tmp_path):
    paper = cells(lib, "table1")[0]
    assert lib.tuning.with_lr(paper, tmp_path) == paper
    given = replace(a_cell(lib, "lora"), settings={"learning_rate": 0.5})
    assert lib.tuning.with_lr(given, tmp_path) == given


# The data file


def edited(lib, tmp_path, old, new):
    text = lib.profiles.DATA.read_text(encoding="utf-8")
    assert old in text
    file = tmp_path / "profiles.toml"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    return lib.profiles.load_profiles(file)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('rank = "lora_rank"', 'rnak = "lora_rank"', "methods, lora, keys: .*'rnak'"),
        ("[profiles.small.methods.full]", "[profiles.small.methods.ful]", "must say something of every method"),
        ("cutoff_len = 1024 }", "cutoff_len = 1024 }\ntrain_row = 3", "'train_row'"),
        ("seeds = 1", 'seeds = "1"', "`seeds` must be a whole number"),
        ("[methods.lora]", "[methods.lora", "is not TOML"),
    ],
)
def test_a_malformed_file_is_refused(lib, tmp_path, old, new, message):
    with pytest.raises(lib.reading.PaperDataError, match=message):
        edited(lib, tmp_path, old, new)
