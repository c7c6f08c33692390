"""What can be evaluated, and by what."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason='needs transformers: pip install "crosslore[eval]"')

from crosslore_eval.checkpoints import adapter_base, check_model, model_hash  # noqa: E402
from crosslore_eval.engines import load_engine  # noqa: E402
from crosslore_eval.errors import EvalError  # noqa: E402
from crosslore_eval.generate import Decoding  # noqa: E402
from crosslore_eval.models import load_model, load_tokenizer, pick_device, pick_dtype  # noqa: E402


@pytest.fixture(scope="module")
def adapter_folder(model: Any, tokenizer: Any, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that changes every query projection, saved as peft and LLaMA-Factory save it."""
    peft = pytest.importorskip("peft", reason="needs peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("adapter")
    wrapped.save_pretrained(folder)
    return folder


def logits_of(model: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=torch.arange(20)[None]).logits


def test_a_saved_model_loads_in_evaluation_mode(model: Any, model_folder: Path) -> None:
    loaded, tokenizer = load_model(model_folder, device=torch.device("cpu"))
    assert not loaded.training
    assert loaded.dtype == torch.float32
    assert tokenizer.chat_template
    torch.testing.assert_close(logits_of(loaded), logits_of(model))


def test_a_lora_adapter_is_merged_into_its_base(adapter_folder: Path, model: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded, tokenizer = load_model(adapter_folder, device=torch.device("cpu"))
    base = json.loads((adapter_folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter_folder).eval()
    torch.testing.assert_close(logits_of(loaded), logits_of(expected), rtol=1e-4, atol=1e-4)
    assert (logits_of(loaded) - logits_of(model)).abs().max() > 0.01
    assert tokenizer.chat_template  # its base's, because it has none of its own


def test_an_adapter_own_tokenizer_goes_before_its_base(adapter_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    import copy

    folder = tmp_path / "adapter"
    shutil.copytree(adapter_folder, folder)
    trained = copy.deepcopy(tokenizer)
    trained.chat_template = "trained"
    trained.save_pretrained(folder)
    assert load_tokenizer(str(folder)).chat_template == "trained"


def test_the_hash_follows_weights_not_places_or_optimizer_states(
    model_folder: Path, tmp_path: Path, asked: list[str]
) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(model_folder, copied)
    assert model_hash(str(copied)) == model_hash(str(model_folder))
    (copied / "optimizer.pt").write_bytes(b"state")
    (copied / "trainer_state.json").write_text("{}")
    assert model_hash(str(copied)) == model_hash(str(model_folder))
    weights = next(copied.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert model_hash(str(copied)) != model_hash(str(model_folder))
    assert model_hash("owner/name") == "owner/name"


def test_a_changed_tokenizer_is_another_model(model_folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(model_folder, copied)
    template = next(copied.glob("chat_template*"), copied / "tokenizer_config.json")
    template.write_text(template.read_text() + " ")
    assert model_hash(str(copied)) != model_hash(str(model_folder))


def test_a_changed_base_is_another_model(adapter_folder: Path, tmp_path: Path, model_folder: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(model_folder, base)
    shutil.copytree(adapter_folder, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    before = model_hash(str(folder))
    weights = next(base.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert model_hash(str(folder)) != before


class Project:
    """A project folder: an adapter that was trained there from a base named by a path relative to it."""

    def __init__(self, folder: Path, adapter: Path, base: Path) -> None:
        self.base, self.adapter = folder / "models" / "tiny", folder / "saves" / "lora"
        shutil.copytree(base, self.base)
        shutil.copytree(adapter, self.adapter)
        self.name_base("models/tiny")

    def name_base(self, name: str | None) -> None:
        file = self.adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))


@pytest.fixture
def project(adapter_folder: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return Project(tmp_path / "project", adapter_folder, model_folder)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the hub was asked for, which cannot be reached."""
    names: list[str] = []

    def unreachable(self: Any, name: str, **options: Any) -> Any:
        names.append(name)
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    return names


@pytest.mark.parametrize("named", ["models/tiny", "../../models/tiny", "./models/tiny"])
def test_a_base_with_a_relative_path_is_found_from_another_folder(
    project: Project, named: str, adapter_folder: Path, asked: list[str]
) -> None:
    project.name_base(named)
    check_model(str(project.adapter))
    loaded, tokenizer = load_model(project.adapter, device=torch.device("cpu"))
    expected, _ = load_model(adapter_folder, device=torch.device("cpu"))
    assert torch.equal(logits_of(loaded), logits_of(expected))
    assert tokenizer.chat_template
    assert asked == []


def test_a_base_in_the_current_folder_goes_before_others(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(project.base, "models/tiny")
    assert adapter_base(str(project.adapter)) == "models/tiny"
    monkeypatch.chdir("..")
    assert adapter_base(str(project.adapter)) == str(project.base)


@pytest.mark.parametrize("named", ["models/gone", "gone"])
def test_a_base_that_is_nowhere_is_said_at_once(project: Project, named: str, asked: list[str]) -> None:
    project.name_base(named)
    message = (
        f"the base model of the LoRA adapter {project.adapter} must be .* got {named} from its adapter_config.json: no "
        r"such folder here or above the adapter, and the hub cannot be asked \(Name or service not known\). Give the "
        "base with --base-model DIR"
    )
    with pytest.raises(EvalError, match=message):
        check_model(str(project.adapter))
    assert asked == [named]


def test_a_path_is_not_asked_for_on_the_hub(project: Project, asked: list[str]) -> None:
    for named in ("/gone/tiny", "../gone", "a/b/c"):
        project.name_base(named)
        with pytest.raises(EvalError, match=f"got {named} .* no name on the hub looks like this. Give the base with"):
            check_model(str(project.adapter))
    assert asked == []


def test_a_base_that_the_hub_has_not_is_said(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub.errors import RepositoryNotFoundError

    def unknown(self: Any, name: str, **options: Any) -> Any:
        raise RepositoryNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "https://x")))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unknown)
    project.name_base("owner/gone")
    with pytest.raises(EvalError, match="and the hub has no such model, or you may not see it. Give the base with"):
        check_model(str(project.adapter))
    with pytest.raises(EvalError, match="--model must be .* got owner/gone, which is not there: the hub has no such"):
        check_model("owner/gone")


def test_the_given_base_is_taken(project: Project, adapter_folder: Path, model_folder: Path, asked: list[str]) -> None:
    project.name_base("models/gone")
    given = str(model_folder)
    check_model(str(project.adapter), base=given)
    loaded, tokenizer = load_model(project.adapter, device=torch.device("cpu"), base=given)
    assert torch.equal(logits_of(loaded), logits_of(load_model(adapter_folder, device=torch.device("cpu"))[0]))
    assert tokenizer.chat_template
    before = model_hash(str(project.adapter), base=given)
    assert model_hash(str(project.adapter), base=str(project.base)) == before
    (project.base / "generation_config.json").write_text("{}")
    assert model_hash(str(project.adapter), base=str(project.base)) != before
    assert asked == []


def test_a_given_base_that_cannot_be_used_is_refused(
    project: Project, model_folder: Path, tmp_path: Path, asked: list[str]
) -> None:
    with pytest.raises(EvalError, match="--base-model must hold config.json"):
        check_model(str(project.adapter), base=str(tmp_path))
    with pytest.raises(EvalError, match="--base-model must be a folder or a name on the hub .*, got ./gone, which is"):
        check_model(str(project.adapter), base="./gone")
    for name in (str(model_folder), "owner/name"):
        with pytest.raises(
            EvalError, match="--base-model is for the folder of a LoRA adapter, got .* Leave the option"
        ):
            check_model(name, base=str(model_folder))
    assert asked == []


def test_an_adapter_that_names_no_base_asks_for_it(project: Project, model_folder: Path) -> None:
    project.name_base(None)
    with pytest.raises(EvalError, match="must name the adapter's base model, got none. Give it with --base-model DIR"):
        check_model(str(project.adapter))
    check_model(str(project.adapter), base=str(model_folder))
    shutil.copy(model_folder / "config.json", project.adapter)  # a whole model that was trained with an adapter
    assert adapter_base(str(project.adapter)) is None


def test_a_base_that_does_not_fit_the_adapter_says_what_does_not(project: Project, model: Any) -> None:
    import transformers

    config = transformers.LlamaConfig(**{**model.config.to_dict(), "hidden_size": 16, "head_dim": 4})
    transformers.LlamaForCausalLM(config).save_pretrained(project.base)
    with pytest.raises(EvalError, match=f"cannot load {project.adapter}: RuntimeError: .*size mismatch"):
        load_model(project.adapter, device=torch.device("cpu"))


def test_a_base_taken_from_another_folder_is_said(
    project: Project, tmp_path: Path, examples: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from crosslore_eval.predict import predict
    from crosslore_eval.settings import Settings
    from crosslore_eval.tasks import find_task

    settings = Settings(model=str(project.adapter), decoding=Decoding(max_new_tokens=2), device="cpu")
    out = predict(find_task("gsm8k"), examples, settings, tmp_path / "out.jsonl")
    assert f"the base model of the LoRA adapter {project.adapter} is taken from {project.base}" in caplog.text
    caplog.clear()
    given = Settings(
        model=str(project.adapter), decoding=Decoding(max_new_tokens=2), device="cpu", base_model=str(project.base)
    )
    assert predict(find_task("gsm8k"), examples, given, out) == out  # the same files, however they were named
    predict(find_task("gsm8k"), examples, given, tmp_path / "other.jsonl")
    assert "is taken from" not in caplog.text
    assert (tmp_path / "other.jsonl").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "saves/run/checkpoint-30", "~/model", "missing"])
def test_a_folder_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(EvalError, match=f"must be a folder or a name on the hub .owner/name., got {name}"):
        check_model(name)


def test_a_folder_without_a_model_names_those_below_it(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="must hold config.json or adapter_config.json.* train first"):
        check_model(str(tmp_path))
    for name in ("checkpoint-30", "checkpoint-60"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    with pytest.raises(EvalError, match="Did you mean one of its folders: checkpoint-30, checkpoint-60"):
        check_model(str(tmp_path))


def test_an_adapter_with_padded_embeddings_loads(
    model: Any, tokenizer: Any, model_folder: Path, tmp_path: Path
) -> None:
    """LLaMA-Factory rounds the vocabulary up when it adds tokens, and saves the embeddings beside the adapter."""
    peft = pytest.importorskip("peft", reason="needs peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder)
    base.resize_token_embeddings(len(tokenizer) + 7, pad_to_multiple_of=64)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, device=torch.device("cpu"))
    assert loaded.get_input_embeddings().num_embeddings % 64 == 0


def test_a_torn_or_missing_file_gives_one_line(model_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    torn, bad, empty = tmp_path / "torn", tmp_path / "bad", tmp_path / "empty"
    shutil.copytree(model_folder, torn)
    weights = next(torn.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.copytree(adapter_folder, bad)
    (bad / "adapter_config.json").write_text("{broken")
    empty.mkdir()
    shutil.copy(adapter_folder / "adapter_config.json", empty)
    for folder, message in ((torn, "cannot load"), (bad, "must hold one JSON object"), (empty, "must hold weights")):
        with pytest.raises(EvalError, match=message) as caught:
            load_model(folder, device=torch.device("cpu"))
        assert "\n" not in str(caught.value)


def test_a_broken_model_gives_one_line(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(EvalError, match=f"cannot load {tmp_path}: ") as caught:
        load_model(tmp_path, device=torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_devices_and_dtypes_that_are_not_there_are_refused() -> None:
    with pytest.raises(EvalError, match="--device must be a torch device such as cpu or cuda:0, got gpu"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(EvalError, match="--device cuda needs a CUDA device"):
            pick_device("cuda")
    with pytest.raises(EvalError, match="--device meta does not work here"):
        pick_device("meta")
    with pytest.raises(EvalError, match="--dtype must be one of auto, float32, bfloat16, float16, got int8"):
        pick_dtype("int8", torch.device("cpu"))
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_an_unknown_engine_gets_the_near_name(model_folder: Path) -> None:
    with pytest.raises(EvalError, match="unknown engine 'transformer'. Did you mean 'transformers'?"):
        load_engine("transformer", str(model_folder), device="cpu", dtype="auto")


# vLLM: not installed where these tests run, so what is asked of it is recorded by a stand-in.


def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Install a stand-in for vLLM's interface and return what it was asked."""
    seen: dict[str, Any] = {"calls": []}

    class LLM:
        def __init__(self, **options: Any) -> None:
            seen["options"] = options
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=77))

        def generate(self, prompts: Any, settings: Any, *, lora_request: Any, use_tqdm: bool) -> list[Any]:
            seen["calls"].append((prompts, settings, lora_request))
            return [
                SimpleNamespace(
                    outputs=[SimpleNamespace(text=f"answer {len(p['prompt_token_ids'])}", token_ids=[1, 2],
                                             finish_reason="length")]
                )
                for p in prompts
            ]  # fmt: skip

    vllm, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams = LLM, lambda **settings: settings  # type: ignore[attr-defined]
    request.LoRARequest = lambda *fields: fields  # type: ignore[attr-defined]
    for module in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("crosslore_eval.engines.find_spec", lambda name: object())
    return seen


def test_vllm_gets_tokens_settings_and_adapter(adapter_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_vllm(monkeypatch)
    engine = load_engine("vllm", str(adapter_folder), device=None, dtype="auto")
    assert seen["options"]["enable_lora"] is True
    assert seen["options"]["model"] != str(adapter_folder)
    assert engine.context == 77
    decoding = Decoding(max_new_tokens=5, temperature=0.7, top_p=0.9, top_k=0, seed=2)
    answers = list(engine.answers([[5], [6, 7]], [[1], [0]], decoding))
    assert [(a.index, a.text, a.tokens, a.finish) for rows in answers for a in rows] == [
        (1, "answer 2", 2, "length"), (0, "answer 1", 2, "length"),
    ]  # fmt: skip
    prompts, settings, lora = seen["calls"][0]
    assert prompts == [{"prompt_token_ids": [6, 7]}]
    assert settings == {"max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "top_k": -1, "seed": 2_000_007}
    assert lora == ("adapter", 1, str(adapter_folder))


def test_vllm_that_is_not_installed_says_so(model_folder: Path) -> None:
    pytest.importorskip("crosslore_eval.engines")
    from importlib.util import find_spec

    if find_spec("vllm"):
        pytest.skip("vLLM is installed")
    with pytest.raises(EvalError, match="--engine vllm needs vLLM: pip install vllm"):
        load_engine("vllm", str(model_folder), device=None, dtype="auto")


def test_a_device_with_vllm_is_refused(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm(monkeypatch)
    with pytest.raises(EvalError, match="--device is not used with --engine vllm, got cpu"):
        load_engine("vllm", str(model_folder), device="cpu", dtype="auto")
