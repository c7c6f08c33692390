"""Prompts written and tokenised exactly as LLaMA-Factory's templates do it in training.

A model that LLaMA-Factory trained with one of its templates carries it as the tokenizer's chat template: `model`, the
default, uses that. The others are for models that carry none, or another one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from crosslore_eval.errors import EvalError, unknown_name
from crosslore_eval.tasks.base import Example

# Cutting a text at a token and writing the prompt again can give a token more: so many tries.
CUTS = 8
# The tokenizer's own chat template.
MODEL_TEMPLATE = "model"
BOS, EOS = "{bos}", "{eos}"
# Stands for a message while a chat template is looked at.
SENTINEL = "a message of 7 words, for comparison"


@dataclass(frozen=True, kw_only=True)
class Template:
    """A user's turn up to where the answer begins.

    Each part is tokenised by itself, which makes a difference for tokenizers that put a space in front of a text.
    """

    # Texts, one of them with `{content}`; BOS and EOS stand for the tokenizer's tokens.
    parts: tuple[str, ...]
    # where an answer of a model that runs on ends
    stop: tuple[str, ...] = ()


# LLaMA-Factory 0.9.5, data/template.py, first turn without a system message. A test holds each against it.
TEMPLATES: dict[str, Template] = {
    "alpaca": Template(
        parts=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n",
            "### Instruction:\n{content}\n\n### Response:\n",
        ),
        stop=("\n\n### Instruction:",),
    ),
    "chatml": Template(
        parts=("<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",), stop=("<|im_end|>", "<|im_start|>")
    ),
    "default": Template(parts=("Human: {content}", EOS, "\nAssistant:"), stop=("\nHuman:",)),
    "empty": Template(parts=("{content}",)),
    "llama2": Template(parts=(BOS, "[INST] {content} [/INST]")),
    "llama3": Template(
        parts=(
            BOS,
            "<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        stop=("<|eot_id|>",),
    ),
}


def content_of(instruction: str, input_text: str = "") -> str:
    """Return the user's message of an alpaca row: the input on a line of its own after the instruction."""
    return "\n".join(part for part in (instruction, input_text) if part)


@dataclass(frozen=True)
class PromptWriter:
    """Turns a user's message into a prompt, as text by calling it, and as tokens."""

    tokenizer: Any  # Any: transformers' classes are dynamic
    # None: the tokenizer's chat template, which is none of `TEMPLATES`
    template: Template | None

    def __call__(self, content: str) -> str:
        """Return the prompt as text."""
        if self.template is None:
            return rendered(self.tokenizer, content)
        tokens = {BOS: self.tokenizer.bos_token or "", EOS: self.tokenizer.eos_token or ""}
        return "".join(tokens[part] if part in tokens else _filled(part, content) for part in self.template.parts)

    def encode(self, content: str) -> list[int]:
        """Return the prompt as tokens; nothing is added to what the template writes."""
        if self.template is None:
            return self._tokens(self(content))
        found: list[int] = []
        for part in self.template.parts:
            if part in (BOS, EOS):
                token = self.tokenizer.bos_token_id if part == BOS else self.tokenizer.eos_token_id
                found += [] if token is None else [token]
            else:
                found += self._tokens(_filled(part, content))
        return found

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens


def _filled(part: str, content: str) -> str:
    before, mark, after = part.partition("{content}")
    return f"{before}{content}{after}" if mark else part


def rendered(tokenizer: Any, content: str) -> str:
    """Return what the tokenizer's chat template writes for one message."""
    messages = [{"role": "user", "content": content}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def check_template(name: str) -> None:
    """Raise `EvalError` unless `name` is one of `TEMPLATES`, or "model"."""
    if name != MODEL_TEMPLATE and name not in TEMPLATES:
        raise unknown_name("template", name, [MODEL_TEMPLATE, *TEMPLATES])


def prompt_writer(name: str, tokenizer: Any) -> PromptWriter:
    """Return what turns a user's message into a prompt.

    Args:
        name: one of `TEMPLATES`, or "model" for the tokenizer's own chat template; one that writes what one of
            `TEMPLATES` writes is taken for that one.
        tokenizer: of the model.

    Raises:
        EvalError: if the name is unknown, or the tokenizer has no chat template.
    """
    if name == MODEL_TEMPLATE:
        if not getattr(tokenizer, "chat_template", None):
            raise EvalError(
                "--template model needs a tokenizer with a chat template, and this model's has none. Give the template "
                f"that it was trained with: --template {' | '.join(TEMPLATES)} (`template:` in LLaMA-Factory's YAML)."
            )
        wanted = rendered(tokenizer, SENTINEL)
        same = (template for template in TEMPLATES.values() if PromptWriter(tokenizer, template)(SENTINEL) == wanted)
        return PromptWriter(tokenizer, next(same, None))
    check_template(name)
    return PromptWriter(tokenizer, TEMPLATES[name])


def stops_of(name: str) -> tuple[str, ...]:
    """Return the texts at which an answer under a template ends."""
    return TEMPLATES[name].stop if name in TEMPLATES else ()


def cut(text: str, stops: tuple[str, ...]) -> str:
    """Return the answer without surrounding white space, up to the first stop text inside it."""
    answer = text.strip()
    ends = [position for stop in stops if (position := answer.find(stop)) >= 0]
    return answer[: min(ends)].rstrip() if ends else answer


@dataclass(kw_only=True)
class Prompts:
    """Prompts as text and tokens, and how many lost the end of their input."""

    texts: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    shortened: int = 0

    def sha256(self, index: int) -> str:
        """Return the hash of one prompt."""
        return hashlib.sha256(self.texts[index].encode()).hexdigest()


def write_prompts(tokenizer: Any, examples: Sequence[Example], *, template: str, limit: int | None = None) -> Prompts:
    """Return the prompts of examples; of those that are too long the end of the input is cut, and they are counted.

    Args:
        tokenizer: of the model; nothing is added to what the template writes.
        examples: to ask.
        template: one of `TEMPLATES`, or "model".
        limit: the most tokens of a prompt; None for no limit.

    Raises:
        EvalError: if a prompt does not fit even without its input.
    """
    write, prompts = prompt_writer(template, tokenizer), Prompts()
    for number, example in enumerate(examples, start=1):
        content, kept = content_of(example.instruction, example.input), example.input
        tokens = write.encode(content)
        for _ in range(CUTS):
            if limit is None or len(tokens) <= limit or not kept:
                break
            pieces = tokenizer(kept, add_special_tokens=False)["input_ids"]
            room = max(0, len(pieces) - (len(tokens) - limit))
            kept = str(tokenizer.decode(pieces[:room], skip_special_tokens=True))
            content = content_of(example.instruction, kept)
            tokens = write.encode(content)
        if limit is not None and len(tokens) > limit:
            raise EvalError(f"the prompt of example {number} has {len(tokens)} tokens without its input, {limit} fit.")
        prompts.shortened += kept != example.input
        prompts.texts.append(write(content))
        prompts.tokens.append(tokens)
    return prompts
