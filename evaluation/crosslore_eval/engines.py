"""What generates: transformers everywhere, vLLM where it is installed."""

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from crosslore_eval.checkpoints import adapter_base
from crosslore_eval.errors import EvalError, unknown_name
from crosslore_eval.generate import Answer, Decoding, generate_batches
from crosslore_eval.models import load_model, load_tokenizer, pick_device, pick_dtype

ENGINES = ("transformers", "vllm")


class Engine(Protocol):
    """A model that answers prompts."""

    tokenizer: Any
    # where and in which precision, for the manifest
    device: str
    dtype: str
    # the most tokens of prompt and answer together; None: not known
    context: int | None

    def answers(
        self,
        encoded: Sequence[Sequence[int]],
        batches: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[list[Answer]]:
        """Yield the answers of each batch of positions in `encoded`.

        `on_step`, where the engine has steps, is called after each one with the tokens that it added to answers.
        """


class TransformersEngine:
    """Generation by transformers."""

    def __init__(self, model: str, *, device: str | None, dtype: str, base: str | None = None) -> None:
        """Load the model."""
        where = pick_device(device)
        self.model, self.tokenizer = load_model(model, device=where, dtype=pick_dtype(dtype, where), base=base)
        self.device, self.dtype = where.type, str(self.model.dtype).removeprefix("torch.")
        self.context = getattr(self.model.config, "max_position_embeddings", None)

    def answers(
        self,
        encoded: Sequence[Sequence[int]],
        batches: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[list[Answer]]:
        """Yield the answers of each batch of positions in `encoded`."""
        yield from generate_batches(self.model, self.tokenizer, encoded, batches, decoding, on_step=on_step)


class VllmEngine:
    """Generation by vLLM, which schedules its own batches; ours only say how much is lost when it is interrupted."""

    def __init__(self, model: str, *, device: str | None, dtype: str, base: str | None = None) -> None:
        """Load the model; a LoRA adapter on its base, unmerged."""
        if find_spec("vllm") is None:
            raise EvalError("--engine vllm needs vLLM: pip install vllm. Or leave the option out: transformers works.")
        if device is not None:
            raise EvalError(f"--device is not used with --engine vllm, got {device}. Set CUDA_VISIBLE_DEVICES instead.")
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.tokenizer = load_tokenizer(model, base=base)
        base = adapter_base(model, base=base)
        self.llm = LLM(model=base or model, dtype=dtype, enable_lora=base is not None)
        self.lora = LoRARequest("adapter", 1, model) if base else None
        self.device, self.dtype = "vllm", dtype
        self.context = self.llm.llm_engine.model_config.max_model_len

    def answers(
        self,
        encoded: Sequence[Sequence[int]],
        batches: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[list[Answer]]:
        """Yield the answers of each batch of positions in `encoded`."""
        from vllm import SamplingParams

        for batch in batches:
            settings = SamplingParams(
                max_tokens=decoding.max_new_tokens, temperature=decoding.temperature, top_p=decoding.top_p,
                top_k=decoding.top_k or -1, seed=(decoding.seed * 1_000_003 + batch[0]) % 2**63,
            )  # fmt: skip
            prompts = [{"prompt_token_ids": list(encoded[index])} for index in batch]
            results = self.llm.generate(prompts, settings, lora_request=self.lora, use_tqdm=False)
            yield [
                Answer(
                    index=index, text=result.outputs[0].text, tokens=len(result.outputs[0].token_ids),
                    finish="length" if result.outputs[0].finish_reason == "length" else "stop",
                )
                for index, result in zip(batch, results, strict=True)
            ]  # fmt: skip


def where_and_how(name: str, *, device: str | None, dtype: str) -> str:
    """Return the kind of device and the dtype that the options mean here; rows of two of them must not mix."""
    if name != "transformers":
        return f"{name}, {dtype}"
    where = pick_device(device)
    return f"{where.type}, {str(pick_dtype(dtype, where)).removeprefix('torch.')}"


def check_engine(name: str) -> None:
    """Raise `EvalError` unless `name` is one of `ENGINES`."""
    if name not in ENGINES:
        raise unknown_name("engine", name, ENGINES)


def load_engine(name: str, model: str, *, device: str | None, dtype: str, base: str | None = None) -> Engine:
    """Return the engine of that name with a model loaded.

    Args:
        name: one of `ENGINES`.
        model: folder or hub name.
        device: torch device; None: CUDA when there is one.
        dtype: one of `models.DTYPES`.
        base: of a LoRA adapter, instead of the one that it names.

    Raises:
        EvalError: if the engine is unknown or not installed, or the model cannot be loaded.
    """
    check_engine(name)
    kind = VllmEngine if name == "vllm" else TransformersEngine
    return kind(model, device=device, dtype=dtype, base=base)
