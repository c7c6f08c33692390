"""What generates: transformers everywhere, vLLM where it is installed."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from crosslore_eval.errors import EvalError, unknown_name
from crosslore_eval.generate import Answer, Decoding, generate_batches
from crosslore_eval.models import adapter_base, load_model, load_tokenizer, pick_device, pick_dtype

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
        self, encoded: Sequence[Sequence[int]], batches: Sequence[Sequence[int]], decoding: Decoding
    ) -> Iterator[list[Answer]]:
        """Yield the answers of each batch of positions in `encoded`."""


class TransformersEngine:
    """Generation by transformers."""

    def __init__(self, model: str, *, device: str | None, dtype: str) -> None:
        """Load the model."""
        where = pick_device(device)
        self.model, self.tokenizer = load_model(model, device=where, dtype=pick_dtype(dtype, where))
        self.device, self.dtype = where.type, str(self.model.dtype).removeprefix("torch.")
        self.context = getattr(self.model.config, "max_position_embeddings", None)

    def answers(
        self, encoded: Sequence[Sequence[int]], batches: Sequence[Sequence[int]], decoding: Decoding
    ) -> Iterator[list[Answer]]:
        """Yield the answers of each batch of positions in `encoded`."""
        yield from generate_batches(self.model, self.tokenizer, encoded, batches, decoding)


class VllmEngine:
    """Generation by vLLM, which schedules its own batches; ours only say how much is lost when it is interrupted."""

    def __init__(self, model: str, *, device: str | None, dtype: str) -> None:
        """Load the model; a LoRA adapter on its base, unmerged."""
        if find_spec("vllm") is None:
            raise EvalError("--engine vllm needs vLLM: pip install vllm. Or leave the option out: transformers works.")
        if device is not None:
            raise EvalError(f"--device is not used with --engine vllm, got {device}. Set CUDA_VISIBLE_DEVICES instead.")
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        base = adapter_base(model)
        self.tokenizer = load_tokenizer(model)
        self.llm = LLM(model=base or model, dtype=dtype, enable_lora=base is not None)
        self.lora = LoRARequest("adapter", 1, model) if base else None
        self.device, self.dtype = "vllm", dtype
        self.context = self.llm.llm_engine.model_config.max_model_len

    def answers(
        self, encoded: Sequence[Sequence[int]], batches: Sequence[Sequence[int]], decoding: Decoding
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


def load_engine(name: str, model: str, *, device: str | None, dtype: str) -> Engine:
    """Return the engine of that name with a model loaded.

    Raises:
        EvalError: if the engine is unknown or not installed, or the model cannot be loaded.
    """
    kinds: dict[str, type[Engine]] = {"transformers": TransformersEngine, "vllm": VllmEngine}
    if name not in kinds:
        raise unknown_name("engine", name, kinds)
    return kinds[name](model, device=device, dtype=dtype)  # type: ignore[call-arg]
