"""What a model's outputs for a task depend on, checked before anything is loaded."""

from dataclasses import asdict, dataclass

from crosslore_eval.engines import check_engine
from crosslore_eval.errors import EvalError
from crosslore_eval.generate import Decoding
from crosslore_eval.prompts import MODEL_TEMPLATE, check_template

# Not compared as they were given: the model's files and what device and dtype mean here are.
PLACES = ("model", "base_model", "device", "dtype")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a model's outputs for a task depend on."""

    # folder or hub name
    model: str
    decoding: Decoding
    # of a LoRA adapter: folder or hub name; None: the one that the adapter names
    base_model: str | None = None
    # one of prompts.TEMPLATES, or the model's own
    template: str = MODEL_TEMPLATE
    # instead of the task's
    instruction: str | None = None
    # prompts at once; part of the identity, because padding may change the last bits of a sum
    batch_size: int = 16
    # transformers or vllm
    engine: str = "transformers"
    # torch device; None: CUDA when there is one
    device: str | None = None
    # auto: bf16 on a GPU, fp32 on a CPU
    dtype: str = "auto"
    # longer prompts lose the end of their input; None: what the model's context leaves
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check names and ranges."""
        check_template(self.template)
        check_engine(self.engine)
        decoding, temperature = self.decoding, self.decoding.temperature
        most = self.max_prompt_tokens
        in_range = temperature == 0 or 0.01 <= temperature <= 100
        checks = [
            ("batch-size", self.batch_size, self.batch_size >= 1, ">= 1"),
            ("max-new-tokens", decoding.max_new_tokens, decoding.max_new_tokens >= 1, ">= 1"),
            ("temperature", temperature, in_range, "0 (greedy) or in [0.01, 100]"),
            ("top-p", decoding.top_p, 0 < decoding.top_p <= 1, "in (0, 1]"),
            ("top-k", decoding.top_k, decoding.top_k >= 0, ">= 0 (0 is all)"),
            ("max-prompt-tokens", most, most is None or most >= 1, ">= 1"),
        ]
        for name, value, holds, allowed in checks:
            if not holds:
                raise EvalError(f"--{name} must be {allowed}, got {value}.")
        for name, number, neutral in (("top-p", decoding.top_p, 1), ("top-k", decoding.top_k, 0)):
            if temperature == 0 and number != neutral:
                raise EvalError(
                    f"--{name} needs sampling, got {number} with the greedy --temperature 0. Give a temperature, for "
                    f"example --temperature 0.7, or leave --{name} out."
                )

    def identity(self) -> dict[str, object]:
        """Return the settings that must be equal for a file to be continued: those that can change an output."""
        held = {name: value for name, value in asdict(self).items() if name not in PLACES}
        if self.decoding.temperature == 0:  # nothing is drawn
            held["decoding"] = {"max_new_tokens": self.decoding.max_new_tokens, "temperature": 0.0}
        return held
