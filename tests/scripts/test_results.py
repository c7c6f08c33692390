"""Result files: what is written is read back, what does not fit is refused by the file's name."""

import json
import os

import pytest
from tests.scripts.result_samples import sample


@pytest.fixture(scope="module")
def results(load_script):
    return load_script("reproduction.results")


def edited(results, folder, change):
    """Write a result, change its content in the file, and return the file's path."""
    path = results.write_result(folder, sample(results))
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_a_result_is_read_back_as_it_was_written(results, tmp_path):
    some = [
        sample(results),
        sample(results, seed=2, add=1.5),
        sample(results, table="ablation-residual", method="crosslore-no-residual", dataset="e2e"),
        sample(results, method="dora", status="oom"),
        sample(results, method="full", rank=0, status="failed", peak_gib={}, train={}),
        sample(results, table="table10", column="0.6", reused_from="table1"),
        sample(results, method="lora", scores={"METEOR": results.Score(value=None, reason="Java is not installed")}),
    ]
    for result in some:
        results.write_result(tmp_path, result)
    found = results.read_results(tmp_path)
    assert sorted(found, key=repr) == sorted(some, key=repr)
    names = [(result.experiment.table, result.experiment.name) for result in found]
    assert names == sorted(names)


def test_the_file_has_the_documented_place_and_keys(results, tmp_path):
    path = results.write_result(tmp_path, sample(results, table="table10", column="0.6"))
    assert path == tmp_path / "table10" / "llama2-7b--crosslore--gsm8k--r128--s1--x0.6.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert list(content) == [
        *("schema", "experiment", "status", "reason", "config", "config_hash", "commit", "packages", "data", "device"),
        *("hours", "peak_gib", "train", "scores", "reused_from", "finished"),
    ]
    assert content["schema"] == 1 and content["experiment"]["column"] == "0.6"
    assert content["device"] == {"name": "NVIDIA RTX 4090", "kind": "cuda", "threads": 8}
    assert content["scores"]["accuracy_flexible"] == {
        "value": 34.0, "low": 31.5, "high": 36.5, "signature": "accuracy_flexible|protocol:paper|v:0.1.0"
    }  # fmt: skip


def test_folders_of_other_results_are_passed_over(results, tmp_path):
    results.write_result(tmp_path, sample(results))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "speed.json").write_text("{}")
    (tmp_path / "table1" / "notes.txt").write_text("")
    assert len(results.read_results(tmp_path)) == 1


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(results, tmp_path, monkeypatch):
    old = sample(results)
    path = results.write_result(tmp_path, old)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        results.write_result(tmp_path, sample(results, add=5.0))
    assert results.read_results(tmp_path) == [old]
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_is_not_there_is_named(results, tmp_path):
    with pytest.raises(results.ResultError, match=r"none must be a folder with results.*Run scripts/reproduce\.py"):
        results.read_results(tmp_path / "none")


@pytest.mark.parametrize("text", ['{"schema": 1', "", "\xff", '{"hours": NaN}'])
def test_a_file_that_is_no_json_is_named(results, tmp_path, text):
    path = results.write_result(tmp_path, sample(results))
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(results.ResultError, match=r"table1/llama2-7b--crosslore--gsm8k--r128--s1\.json is not JSON"):
        results.read_results(tmp_path)


def drop(name):
    return lambda content: content.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema=2), "schema must be 1, got 2: it is of another version"),
        (drop("schema"), "has no `schema`"),
        (drop("commit"), "has no `commit`, which must be a text"),
        (lambda c: c.update(extra=1), "unknown key 'extra'"),
        (lambda c: c.update(status="OK"), "status must be one of ok, oom, failed, got 'OK'"),
        (lambda c: c.update(hours=None), "status ok must be one with hours and scores"),
        (lambda c: c.update(hours="1"), "`hours` must be a number or null, got '1'"),
        (lambda c: c.update(hours=True), "`hours` must be a number .*, got True"),
        (lambda c: c.update(scores={}), "status ok must be one with hours and scores"),
        (lambda c: c.update(reason="why"), "reason of status ok must be empty for ok"),
        (lambda c: c.update(status="oom"), "reason of status oom must be empty for ok and a text for oom"),
        (lambda c: c["peak_gib"].update(vram=1.0), "peak_gib must be one of allocated, .*got 'vram'"),
        (lambda c: c["device"].update(kind="tpu"), "kind of device must be one of cpu, cuda, got 'tpu'"),
        (lambda c: c["data"]["train"].update(rows="7"), "data, train, `rows` must be a whole number"),
        (lambda c: c["scores"]["accuracy_flexible"].update(high=None), "interval of score .* two bounds or none"),
        (lambda c: c["scores"]["accuracy_flexible"].update(value=None), "a value without a reason, or a reason"),
        (lambda c: c["scores"].update(BLEU=3.0), "scores, `BLEU`|`BLEU` must be a table of keys"),
        (lambda c: c["experiment"].update(seed=2), "must be where its cell belongs, table1/.*--s2.json. Move it"),
        (lambda c: c["experiment"].update(table="table2"), "must be where its cell belongs, table2/"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_files_name(results, tmp_path, change, message):
    path = edited(results, tmp_path, change)
    with pytest.raises(results.ResultError, match=message) as caught:
        results.read_results(tmp_path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_not_written(results, number):
    with pytest.raises(results.ResultError, match="a number of a result must be finite"):
        sample(results, hours=number)


def test_memory_in_tables_is_of_the_device_that_was_used(results):
    assert sample(results).peak == 15.81
    cpu = results.Device(name="Xeon", kind="cpu", threads=2)
    assert sample(results, device=cpu).peak == 3.2
    assert sample(results, peak_gib={}).peak is None


def test_runs_that_tune_are_named_by_their_learning_rate_and_are_read(results, tmp_path):
    path = results.write_result(tmp_path, sample(results, table="tuning", column="3e-5"))
    assert path == tmp_path / "tuning" / "llama2-7b--crosslore--gsm8k--r128--s1--lr3e-5.json"
    assert [result.experiment.column for result in results.read_results(tmp_path)] == ["3e-5"]
