"""The benchmark suite on tiny shapes: columns, interruptions, outdated rows, pictures, and what its measures mean."""

import importlib
import math
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from crosslore import PRESETS

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("galore", "crosslore", "galore-torch", "torch AdamW fused")
FILES = (
    "step_time", "refresh_time", "memory", "subspace_error", "kept_positions", "time_split", "train_step", "step_ratio",
)  # fmt: skip
ENVIRONMENT = {"profile", "device", "threads", "dtype", "torch", "packages", "source", "python", "commit", "date"}


@pytest.fixture(scope="module")
def bench():
    """A function that imports a module of `benchmarks/`, which is a folder of programs, not a package."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def finished(bench, tmp_path_factory):
    """A folder with a finished run of all parts."""
    out = tmp_path_factory.mktemp("benchmarks")
    assert bench("run").main(arguments(out)) == 0
    return out


def arguments(out, *more, names=NAMES):
    return ["--tiny", "--threads", "1", "--out", str(out), "--contenders", ",".join(names), *more]


def interrupt_after(bench, monkeypatch, count):
    """Let the run be stopped, as by Ctrl-C, when it has finished so many measurements."""
    append, calls = bench("common").Records.append, []

    def stopping(self, **values):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(1)
        append(self, **values)

    monkeypatch.setattr(bench("common").Records, "append", stopping)


@pytest.mark.parametrize("part", FILES)
def test_each_part_writes_rows_with_their_environment(bench, finished, part):
    rows = bench("common").read_rows(finished / f"{part}.csv")
    assert rows and all(set(row) >= ENVIRONMENT for row in rows)
    assert all(row["device"] and row["commit"] and f"crosslore={version()}" in row["packages"] for row in rows)
    assert {row["threads"] for row in rows} == {"1"}


def version():
    return importlib.import_module("importlib.metadata").version("crosslore")


def test_the_page_shows_every_row_with_its_conditions(bench, finished, tmp_path, capsys):
    tables, page = bench("tables"), tmp_path / "page.md"
    options = ["--results", str(finished), "--page", str(page)]
    assert tables.main(options) == 0 and tables.main([*options, "--check"]) == 0
    text = page.read_text()
    row = {r["contender"]: r for r in bench("common").read_rows(finished / "step_time.csv")}["galore"]
    assert f"| galore | {float(row['amortised_seconds']):.3g} | {float(row['ordinary_seconds']):.3g} |" in text
    assert text.count("| torch AdamW fused |") == 3 and text.count("| warm start, 8 old |") == 6
    assert text.count(f"torch {torch.__version__}, commit {row['commit']}, {row['date'][:10]}, tiny sizes.") == len(
        FILES
    )
    page.write_text(text + "edited")
    assert tables.main([*options, "--check"]) == 1 and "out of date" in capsys.readouterr().err


def test_the_page_says_what_was_not_measured(bench, tmp_path):
    assert bench("tables").page(tmp_path).count("Not measured.") == len(FILES)


def test_step_time_has_the_figures_of_every_contender(bench, finished):
    rows = {row["contender"]: row for row in bench("common").read_rows(finished / "step_time.csv")}
    assert set(rows) == set(NAMES) and all(row["status"] == "ok" for row in rows.values())
    for row in rows.values():
        ordinary, amortised = float(row["ordinary_seconds"]), float(row["amortised_seconds"])
        assert amortised == pytest.approx(ordinary + float(row["refresh_cost_seconds"]) / 200, rel=1e-4)
        assert float(row["worst_over_median"]) > 0
    assert float(rows["galore-torch"]["amortised_over_galore_torch"]) == 1
    assert rows["galore-torch"]["cycle"] == "1" and rows["torch AdamW fused"]["cycle"] == "0"


def test_step_ratio_divides_by_lora_of_the_same_turn(bench, tmp_path):
    common, name = bench("common"), "crosslore_plus compact"
    assert bench("run").main(arguments(tmp_path, "--only", "step_ratio", names=(name,))) == 0
    rows = {row["contender"]: row for row in common.read_rows(tmp_path / "step_ratio.csv")}
    assert set(rows) == {"LoRA", "torch AdamW foreach", name} and float(rows["LoRA"]["over_lora"]) == 1
    turns = common.grouped(common.read_rows(tmp_path / "raw" / "step_ratio.csv"), "turn").values()
    seconds = [{row["contender"]: float(row["seconds"]) for row in turn} for turn in turns]
    ratios = sorted(turn[name] / turn["LoRA"] for turn in seconds)
    assert len(ratios) == 2 and float(rows[name]["over_lora"]) == pytest.approx(sum(ratios) / 2, rel=1e-4)
    assert ratios[0] <= float(rows[name]["over_lora_low"]) <= float(rows[name]["over_lora_high"]) <= ratios[1]
    mean = sum(turn[name] for turn in seconds) / sum(turn["LoRA"] for turn in seconds)
    assert float(rows[name]["over_lora_mean"]) == pytest.approx(mean, rel=1e-4)


def test_memory_counts_the_state_exactly(bench, finished):
    rows = {row["contender"]: row for row in bench("common").read_rows(finished / "memory.csv")}
    adamw, elements = rows["torch AdamW fused"], int(rows["galore"]["weight_bytes"]) // 4
    weights = 9 + 1  # seven matrices, two norms, the embedding; a step counter of 4 bytes each
    assert int(adamw["state_bytes"]) == 2 * 4 * elements + 4 * weights
    assert float(adamw["state_over_adamw"]) == 1 > float(rows["galore"]["state_over_adamw"])
    assert int(rows["galore"]["refresh_temporary_bytes"]) > int(rows["galore"]["step_temporary_bytes"])


def test_no_choice_of_positions_holds_more_than_the_later_energy_itself(bench, finished):
    rows = bench("common").read_rows(finished / "kept_positions.csv")
    for kind in ("q_proj", "k_proj"):
        share = {row["choice"]: float(row["share_median"]) for row in rows if row["weight"] == kind}
        assert max(share, key=share.get) == "later"


def test_subspace_error_orders_the_bases(bench, finished):
    rows = bench("common").read_rows(finished / "subspace_error.csv")
    same = {row["basis"]: float(row["error_median"]) for row in rows if row["lag"] == "0" and row["weight"] == "q_proj"}
    assert same["exact"] < same["one head, best"] <= same["one head, random"]
    assert same["exact"] < same["window 8"] < same["random"]
    assert {row["weight"] for row in rows} == {"q_proj", "k_proj", "up_proj"}


def test_time_split_accounts_for_the_refresh_in_its_interval(bench, finished):
    rows = bench("common").read_rows(finished / "time_split.csv")
    galore = {row["figure"]: row for row in rows if row["contender"] == "galore"}
    assert float(galore["ordinary"]["fit"]) == 0 < float(galore["cycle of 1 steps"]["fit"])
    assert float(galore["amortised"]["fit"]) == pytest.approx(float(galore["cycle of 1 steps"]["fit"]) / 200, rel=1e-3)
    assert all(float(row["project"]) > 0 and float(row["project_back"]) > 0 for row in rows)
    assert all(float(row["residual"]) > 0 for row in rows if row["contender"] == "crosslore")


def test_a_finished_run_is_not_measured_again_unless_fresh(bench, finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    before = {path.name: path.read_bytes() for path in (out / "raw").iterdir()}
    assert bench("run").main(arguments(out)) == 0
    assert {path.name: path.read_bytes() for path in (out / "raw").iterdir()} == before
    assert bench("run").main(arguments(out, "--only", "b", "--fresh")) == 0
    assert len(bench("common").read_rows(out / "memory.csv")) == len(NAMES)


@pytest.mark.parametrize(("part", "count"), [("step_time", 5), ("refresh_time", 15), ("memory", 2), ("time_split", 6)])
def test_an_interrupted_run_goes_on(bench, finished, tmp_path, monkeypatch, capsys, part, count):
    raw = tmp_path / "raw" / f"{part}.csv"
    with monkeypatch.context() as patch:
        interrupt_after(bench, patch, count)
        assert bench("run").main(arguments(tmp_path, "--only", part)) == 130
    assert "same command goes on" in capsys.readouterr().out
    first = bench("common").read_rows(raw)
    assert len(first) == count
    assert bench("run").main(arguments(tmp_path, "--only", part)) == 0
    rows = bench("common").read_rows(raw)
    keys = [tuple(row.get(c) for c in ("workload", "contender", "measure", "round")) for row in rows]
    expected = bench("common").read_rows(finished / "raw" / f"{part}.csv")
    assert len(keys) == len(set(keys)) == len(expected)
    kept = [row for row in first if row in rows]
    assert kept and first[0] in rows  # what was complete was not measured again


def test_a_round_that_was_interrupted_is_measured_again(bench, tmp_path, monkeypatch):
    names = ("galore-torch", "torch AdamW fused")
    with monkeypatch.context() as patch:
        interrupt_after(bench, patch, 1)
        bench("run").main(arguments(tmp_path, "--only", "step_time", names=names))
    lonely = bench("common").read_rows(tmp_path / "raw" / "step_time.csv")
    bench("run").main(arguments(tmp_path, "--only", "step_time", names=names))
    rows = bench("common").read_rows(tmp_path / "raw" / "step_time.csv")
    assert lonely[0]["measure"] == "ordinary" and lonely[0] not in rows


def test_a_row_that_was_cut_off_is_dropped(bench, finished, tmp_path):
    text = (finished / "raw" / "memory.csv").read_text(encoding="utf-8")
    path = tmp_path / "raw" / "memory.csv"
    path.parent.mkdir()
    path.write_text(text[: len(text) - 30], encoding="utf-8")
    assert len(bench("common").read_rows(path)) == len(NAMES) - 1
    assert bench("run").main(arguments(tmp_path, "--only", "memory")) == 0
    assert len(bench("common").read_rows(path)) == len(NAMES)


def test_outdated_rows_are_replaced_and_other_configurations_stay(bench, tmp_path, capsys):
    common = bench("common")
    options = common.Options(out=tmp_path, profile="tiny", threads=1)
    records = common.Records("part", ("contender", "round"), options)
    for threads, source in ((1, "old"), (2, "old"), (1, records.environment["source"])):
        records.environment |= {"threads": threads, "source": source}
        records.append(contender="a", round=0)
    again = common.Records("part", ("contender", "round"), options)
    assert "1 older measurements of this configuration are replaced" in capsys.readouterr().out
    rows = common.read_rows(again.path)
    assert [(row["threads"], row["source"] == "old") for row in rows] == [("2", True), ("1", False)]
    assert len(again.select(contender="a")) == 1


def test_a_slow_first_step_counts_as_a_refresh(bench, tmp_path, monkeypatch):
    for module in ("step_time", "memory"):
        monkeypatch.setattr(bench(module), "SLOW", 0.0)
    assert bench("run").main(arguments(tmp_path, "--only", "step_time,b", names=NAMES[1:3])) == 0
    rows = bench("common").read_rows(tmp_path / "raw" / "step_time.csv")
    notes = {row["contender"]: row["note"] for row in rows if row["measure"] == "cycle"}
    assert notes == {"galore-torch": "first step", "crosslore": ""}
    rows = bench("common").read_rows(tmp_path / "memory.csv")
    assert [row["status"] for row in rows] == ["ok", "ok"] and all(int(row["refresh_temporary_bytes"]) for row in rows)


def test_a_contender_that_cannot_run_is_a_row_with_the_reason(bench, tmp_path, monkeypatch):
    def broken(*_):
        raise ImportError("no module named galore_torch")

    monkeypatch.setattr(bench("contenders"), "_galore", broken)
    assert bench("run").main(arguments(tmp_path, "--only", "step_time,b", names=NAMES[2:])) == 0
    for part in ("step_time", "memory"):
        rows = {row["contender"]: row["status"] for row in bench("common").read_rows(tmp_path / f"{part}.csv")}
        assert rows["torch AdamW fused"] == "ok"
        assert rows["galore-torch"] == "skipped: ImportError: no module named galore_torch"


def test_a_contender_that_changes_the_shared_gradients_is_left_out(bench):
    who = bench("contenders")
    weight = torch.nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.ones(4, 4)
    model, optimizer = torch.nn.ParameterList([weight]), torch.optim.SGD([weight], lr=0.1)
    who.warm_up(optimizer, model, "SGD")
    optimizer.register_step_pre_hook(lambda *_: [weight.grad.add_(1)].clear())
    with pytest.raises(who.Skip, match="changes the gradients"):
        who.warm_up(optimizer, model, "SGD")


def test_every_preset_is_a_contender_and_starts(bench):
    who, options = bench("contenders"), bench("common").Options(out=Path("."), profile="tiny", threads=1)
    model = who.build_workload(who.workloads(options)["tiny"], options)
    found = who.contenders(options)
    assert set(PRESETS) <= set(found)
    for name in PRESETS:
        optimizers = [found[name].ordinary(model, 8)] + [found[name].cycling(model, 8)] * bool(found[name].cycle)
        for optimizer in optimizers:
            who.warm_up(optimizer, model, name)
        who.check_sane(model, {name: optimizers[0]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--only", "f"], "unknown part 'f'. Known, by letter or name: a: step_time, refresh_time; b: memory"),
        (["--only", ","], "names no part"),
        (["--contenders", "galor"], "unknown contender galor. Known: galore,"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_a_wrong_argument_is_a_clear_error(bench, tmp_path, capsys, given, message):
    with pytest.raises(SystemExit):
        bench("run").main(["--tiny", "--out", str(tmp_path), *given])
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_named_data_folder_without_rows_is_a_clear_error(bench, tmp_path):
    options = bench("common").Options(out=tmp_path, data=tmp_path)
    with pytest.raises(FileNotFoundError, match="neither e2e_train.jsonl nor e2e/trainset.csv"):
        bench("real_model").find_rows(options)


def test_rows_come_from_the_original_csv_file_too(bench, tmp_path, monkeypatch):
    (tmp_path / "e2e").mkdir()
    (tmp_path / "e2e" / "trainset.csv").write_text('mr,ref\n"name[A], food[B]","A has B."\n', encoding="utf-8")
    monkeypatch.setenv("CROSSLORE_DATA_DIR", str(tmp_path))
    name, rows = bench("real_model").find_rows(bench("common").Options(out=tmp_path))
    assert name == "e2e" and rows[0]["input"] == "name[A], food[B]" and rows[0]["output"] == "A has B."


def test_pictures_are_made_from_the_csv_files_alone(bench, finished, tmp_path):
    for part in FILES:
        shutil.copy(finished / f"{part}.csv", tmp_path)
    paths = bench("plots").draw_all(tmp_path)
    assert [path.name for path in paths] == [f"{part}.png" for part in FILES]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert bench("plots").draw_all(tmp_path / "empty") == []


def test_temporary_bytes_are_what_a_call_allocates_at_most_at_one_moment(bench):
    kept = []

    def step():
        first = torch.zeros(1000, 1000)
        kept[:] = [torch.zeros(500, 1000)]
        del first

    assert bench("memory").temporary_bytes(step, "cpu") == 6_000_000
    assert bench("memory").temporary_bytes(step, "cpu", leaves_state=True) == 4_000_000


def test_error_equals_the_residual_written_out(bench):
    torch.manual_seed(0)
    grad, basis = torch.randn(7, 5), torch.linalg.qr(torch.randn(5, 2)).Q
    slow = torch.linalg.norm(grad - grad @ basis @ basis.mT) / torch.linalg.norm(grad)
    assert math.isclose(bench("subspace_error").error(grad, basis, "right"), float(slow), rel_tol=1e-5)
    assert math.isclose(bench("subspace_error").error(grad.mT, basis, "left"), float(slow), rel_tol=1e-5)


def test_clock_counts_an_inner_phase_once(bench):
    clock = bench("time_split").Clock("cpu")
    with clock.phase("project"):
        time.sleep(0.02)
        with clock.phase("fit"):
            time.sleep(0.05)
    assert 0.05 <= clock.seconds["fit"] and 0.02 <= clock.seconds["project"] < 0.05


def test_probes_are_taken_away_again(bench):
    from crosslore.projectors.base import Projector

    before = Projector.project
    with bench("time_split").probes(bench("time_split").Clock("cpu")):
        assert Projector.project is not before
    assert Projector.project is before
