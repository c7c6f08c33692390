"""Which modules of a model are trained in low rank."""

from collections.abc import Iterable

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
    """Return the name without what DDP and torch.compile put in front, so that seeds do not depend on them."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear layer with its name, a shared weight once, under its first name."""
    found: dict[str, nn.Linear] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[plain_name(name)] = module
    return found


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


def select_targets(model: nn.Module, targets: str | tuple[str, ...]) -> dict[str, nn.Linear]:
    """Return the linear layers that are trained in low rank, frozen ones left out.

    Args:
        model: any module.
        targets: "all-linear" (every linear layer but heads, routers and what is tied to an embedding) or names.

    Raises:
        ValueError: if nothing matches; lists what exists.
    """
    linears = linear_modules(model)
    if targets == ALL_LINEAR:
        ends = {id(weight) for weight in embedding_weights(model).values()}
        chosen = {
            name: module
            for name, module in linears.items()
            if id(module.weight) not in ends and HEAD_PARTS.isdisjoint(name.split("."))
        }
    else:
        for pattern in targets:
            require_match(pattern, linears, option="targets")
        chosen = {name: module for name, module in linears.items() if matches(name, targets)}
    trained = {name: module for name, module in chosen.items() if module.weight.requires_grad}
    if not trained:
        why = (
            "all of them are frozen"
            if chosen
            else "the model has no nn.Linear besides its heads (others, such as Conv1D, are no targets)"
        )
        raise ValueError(
            f"targets={targets!r} selects no linear layer to train: {why}. "
            f"Linear layers of the model: {existing(linears)}."
        )
    return trained


def require_match(pattern: str, names: Iterable[str], *, option: str) -> None:
    """Raise a ValueError that lists what exists if no name matches the pattern."""
    if not any(matches(name, (pattern,)) for name in names):
        raise ValueError(
            f"{option} names {pattern!r}, which is no linear layer of the model. "
            f"Linear layers of the model: {existing(names)}. Use one of these names, or leave `{option}` out."
        )


def existing(names: Iterable[str]) -> str:
    """Return the distinct last parts of the names, for messages."""
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names})) or "none"
