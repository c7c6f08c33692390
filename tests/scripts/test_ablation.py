import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "crosslore[eval]"')
pytest.importorskip("tqdm", reason='needs tqdm: pip install "crosslore[eval]"')

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
INPUTS = {"model_sha256": "m", "data_sha256": "d"}
LRS = (1e-4, 1e-3)


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    sys.path.insert(0, str(BENCHMARKS))
    names = {"runs": "ablation", "matrix": "ablation_matrix", "files": "ablation_files", "report": "ablation_report"}
    yield SimpleNamespace(**{short: importlib.import_module(name) for short, name in names.items()})
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def bench(modules: SimpleNamespace) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
    )
    rows = [modules.runs.Example([(7 * i + j) % 48 for j in range(6 + i % 3)], 3) for i in range(16)]
    return modules.runs.Bench(transformers.LlamaForCausalLM(config).train(), {"tiny": (rows[:12], rows[12:])})


def make_task(matrix: ModuleType, name: str = "tiny", steps: int = 4) -> Any:
    return matrix.Task(name=name, train_file="t", steps=steps, batch_size=2, max_tokens=16, held_out_rows=4)


def make_plan(matrix: ModuleType, lrs: tuple[float, ...] = LRS, **changes: Any) -> Any:
    plan = importlib.import_module("ablation_plan").Plan
    values = {"inputs": {"tiny": INPUTS}, "tasks": [make_task(matrix)], "first_lrs": lrs[:2], "seeds": 2}
    values |= {"lr_margin": 0.0, **changes}
    return plan(lrs=lrs, **values)


def runner(runs: ModuleType, bench: Any, folder: Path, done: list[str]) -> Callable[[Any], Future[dict[str, Any]]]:
    """Return a `submit` that runs at once, in this process, and notes the file."""

    def submit(cell: Any) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        done.append(cell.file_name)
        future.set_result(runs.run_cell(bench, cell, folder))
        return future

    return submit


def run(
    modules: SimpleNamespace, bench: Any, folder: Path, plan: Any, variants: list[Any], **options: Any
) -> list[str]:
    done: list[str] = []
    results = modules.files.read_results(folder)
    modules.runs.run_variants(plan, variants, results, runner(modules.runs, bench, folder, done), **options)
    return done


def fake(plan: Any, matrix: ModuleType, folder: Path, loss: Callable[[Any], float], variants: list[Any]) -> None:
    """Write result files of runs that nobody has done."""
    files = importlib.import_module("ablation_files")
    results: dict[str, Any] = {}
    while cells := plan.ready(variants, results):
        for cell in cells:
            end = loss(cell)
            record = files.new_record(cell) | {"status": "ok" if math.isfinite(end) else "diverged", "seconds": 2.0}
            record |= {"seconds_per_step": 1.0, "held_out": {"start": 2.0, "end": end}}
            files.write_result(record, folder / cell.file_name)
            results[cell.hash] = record


def loss_of(better: dict[str, float]) -> Callable[[Any], float]:
    """Return 1 for the paper's setting, less for variants whose fields `better` names; best at the larger rate."""

    def loss(cell: Any) -> float:
        gain = sum(value for name, value in better.items() if name in str(dict(cell.variant.fields)))
        return 1.0 - gain + 0.01 * cell.seed + (0.5 if cell.lr == LRS[0] else 0.0)

    return loss


def test_a_run_writes_one_result_with_all_that_it_depends_on(
    modules: SimpleNamespace, bench: Any, tmp_path: Path
) -> None:
    plan = make_plan(modules.matrix)
    done = run(modules, bench, tmp_path, plan, [modules.matrix.PAPER])
    assert done[:2] == ["tiny--paper--lr0.0001--s0.json", "tiny--paper--lr0.001--s0.json"]
    assert len(done) == 3 and done[2].endswith("--s1.json")  # the other seed, at the better rate only
    result = json.loads((tmp_path / done[1]).read_text())
    assert result["status"] == "ok" and result["error"] is None and result["steps"] == 4
    assert result["held_out"]["end"] < result["held_out"]["start"]
    assert result["losses"][-1]["step"] == 4
    assert result["config"]["options"]["refresh_every"] == 20 and result["config"]["inputs"] == INPUTS
    missing = {"commit", "source", "packages", "device", "seconds", "peak_rss_gib", "date", "seed"} - result.keys()
    assert not missing


def test_a_run_repeats_bitwise_from_the_initial_weights(modules: SimpleNamespace, bench: Any, tmp_path: Path) -> None:
    plan = make_plan(modules.matrix)
    cell = plan.search(plan.tasks[0], modules.matrix.PAPER, {})[1]
    first, second = (modules.runs.run_cell(bench, cell, tmp_path) for _ in range(2))
    assert first["held_out"] == second["held_out"] and first["losses"] == second["losses"]


