"""The tables of profile `small` in README.md and docs/reproduction.md are those of the result files."""

import sys

import pytest
from tests.scripts.result_samples import sample


@pytest.fixture(scope="module")
def lib(load_script):
    return load_script("make_small_tables")


@pytest.fixture
def make(lib, load_script):
    results = load_script("reproduction.results")

    def made(**changes):
        device = results.Device(name="AMD EPYC", kind="cpu", threads=1)
        fields = {
            "profile": "small", "model": "smollm2-135m", "rank": 16, "device": device, "hours": 0.5,
            "train": {"steps": 100, "cpu_seconds": 150.0}, "peak_gib": {"rss": 2.25},
        }  # fmt: skip
        return sample(results, **{**fields, **changes})

    return made


def rows(text):
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if "| ---" not in line
    ]


def test_scores_intervals_and_costs_stand_in_their_places(lib, make):
    found = lib.overview([
        make(table="table2", dataset="e2e"), make(dataset="mawps"), make(dataset="gsm8k", method="full", rank=0),
        make(dataset="e2e", table="table2", method="lora", rank=32), make(dataset="mawps", seed=2, add=50.0),
    ])  # fmt: skip
    assert rows(found)[1][:2] == ["before training", "–"] and rows(found)[1][5:] == ["–", "–"]
    assert rows(found)[2:] == [
        ["CrossLore", "16", "60.0 [58.5, 61.5]", "34.0 [31.5, 36.5]", "not run", "1.50", "2.25"],
        ["LoRA", "32", "60.0 [58.5, 61.5]", "not run", "not run", "1.50", "2.25"],
        ["Full fine-tuning", "–", "not run", "not run", "34.0 [31.5, 36.5]", "not run", "not run"],
    ]


def test_a_cell_that_failed_says_so(lib, make):
    failed = make(table="table2", dataset="e2e", status="oom", hours=None, peak_gib={}, train={})
    assert rows(lib.overview([failed]))[2][2:] == ["oom", "not run", "not run", "not run", "not run"]


def test_the_chosen_rate_is_that_of_the_lowest_loss(lib, make, load_script):
    score = load_script("reproduction.results").Score
    results = [
        make(table="tuning", dataset="e2e", column=rate, scores={"eval_loss": score(value=loss)})
        for rate, loss in (("2e-6", 1.5), ("6e-6", 1.25), ("2e-5", 1.75))
    ]
    found = {row[0]: row[1:] for row in lib.chosen_rates(results)}
    assert found["CrossLore"] == ("6e-6 (1.250)", "not run", "not run")
    diverged = make(table="tuning", dataset="e2e", column="6e-5", scores={"eval_loss": score(value=None, reason="no")})
    assert lib.chosen_rates([*results, diverged]) == lib.chosen_rates(results)


def test_the_pages_are_up_to_date_and_a_stale_one_is_named(lib, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_small_tables.py", "--check"])
    assert lib.main() == 0
    page = tmp_path / "README.md"
    page.write_text(lib.README.read_text(encoding="utf-8").replace("| E2E, BLEU |", "| E2E |"), encoding="utf-8")
    docs = tmp_path / "reproduction.md"
    docs.write_text(lib.DOCS.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(lib, "README", page)
    monkeypatch.setattr(lib, "DOCS", docs)
    assert lib.main() == 1 and "README.md is out of date" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["make_small_tables.py"])
    assert lib.main() == 0 and page.read_text(encoding="utf-8") == lib.ROOT.joinpath("README.md").read_text("utf-8")
    page.write_text("nothing", encoding="utf-8")
    assert lib.main() == 2 and "Put them where the text belongs" in capsys.readouterr().err
