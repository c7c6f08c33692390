"""Every code block of README.md and docs/ is run here, or says why not."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.docs import commands
from tests.docs.blocks import LANGUAGES, ROOT, Block, all_blocks, blocks_of

BLOCKS = all_blocks()


def of(*languages: str) -> list[Any]:
    """The blocks of a language that are run here, as parameters."""
    return [pytest.param(block, id=block.name) for block in BLOCKS if block.is_run and block.language in languages]


# Which blocks there are


def test_blocks_are_found_with_their_marks() -> None:
    text = "A\n\n<!-- not run: needs a GPU -->\n```sh\nx\n```\n\n1. list\n\n    ```python\n    a = 1\n    ```\n"
    text += "```\nb\n```\n"
    first, second, third = blocks_of(text, "p")
    assert (first.mark, first.reason, first.is_run) == ("not run", "needs a GPU", False)
    assert (second.language, second.text, second.line, second.is_run) == ("python", "a = 1\n", 10, True)
    assert (third.language, third.mark) == ("", "")
    assert len(BLOCKS) > 60


@pytest.mark.parametrize("block", [pytest.param(block, id=block.name) for block in BLOCKS])
def test_a_block_is_run_or_says_why_not(block: Block) -> None:
    assert block.language in LANGUAGES, f"name one of {LANGUAGES}: output is `text`"
    if block.mark == "not run":
        assert len(block.reason) > 10, "give the reason"
    if block.mark == "run by":
        test = commands.existing(block.reason)
        assert Path(block.page).name in test.read_text(encoding="utf-8"), "that test does not read this page"
    if block.mark == "printed":
        assert block.language == "text"


# Python


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


PYTHON_PAGES = sorted({block.page for block in BLOCKS if block.is_run and block.language in ("python", "diff")})


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_runs(page: str, in_folder: Path) -> None:
    """The blocks of a page share their names, and what they print is what the page says they print."""
    pytest.importorskip("transformers", reason='needs transformers: pip install "crosslore[llamafactory]"')
    from tests.docs.prelude import namespace

    names, printed = namespace(), ""
    for block in (block for block in BLOCKS if block.page == page and block.is_run):
        if block.mark == "printed":
            assert block.text == printed, f"{block.name}: printed is\n{printed}"
        if block.language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile("\n" * block.line + block.text, page, "exec"), names)
            printed = output.getvalue()
        if block.language == "diff":
            for sign in "-+":
                lines = [line[2:] for line in block.text.splitlines() if line[:1] == sign]
                exec(compile("\n".join(lines), block.name, "exec"), names)


# YAML


@pytest.fixture
def gpu_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one bf16 is refused."""
    pytest.importorskip("llamafactory", reason="llamafactory is not installed (extra llamafactory)")
    from llamafactory.hparams import parser
    from transformers import training_args

    for module in (parser, training_args):
        monkeypatch.setattr(module, "is_torch_bf16_gpu_available", lambda: True)


BASE = {
    "model_name_or_path": "models/some", "stage": "sft", "do_train": True, "dataset": "rows", "template": "alpaca",
    "report_to": "none",
}  # fmt: skip
V1_BASE = {"model": "models/some", "train_dataset": "rows.yaml"}


