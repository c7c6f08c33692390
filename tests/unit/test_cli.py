"""The command line: exit codes, one-line errors, tables and JSON."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from crosslore import PRESETS
from crosslore.cli import main
from crosslore.tables import print_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A folder with a small model's configuration."""
    transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "crosslore[estimate]"')
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    transformers.LlamaConfig(**sizes, vocab_size=100).save_pretrained(tmp_path)
    return str(tmp_path)


def test_estimate_prints_every_method_and_what_is_assumed(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", tiny, "--rank", "8"]) == 0
    text = capsys.readouterr().out
    for name in ("AdamW", "AdamW8bit", "LoRA", "DoRA", "galore full", "crosslore layerwise", "* crosslore compact "):
        assert name in text
    assert "GB are 10^9 bytes" in text and "is read as cards are sold, in GiB: 25.77 GB" in text
    assert "CUDA's own 0.8 GB is assumed" in text
    assert "with checkpointing" in text and "not checked" not in text


def test_the_page_about_memory_shows_what_estimate_prints(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason='needs transformers: pip install "crosslore[estimate]"')
    assert main(["estimate", "LLaMA2-7B"]) == 0
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    shown = page.partition("```text\n")[2].partition("```")[0]
    assert shown.startswith("LLaMA2-7B: ") and shown.split() == capsys.readouterr().out.split()


def test_estimate_as_json_is_in_bytes_and_adds_up(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rank", "8", "--preset", "fira", "--gradients", "layerwise", "--gpu-gb", "2", "--cuda-gb", "0.5"]
    assert main(["estimate", tiny, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpu_bytes"] == 2 * 2**30 and found["chosen"] == "fira layerwise" and found["cuda_is_assumed"]
    for one in found["methods"]:
        held = one["bytes"]
        fixed = sum(held[name] for name in ("weights", "state", "residual", "deferred", "cuda"))
        assert held["cuda"] == 5 * 10**8 and held["peak"] == fixed + max(held["moments"].values())
        assert one["fits"] == (held["peak"] <= found["gpu_bytes"]) and one["largest_batch"] > 0
        assert held["activations"] == held["activations_with_checkpointing"]
        assert held["activations_with_checkpointing"] < held["activations_without_checkpointing"]
    assert [one["method"] for one in found["methods"]].count("fira layerwise") == 1


def test_a_small_card_fits_nothing(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", tiny, "--rank", "8", "--gpu-gb", "0.5", "--json"]) == 0  # less than CUDA alone
    for one in json.loads(capsys.readouterr().out)["methods"]:
        assert not one["fits"] and one["largest_batch"] == 0 and one["largest_rank"] in (0, None)


def test_a_type_whose_layers_were_not_counted_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "crosslore[estimate]"')
    transformers.GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=100).save_pretrained(tmp_path)
    assert main(["estimate", str(tmp_path), "--rank", "8", "--gradients", "full"]) == 0
    captured = capsys.readouterr().out
    assert "was not checked for type 'gpt2'" in captured
    assert "crosslore compact is left out: " in captured  # its layers are Conv1D


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["estimate", "no-such-model"], "unknown model 'no-such-model'."),
        (["estimate", "{tiny}", "--rank", "65"], "rank must be in [1, 64]"),
        (["estimate", "{tiny}", "--rank", "8", "--preset", "galor"], "unknown preset 'galor'. Did you mean 'galore'"),
        (["estimate", "{tiny}", "--rank", "8", "--gradients", "compactt"], "unknown gradients 'compactt'"),
        (
            ["estimate", "{tiny}", "--rank", "8", "--gradients", "full", "--weights", "deferred"],
            "weights='deferred' is",
        ),
        (["estimate", "{tiny}", "--rank", "8", "--optim", "adamw9bit"], "unknown optim 'adamw9bit'"),
        (["estimate", "{tiny}", "--rank", "8", "--gpu-gb", "0"], "gpu-gb must be a number > 0, got 0.0."),
    ],
)
def test_unusable_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(tiny=tiny) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.parametrize("words", [[], ["estimat"], ["estimate"], ["estimate", "x", "--batch", "many"]])
def test_wrong_usage_is_exit_code_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as held:
        main(words)
    assert held.value.code == 2


@pytest.mark.parametrize("command", ["estimate", "presets"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as held:
        main([command, "--help"])
    assert held.value.code == 0 and f"  crosslore {command}" in capsys.readouterr().out


def test_presets_are_a_table_with_a_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["preset", "projector", "refresh", "moments", "residual", "rule", "paper"]
    assert [row.split()[0] for row in rows] == list(PRESETS)
    assert next(row for row in rows if row.startswith("golore ")).split()[1] == "random"
    assert "sparse 1.2%" in next(row for row in rows if row.startswith("crosslore "))


def test_presets_as_json_have_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == list(PRESETS)
    assert found["crosslore"]["config"]["residual_ratio"] == PRESETS["crosslore"].config.residual_ratio


def test_presets_need_nothing_but_torch() -> None:
    code = "import sys; from crosslore.cli import main; main(['presets']); print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_entry_point_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"]["crosslore"] == "crosslore.cli:main"
    assert any(name.startswith("transformers") for name in project["optional-dependencies"]["estimate"])


def test_a_table_aligns_its_numbers_and_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "size"], [["a" * 200, "1.00"], ["b", "10.00"]], right=["size"])
    lines = capsys.readouterr().out.splitlines()
    assert [len(line) for line in lines] == [207, 207, 207] and lines[1].endswith("   1.00")


def test_on_a_terminal_rich_prints_the_same_cells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich", reason='needs rich: pip install "crosslore[estimate]"')
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table(["name", "size"], [["* chosen", "1.00"], ["b", "10.00"]], right=["size"])
    text = capsys.readouterr().out
    assert all(cell in text for cell in ("name", "* chosen", "10.00"))
