"""Which modules of a model are trained in low rank."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from torch import Tensor, nn

from crosslore.config import ALL_LINEAR

# Output heads and routers: linear layers that "all-linear" leaves at full rank. Parts of module names.
HEAD_PARTS = frozenset(
    {
        "lm_head",
        "embed_out",
        "output_layer",
        "score",
        "classifier",
        "qa_outputs",
        "v_head",
        "gate",
        "router",
        "shared_expert_gate",
    }
)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a dotted name ends with one of the patterns, compared by whole parts."""
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def plain_name(name: str) -> str:
    """Return the name without what torch.compile puts into it, so that seeds do not depend on it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


@dataclass(frozen=True)
class Matrix:
    """A weight that can be trained as one or more matrices."""

    weight: Tensor
    # "linear": (out, in). "transposed": (in, out). "stacked": (experts, out, in). "conv": (out, in, kernel ...).
    kind: Literal["linear", "transposed", "stacked", "conv"] = "linear"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix, of each one if they are stacked."""
        if self.kind == "conv":
            return self.weight.shape[0], self.weight[0].numel()
        rows, cols = self.weight.shape[-2:]
        return (cols, rows) if self.kind == "transposed" else (rows, cols)


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """Return every weight that is a matrix in some form, by the name of its module; a shared one once.

    Stacked experts, parameters of three dimensions in a module called "experts", go by their own name.
    """
    found: dict[str, Matrix] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for matrix_name, matrix in _matrices_of(name, module):
            if not isinstance(matrix.weight, nn.Parameter):
                continue  # computed at each access, as under torch.nn.utils.parametrize: what it is made of trains
            if id(matrix.weight) not in seen:
                seen.add(id(matrix.weight))
                found[plain_name(matrix_name)] = matrix
    return found


def _matrices_of(name: str, module: nn.Module) -> list[tuple[str, Matrix]]:
    """Return the matrices that one module holds itself."""
    if isinstance(module, nn.Linear):
        return [(name, Matrix(module.weight))]
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' own, of GPT-2
        return [(name, Matrix(module.weight, "transposed"))]  # type: ignore[arg-type]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return [(name, Matrix(module.weight, "conv"))]
    if "experts" in name.split("."):
        own = module.named_parameters(recurse=False)
        return [(f"{name}.{key}", Matrix(p, "stacked")) for key, p in own if p.dim() == 3]
    return []


def embedding_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of input embeddings and of the output layer, which are one weight when tied."""
    found: dict[str, Tensor] = {
        f"{plain_name(name)}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(output, nn.Linear):
        name = next((plain_name(n) for n, m in model.named_modules() if m is output), "lm_head")
        if not any(output.weight is weight for weight in found.values()):
            found[f"{name}.weight"] = output.weight
    return found


def select_targets(model: nn.Module, targets: str | tuple[str, ...]) -> dict[str, Matrix]:
    """Return the matrices that are trained in low rank, frozen ones left out.

    Args:
        model: any module.
        targets: "all-linear" (every linear layer and stacked expert but heads, routers and what is tied to an
            embedding; convolutions only by name) or names.

    Raises:
        ValueError: if nothing matches; lists what exists.
    """
    found = matrices(model)
    if targets == ALL_LINEAR:
        ends = {id(weight) for weight in embedding_weights(model).values()}
        chosen = {
            name: matrix
            for name, matrix in found.items()
            if id(matrix.weight) not in ends and matrix.kind != "conv" and HEAD_PARTS.isdisjoint(name.split("."))
        }
    else:
        for pattern in targets:
            require_match(pattern, found, option="targets")
        chosen = {name: matrix for name, matrix in found.items() if matches(name, targets)}
    trained = {name: matrix for name, matrix in chosen.items() if matrix.weight.requires_grad}
    if not trained:
        why = "all of them are frozen" if chosen else "the model has no linear layer besides its heads"
        raise ValueError(
            f"targets={targets!r} selects no linear layer to train: {why}. Layers that can be named: {existing(found)}."
        )
    return trained


def require_match(pattern: str, names: Iterable[str], *, option: str) -> None:
    """Raise a ValueError that lists what exists if no name matches the pattern."""
    if not any(matches(name, (pattern,)) for name in names):
        near = get_close_matches(pattern, existing(names).split(", "), n=3, cutoff=0.6)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        if pattern in ("all", "none") or "," in pattern:
            hint = f"In Python give a list such as ('q_proj', 'k_proj'), {ALL_LINEAR!r} for targets, or None. "
        raise ValueError(
            f"{option} names {pattern!r}, which is no linear layer of the model. {hint}"
            f"Linear layers of the model: {existing(names)}. Use one of these names, or leave `{option}` out."
        )


def existing(names: Iterable[str]) -> str:
    """Return the distinct last parts of the names, for messages."""
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names})) or "none"
