"""The CrossLore tab of LLaMA-Factory's WebUI: built by the page itself, read by its runner, clicked in a browser."""

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason='needs gradio: pip install "crosslore[llamafactory]"')
pytest.importorskip("llamafactory", reason='needs LLaMA-Factory: pip install "crosslore[llamafactory]"')

from crosslore.integrations.llamafactory import webui  # noqa: E402
from crosslore.integrations.llamafactory.arguments import (  # noqa: E402
    CONFIG_FIELDS,
    CrossLoreArguments,
    CrossLoreFinetuningArguments,
)
from crosslore.integrations.llamafactory.locales import LANGUAGES, locales  # noqa: E402
from crosslore.presets import PRESETS  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def initial(preset: str = "crosslore", **changes: Any) -> dict[str, Any]:
    """What the elements hold after a preset was chosen."""
    return {**webui.OTHERS, **webui.preset_values(preset), "crosslore_preset": preset, **changes}


# What it sends


def test_every_field_of_a_configuration_has_an_element() -> None:
    fields = {field.name for field in dataclasses.fields(CrossLoreArguments)} - {"use_crosslore"}
    assert {webui.KEYS.get(name, name) for name in webui.ELEMENTS} == fields
    assert set(CONFIG_FIELDS) <= fields


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_preset_shows_is_accepted_and_is_that_preset(preset: str) -> None:
    values = webui.training_values(initial(preset))
    args = CrossLoreFinetuningArguments(finetuning_type="crosslore", **values)
    plain = CrossLoreFinetuningArguments(finetuning_type="crosslore", crosslore_preset=preset)
    config = PRESETS[preset].config
    ours, theirs = (one.crosslore_overrides(training_seed=1) for one in (args, plain))
    assert dataclasses.replace(config, **ours) == dataclasses.replace(config, **theirs)
    assert values["rank"] == config.rank and values["alpha"] == config.scale


def test_what_was_changed_is_sent_and_what_was_not_is_not() -> None:
    values = webui.training_values(
        initial(crosslore_rank=16, crosslore_residual_rule="exact", crosslore_seed=" 7 ", crosslore_target="  ")
    )
    assert values == {
        "crosslore_preset": "crosslore", "rank": 16, "alpha": 32.0, "residual_ratio": 0.012, "warmup_k": 100,
        "crosslore_residual_rule": "exact", "crosslore_gradients": "auto", "crosslore_weights": "direct",
        "crosslore_seed": 7,
    }  # fmt: skip
    layerwise = webui.training_values(initial("galore", crosslore_gradients="layerwise", crosslore_telemetry=True))
    assert layerwise["crosslore_clip"] == "weight" and "residual_ratio" not in layerwise
    assert layerwise["crosslore_telemetry"] is True and layerwise["crosslore_telemetry_every"] == 50


def test_every_element_has_a_label_and_a_help_text_in_each_language() -> None:
    texts = locales()
    assert set(texts) == {"crosslore_tab", *webui.ELEMENTS}
    for name, by_language in texts.items():
        assert tuple(by_language) == LANGUAGES
        labels = [entry["label"] for entry in by_language.values()]
        assert all(labels) and (name == "crosslore_tab" or all(entry["info"] for entry in by_language.values()))
        infos = {entry.get("info", entry["label"]) for entry in by_language.values()}
        assert len(infos) == len(LANGUAGES)  # none was forgotten in another language