@pytest.mark.parametrize("block", of("yaml"))
def test_llamafactory_takes_the_configuration(block: Block, gpu_claimed: None, tmp_path: Path) -> None:
    """A part of a configuration is completed; of this project's type the optimizer is built too."""
    from tests.docs.prelude import tiny_llama

    given = yaml.safe_load(block.text)
    if "optim_config" in given:
        from llamafactory.v1.config.arg_parser import get_args

        from crosslore.integrations.llamafactory.v1 import build

        training = get_args({**V1_BASE, **given, "output_dir": str(tmp_path)})[2]
        assert training.optim_config == given["optim_config"]
        build(tiny_llama(), training.optim_config)
        return
    from llamafactory.hparams import get_train_args

    from crosslore.integrations.llamafactory.optimizer import create_crosslore_optimizer

    assert "finetuning_type" in given, "what is no configuration of LLaMA-Factory needs a mark"
    _, _, training, tuning, _ = get_train_args({**BASE, **given, "output_dir": str(tmp_path)})
    for key, value in given.items():
        if hasattr(tuning, key) and key not in ("finetuning_type", "lora_target", "galore_target", "apollo_target"):
            assert getattr(tuning, key) == value
    if given["finetuning_type"] == "crosslore":
        optimizer = create_crosslore_optimizer(tiny_llama(), training, tuning)
        low = next(group for group in optimizer.param_groups if any(group["blocks"]))
        assert (low["rank"], low["scale"]) == (given.get("rank", 128), given.get("alpha", 32.0))


# Command lines

SHELL = [(block, words) for block in BLOCKS if block.is_run and block.language == "sh"
         for words in commands.commands_of(block)]  # fmt: skip
FACTORY = [(b, w) for b, w in SHELL if commands.without_environment(w)[0] == "llamafactory-cli"]
SCRIPTS = [(b, w) for b, w in SHELL if commands.is_script(commands.without_environment(w))]
OTHERS = [pair for pair in SHELL if pair not in FACTORY and pair not in SCRIPTS]


def shown(pairs: list[tuple[Block, list[str]]]) -> list[Any]:
    return [pytest.param(words, id=f"{block.name} {' '.join(words)[:60]}") for block, words in pairs]


@pytest.mark.parametrize("words", shown(OTHERS))
def test_the_programs_parser_takes_the_command(words: list[str]) -> None:
    commands.check(words)


@pytest.mark.parametrize("words", shown(FACTORY))
def test_llamafactory_takes_the_command(
    words: list[str], gpu_claimed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, command, *options = commands.without_environment(words)
    assert command in commands.FACTORY_COMMANDS
    if command != "train" or options[0] in commands.PLACEHOLDERS:
        return
    from llamafactory.hparams import get_train_args

    commands.existing(options[0])
    monkeypatch.chdir(ROOT)
    mine = [word for word in options if not word.startswith("output_dir=")]
    monkeypatch.setattr("sys.argv", ["llamafactory-cli", *mine, f"output_dir={tmp_path}"])
    assert get_train_args()[3].use_crosslore


def test_the_scripts_parsers_take_the_commands() -> None:
    """Those that the pages name, and those that `make` would run for the pages."""
    by_hand = [commands.without_environment(words)[1:] for _, words in SCRIPTS]
    for words in by_hand:
        commands.existing(words[0])
    by_make = [
        line.split()[1:]
        for _, (program, *options) in OTHERS if program == "make"
        for line in commands.planned(options).splitlines() if re.match(r"\S*python (scripts|benchmarks)/", line)
    ]  # fmt: skip
    assert by_hand and by_make
    wanted = sorted({tuple(w) for w in by_hand + by_make if w[0] != "scripts/webui.py" and "examples/" not in w[0]})
    found = commands.outcomes([list(words) for words in wanted])
    assert set(found) == {"taken"}, [pair for pair in zip(wanted, found, strict=True) if pair[1] != "taken"]
    for words in by_hand:  # run whole by tests/scripts/test_examples.py
        assert "examples/" not in words[0] or words == [words[0]]


def test_a_command_that_is_wrong_is_found() -> None:
    for words in (["crosslore", "estimat", "x"], ["crosslore-eval", "run", "e2e"], ["make", "no-such-target"],
                  ["pip", "install", ".[no-such-extra]"], ["rm", "-rf", "x"]):  # fmt: skip
        with pytest.raises((SystemExit, AssertionError, ValueError)):
            commands.check(words)
    assert commands.outcomes([["scripts/make_table.py", "--no-such-option"]])[0].startswith("refused")