def test_finished_runs_are_skipped_and_a_changed_configuration_runs_again(
    modules: SimpleNamespace, bench: Any, tmp_path: Path
) -> None:
    plan, variants = make_plan(modules.matrix), [modules.matrix.PAPER]
    assert len(run(modules, bench, tmp_path, plan, variants)) == 3
    assert run(modules, bench, tmp_path, plan, variants) == []
    renamed = modules.matrix.Variant(name="other-name", fields=modules.matrix.BASE)
    assert run(modules, bench, tmp_path, plan, [renamed]) == []  # the same configuration is the same run
    longer = make_plan(modules.matrix, tasks=[make_task(modules.matrix, steps=5)])
    assert len(run(modules, bench, tmp_path, longer, variants)) == 3
    other_data = make_plan(modules.matrix, inputs={"tiny": {**INPUTS, "data_sha256": "e"}})
    assert len(run(modules, bench, tmp_path, other_data, variants)) == 3


def test_an_interrupted_plan_goes_on_with_the_run_that_was_cut(
    modules: SimpleNamespace, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, train = make_plan(modules.matrix), modules.runs.train

    def cut(bench: Any, cell: Any, record: Any) -> None:
        if cell.lr == LRS[1]:
            raise KeyboardInterrupt
        train(bench, cell, record)

    monkeypatch.setattr(modules.runs, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        run(modules, bench, tmp_path, plan, [modules.matrix.PAPER])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny--paper--lr0.0001--s0.json"]
    monkeypatch.setattr(modules.runs, "train", train)
    done = run(modules, bench, tmp_path, plan, [modules.matrix.PAPER])
    assert done[0] == "tiny--paper--lr0.001--s0.json" and len(done) == 2


def test_no_run_starts_after_the_budget(modules: SimpleNamespace, bench: Any, tmp_path: Path) -> None:
    plan = make_plan(modules.matrix)
    assert run(modules, bench, tmp_path, plan, [modules.matrix.PAPER], deadline=0.0) == []


def test_divergence_is_a_result_and_never_the_best_rate(modules: SimpleNamespace, bench: Any, tmp_path: Path) -> None:
    plan = make_plan(modules.matrix, lrs=(1e-3, 1e30))
    adamw = modules.matrix.Variant(name="adamw", preset="adamw")
    done = run(modules, bench, tmp_path, plan, [adamw])
    result = json.loads((tmp_path / "tiny--adamw--lr1e+30--s0.json").read_text())
    assert result["status"] == "diverged" and result["held_out"]["end"] is None
    assert done[-1] == "tiny--adamw--lr0.001--s1.json"


def test_a_failure_is_a_result_and_is_tried_again_when_asked(
    modules: SimpleNamespace, bench: Any, tmp_path: Path
) -> None:
    plan = make_plan(modules.matrix)
    wide = modules.matrix.Variant(name="wide", fields={**modules.matrix.BASE, "rank": 65})
    assert len(run(modules, bench, tmp_path, plan, [wide])) == 2  # the grid; no rate is left for other seeds
    result = json.loads((tmp_path / "tiny--wide--lr0.001--s0.json").read_text())
    assert result["status"] == "failed" and "rank must be in" in result["error"]
    assert len(modules.files.read_results(tmp_path)) == 2
    assert modules.files.read_results(tmp_path, failed=False) == {}


def test_the_search_goes_outwards_until_the_best_rate_has_two_neighbours(
    modules: SimpleNamespace, tmp_path: Path
) -> None:
    grid, paper = (1e-4, 1e-3, 1e-2, 1e-1), modules.matrix.PAPER
    for best, searched in ((1e-4, grid[:3]), (1e-3, grid[:3]), (1e-2, grid[1:]), (1e-1, grid[1:])):
        plan, folder = make_plan(modules.matrix, grid, first_lrs=grid[1:3]), tmp_path / f"{best}"
        assert plan.left(plan.tasks[0], paper, {}) == 4  # two rates, the one that follows from them, one more seed
        fake(plan, modules.matrix, folder, lambda cell: abs(math.log10(cell.lr / best)), [paper])  # noqa: B023
        results = modules.files.read_results(folder)
        assert {result["lr"] for result in results.values()} == set(searched)
        assert plan.best_lr(plan.tasks[0], paper, results) == best and plan.left(plan.tasks[0], paper, results) == 0
        row = modules.report.make_row(plan, plan.tasks[0], paper, results, stage=1, best=None)
        assert row.lr_at_edge == (best in (1e-4, 1e-1))


def test_rates_that_are_close_for_the_first_seed_are_decided_by_all(modules: SimpleNamespace, tmp_path: Path) -> None:
    plan, paper = make_plan(modules.matrix, lr_margin=0.01), modules.matrix.PAPER

    def loss(cell: Any) -> float:  # the smaller rate is a little better for seed 0, and much worse for the other
        return 1.0 + (0.5 * cell.seed if cell.lr == LRS[0] else 0.005)

    fake(plan, modules.matrix, tmp_path, loss, [paper])
    results = modules.files.read_results(tmp_path)
    assert len(results) == 4 and plan.best_lr(plan.tasks[0], paper, results) == LRS[1]
    one = {h: r for h, r in results.items() if not (r["lr"] == LRS[0] and r["seed"] == 1)}
    assert plan.best_lr(plan.tasks[0], paper, one) is None
    assert [cell.seed for cell in plan.ready([paper], one)] == [1]
    follower = modules.matrix.Variant(name="follower", fields={**modules.matrix.BASE, "rank": 8}, like=paper)
    assert plan.left(plan.tasks[0], follower, one) == 2  # the rate is not known, the seeds are
    assert {(cell.lr, cell.seed) for cell in plan.ready([follower], results)} == {(LRS[1], 0), (LRS[1], 1)}


def test_a_gain_within_its_standard_error_wins_nothing(modules: SimpleNamespace, tmp_path: Path) -> None:
    matrix, plan = modules.matrix, make_plan(modules.matrix)

    def loss(cell: Any) -> float:
        changed = dict(cell.variant.fields)
        noise = 0.1 * (-1) ** cell.seed  # of the difference of two seeds: standard error 0.1
        return 1.0 - 0.11 * ("fit_window" in changed) - 0.09 * ("moments" in changed) + noise * (changed != matrix.BASE)

    fake(plan, matrix, tmp_path, loss, matrix.stage1())
    results = modules.files.read_results(tmp_path)
    assert plan.gain({"window": "4"}, results) == pytest.approx((-0.11, 0.1))
    assert plan.winners(results) == {"window": "4"}


def test_an_unknown_field_is_named_with_its_variant(modules: SimpleNamespace) -> None:
    wrong = modules.matrix.Variant(name="typo", fields={"residual_rul": "exact"})
    with pytest.raises(TypeError, match=r"variant 'typo'.*'residual_rul'.*Did you mean 'residual_rule'"):
        modules.matrix.resolve(wrong)


def test_every_variant_of_stage_1_resolves_and_differs(modules: SimpleNamespace) -> None:
    plan = make_plan(modules.matrix)
    cells = [plan.cell(plan.tasks[0], variant, 1e-3, 0) for variant in modules.matrix.stage1()]
    assert len({cell.hash for cell in cells}) == len(cells)


def test_stage_2_follows_from_the_files_of_stage_1(modules: SimpleNamespace, tmp_path: Path) -> None:
    matrix, plan = modules.matrix, make_plan(modules.matrix)
    better = {"'fit_window': 4": 0.2, "'residual': None": 0.1, "'residual_select'": 0.05}
    fake(plan, matrix, tmp_path, loss_of(better), matrix.stage1())
    second = plan.stage2(modules.files.read_results(tmp_path))
    assert [v.name for v in second[:3]] == ["best", "best-without-residual", "best-without-window"]
    assert second[0].fields == {**matrix.BASE, "residual": None, "fit_window": 4}  # nothing to select without one
    others = ["residual-exact", "select-residual", "heads-own", "moments-rotate", "residual-exact-select-residual"]
    assert [v.name for v in second[3:]] == [f"best-{name}" for name in others]
    assert all(v.like == second[0] for v in second[1:])


def test_values_that_help_only_together_win_together(modules: SimpleNamespace, tmp_path: Path) -> None:
    matrix, plan = modules.matrix, make_plan(modules.matrix)

    def loss(cell: Any) -> float:
        both = {"residual_rule", "residual_select"} <= cell.variant.fields.keys()
        return 0.9 if both else 1.0 + 0.1 * len(cell.variant.fields.keys() - matrix.BASE.keys())

    fake(plan, matrix, tmp_path, loss, matrix.stage1())
    assert plan.winners(modules.files.read_results(tmp_path)) == {"residual": "exact", "select": "residual"}


def test_stage_2_before_the_end_of_stage_1_says_what_is_missing(modules: SimpleNamespace, tmp_path: Path) -> None:
    plan = make_plan(modules.matrix)
    fake(plan, modules.matrix, tmp_path, loss_of({}), [modules.matrix.PAPER])
    with pytest.raises(LookupError, match=r"of its runs are missing, the first one is tiny--residual-off--"):
        plan.stage2(modules.files.read_results(tmp_path))


def test_the_report_of_files_with_missing_cells(modules: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "crosslore[llamafactory]"')
    matrix, report = modules.matrix, modules.report
    tasks = [make_task(matrix), make_task(matrix, "other")]
    plan = make_plan(matrix, tasks=tasks, inputs={"tiny": INPUTS, "other": INPUTS})
    half = make_plan(matrix)
    fake(
        half,
        matrix,
        tmp_path,
        loss_of({"fit_window": 0.2}),
        [matrix.PAPER, matrix.combined("window-4", {"window": "4"})],
    )
    fake(half, matrix, tmp_path, lambda cell: math.inf, [matrix.combined("residual-off", {"residual": "off"})])
    results = modules.files.read_results(tmp_path)
    report.report(results, plan, folder=tmp_path, table=tmp_path / "docs" / "table.md")
    text = (tmp_path / "docs" / "table.md").read_text()
    assert "| window-4 | 0.001* | 0.8050 ± 0.0071 | -0.2000 ± 0.0000 |" in text
    assert "| residual-off |  | diverged |  |" in text
    rows = len(matrix.stage1()) + len(matrix.REFERENCES)
    # The last table needs both tasks: no line of it has them.
    assert text.count("| not run |") == 2 * rows - 3 + len(matrix.stage1()) - 1
    summary = (tmp_path / "summary.csv").read_text().splitlines()
    assert len(summary) == 1 + 2 * rows
    assert (tmp_path / "ablation.png").stat().st_size > 1000


def test_the_check_finds_a_table_that_its_files_did_not_make(
    modules: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "crosslore[llamafactory]"')
    table = tmp_path / "table.md"
    fake(make_plan(modules.matrix), modules.matrix, tmp_path, loss_of({}), [modules.matrix.PAPER])
    options = ["report", "--output", str(tmp_path), "--table", str(table)]
    monkeypatch.setattr(sys, "argv", options)
    assert modules.report.main() == 0
    monkeypatch.setattr(sys, "argv", [*options, "--check"])
    assert modules.report.main() == 0
    table.write_text(table.read_text().replace("not run", "0.9", 1))
    assert modules.report.main() == 1


def test_the_report_after_both_stages_compares_with_the_best(modules: SimpleNamespace, tmp_path: Path) -> None:
    matrix, report, plan = modules.matrix, modules.report, make_plan(modules.matrix)
    loss = loss_of({"'fit_window': 4": 0.2, "'moments'": 0.1})
    fake(plan, matrix, tmp_path, loss, matrix.stage1())
    fake(plan, matrix, tmp_path, loss, plan.stage2(modules.files.read_results(tmp_path)))
    rows = {row.variant: row for row in report.make_rows(plan, modules.files.read_results(tmp_path))}
    assert rows["best"].to_paper == pytest.approx([-0.3, -0.3]) and rows["best"].to_best == []
    assert rows["best-without-window"].to_best == pytest.approx([0.2, 0.2])


def test_the_dry_run_counts_done_runs_and_minutes(modules: SimpleNamespace, tmp_path: Path) -> None:
    plan = make_plan(modules.matrix)
    fake(plan, modules.matrix, tmp_path, loss_of({}), [modules.matrix.PAPER])
    lines = modules.report.planned(plan, modules.files.read_results(tmp_path), workers=2).splitlines()
    assert lines[1].split() == ["tiny", "paper", "3", "0", "0.0"]
    assert lines[2].split()[:4] == ["tiny", "residual-off", "0", "3"]


def test_a_file_that_is_no_result_is_named(modules: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "e2e--paper--lr1--s0.json").write_text("{}")
    with pytest.raises(ValueError, match=r"e2e--paper--lr1--s0.json is no result"):
        modules.files.read_results(tmp_path)


def test_the_loss_counts_the_tokens_of_the_answers_only(modules: SimpleNamespace, bench: Any) -> None:
    long, short = modules.runs.Example([1, 2, 3, 4, 5], 2), modules.runs.Example([6, 7, 8], 1)
    total, count = modules.runs.answer_loss(bench.model, [long, short])
    assert count == 5
    expected = 0.0
    for example in (long, short):
        with torch.no_grad():
            logits = bench.model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
        expected -= sum(float(logits[i - 1, example.ids[i]]) for i in range(example.prompt, len(example.ids)))
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_missing_files_are_an_error_with_advice(
    modules: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert modules.runs.main(["--model", str(tmp_path), "--output", str(tmp_path), "--dry-run"]) == 1
    assert "scripts/get_model.py" in capsys.readouterr().err