# The page itself


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The engine of a page that LLaMA-Factory has built."""
    monkeypatch.chdir(tmp_path)
    from llamafactory.webui.components import create_top, create_train_tab
    from llamafactory.webui.engine import Engine

    engine = Engine()
    with gr.Blocks():
        engine.manager.add_elems("top", create_top())
        engine.manager.add_elems("train", create_train_tab(engine))
    yield engine


def data_of(engine: Any, **changes: Any) -> dict[Any, Any]:
    """What the page would send, by element, with some of it changed."""
    data = {element: getattr(element, "value", None) for element in engine.manager.get_elem_list()}
    basic = {
        "top.lang": "en", "top.model_name": "Custom", "top.model_path": "somewhere", "train.dataset": ["some"],
        "train.output_dir": "out", "top.checkpoint_path": [],
    }  # fmt: skip
    for name, value in {**basic, **{key.replace("__", "."): value for key, value in changes.items()}}.items():
        data[engine.manager.get_elem_by_id(name)] = value
    return data


def test_the_dropdown_offers_the_type_and_the_tab_stands_behind_badam(page: Any) -> None:
    kinds = page.manager.get_elem_by_id("top.finetuning_type")
    assert ("crosslore", "crosslore") in kinds.choices and kinds.value == "lora"
    tab, other = (page.manager.get_elem_by_id(f"train.{name}") for name in ("crosslore_tab", "badam_tab"))
    siblings = tab.parent.children
    assert siblings.index(tab) == siblings.index(other) + 1
    changed = page.change_lang("zh")
    assert page.manager.get_elem_by_id("train.crosslore_rank") in changed


def test_a_run_gets_what_the_tab_shows_and_the_parser_takes_it(page: Any, tmp_path: Path) -> None:
    data = data_of(
        page, top__finetuning_type="crosslore", train__crosslore_rank=16, train__crosslore_gradients="compact",
        train__extra_args='{"optim": "adamw_torch", "alpha": 5.0}',
    )  # fmt: skip
    args = page.runner._parse_train_args(data)
    assert (args["rank"], args["alpha"], args["crosslore_gradients"]) == (16, 5.0, "compact")
    from llamafactory.hparams.parser import get_train_args

    args |= {"output_dir": str(tmp_path / "out"), "bf16": False, "dataset_dir": str(ROOT / "data")}
    *_, finetuning, _ = get_train_args({key: value for key, value in args.items() if value is not None})
    assert finetuning.use_crosslore and finetuning.rank == 16


def test_other_types_send_what_they_always_did(page: Any) -> None:
    args = page.runner._parse_train_args(data_of(page))
    assert args["finetuning_type"] == "lora"
    assert not [key for key in args if key.startswith("crosslore")] and "alpha" not in args


def test_arguments_are_saved_and_come_back(page: Any, tmp_path: Path) -> None:
    element = page.manager.get_elem_by_id("train.crosslore_rank")
    data = data_of(page, top__finetuning_type="crosslore", train__crosslore_rank=24, train__config_path="mine.yaml")
    data = {e: v for e, v in data.items() if page.manager.get_id_by_elem(e).split(".")[0] in ("top", "train")}
    list(page.runner.save_args(data).items())
    loaded = page.runner.load_args("en", "mine.yaml")
    assert loaded[element] == 24


def test_quantisation_is_off_for_it_and_its_checkpoints_are_listed(page: Any, tmp_path: Path) -> None:
    from llamafactory.webui.control import can_quantize, list_checkpoints

    assert can_quantize("crosslore").value == "none" and can_quantize("crosslore").interactive is False
    folder = tmp_path / "saves" / "Custom" / "crosslore" / "run"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"")
    assert ("run", "run") in list_checkpoints("Custom", "crosslore").choices


# A real browser


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,2400",
    ):
        options.add_argument(word)
    chrome = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A page in a folder of its own, with the embedded model and bundled data."""
    if not (ROOT / "models" / "SmolLM2-135M-Instruct" / "config.json").is_file():
        pytest.skip("needs the embedded model: make model")
    os.symlink(ROOT / "data", tmp_path / "data")
    sys.path.insert(0, str(ROOT / "scripts"))
    import webui as script

    script.prepare(tmp_path)
    number = port()
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ, **script.DEFAULTS, "GRADIO_SERVER_PORT": str(number), "GRADIO_ANALYTICS_ENABLED": "False",
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "BROWSER": "true", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        [binaries / "llamafactory-cli", "webui"], cwd=tmp_path, env=environment, start_new_session=True,
        stdout=(tmp_path / "page.log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 180
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", number)) == 0:
                break
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "page.log").read_text()
        time.sleep(0.5)
    yield f"http://127.0.0.1:{number}"
    os.killpg(process.pid, 9)


@pytest.mark.slow
def test_training_by_clicks_and_a_chat_with_its_checkpoint(browser: Any, address: str, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def until(condition: Any, what: str, seconds: float = 120) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"{what}: {body()[-3000:]}"
            time.sleep(0.5)
        return found

    def body() -> str:
        return str(browser.find_element(By.TAG_NAME, "body").text)

    def field(label: str) -> Any:
        holder = "ancestor::*[.//input or .//textarea][1]"
        path = f"//*[normalize-space(text())='{label}']/{holder}//*[self::input or self::textarea]"
        return until(lambda: [e for e in browser.find_elements(By.XPATH, path) if e.is_displayed()], label, 30)[0]

    def fill(label: str, text: str) -> None:
        element = field(label)
        element.click()
        element.send_keys(Keys.CONTROL, "a")
        element.send_keys(text)
        element.send_keys(Keys.TAB)

    def click(text: str) -> None:
        path = f"//button[starts-with(normalize-space(.), '{text}')]"
        button = until(lambda: [e for e in browser.find_elements(By.XPATH, path) if e.is_displayed()], text, 30)[0]
        browser.execute_script("arguments[0].click()", button)

    browser.get(address)
    until(lambda: "CrossLore configurations" in body(), "the tab")
    assert field("Finetuning method").get_attribute("value") == "crosslore"
    click("CrossLore configurations")
    fill("Rank", "16")
    fill("Max samples", "20")
    click("Extra configurations")
    short = '"max_steps": 5, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1'
    fill("Extra arguments", f'{{"optim": "adamw_torch", "preprocessing_num_workers": 1, {short}}}')
    click("Preview command")
    preview = until(lambda: re.search(r"--rank 16", body()) and body(), "the preview")
    assert "--finetuning_type crosslore" in preview and "--alpha 32" in preview
    if os.environ.get("CROSSLORE_SCREENSHOT"):
        browser.save_screenshot(os.environ["CROSSLORE_SCREENSHOT"])
    click("Start")
    # The Trainer's own "Training completed" stands in the shown log before the model is saved.
    until(lambda: "Finished." in body(), "the end of training", 400)
    runs = list((tmp_path / "saves" / "Custom" / "crosslore").iterdir())
    assert (runs[0] / "model.safetensors").is_file() and (runs[0] / "trainer_log.jsonl").is_file()

    click("Chat")
    checkpoint = field("Checkpoint path")
    checkpoint.click()
    checkpoint.send_keys(runs[0].name, Keys.ENTER)
    click("Load model")
    inputs = "textarea[placeholder='Input...']"  # shown once the model is loaded
    question = until(
        lambda: [e for e in browser.find_elements(By.CSS_SELECTOR, inputs) if e.is_displayed()], "the loaded model", 200
    )
    question[0].send_keys("Hello")
    click("Submit")
    until(lambda: len(browser.find_elements(By.CSS_SELECTOR, ".message.bot, .bot.message")) > 0, "an answer", 120)
