"""From a model's weights to the low-rank matrices in them: sides, heads, spans."""

import logging
from dataclasses import replace

from torch import nn

from crosslore.config import LowRankConfig
from crosslore.heads import AttentionShape, attention_shape
from crosslore.layout import Block, MatrixLayout, shorter_side
from crosslore.targets import Matrix, embedding_weights, matches, matrices, require_match, select_targets

logger = logging.getLogger(__name__)

# Positions are int32.
LARGEST_RESIDUAL = 2**31 - 1


def plan_blocks(model: nn.Module, config: LowRankConfig, *, explicit: frozenset[str]) -> dict[int, list[Block]]:
    """Return the blocks of every low-rank weight, by id of the weight."""
    shape = attention_shape(model)
    plans = {
        id(matrix.weight): plan_matrix(name, matrix, config, shape)
        for name, matrix in select_targets(model, config.targets).items()
    }
    if config.embeddings == "lowrank":
        for name, weight in embedding_weights(model).items():
            if weight.requires_grad:
                rows, cols = weight.shape
                plans[id(weight)] = [Block(layout=_layout(name, rows, cols, config))]
    _check_names(model, config, shape, plans, explicit)
    return plans


def plan_matrix(name: str, matrix: Matrix, config: LowRankConfig, shape: AttentionShape | None) -> list[Block]:
    """Return one block for a weight, or one for each of query, key and value if it is a fused one.

    Args:
        name: dotted name of the module.
        matrix: the weight and how it is stored.
        config: rank, and which names share a basis or have a residual.
        shape: the model's heads, if known.

    Raises:
        ValueError: if the rank does not fit, or stacked matrices are to have a residual; names the layer.
    """
    rows, cols = matrix.shape
    if matrix.kind == "stacked":
        if config.residual == "sparse" and matches(name, config.residual_targets or ()):
            raise ValueError(
                f"residual_targets names {name}, whose {len(matrix.weight)} matrices are stacked: the sparse residual "
                "is for single matrices. Take it out of `residual_targets`."
            )
        return [Block(layout=_layout(name, rows, cols, config, batch=(len(matrix.weight),)))]
    transposed = matrix.kind == "transposed"
    spans = shape.fused_spans(name.rsplit(".", 1)[-1], rows) if shape else None
    if spans is None:
        heads = shape.heads_in(rows) if shape else None
        return [replace(_block(name, rows, cols, heads, config), transposed=transposed)]
    parent = name.rpartition(".")[0]
    blocks = []
    for role, (span, heads) in spans.items():
        part = f"{parent}.{role}" if parent else role
        length = rows // span.stride * span.length
        block = _block(part, length, cols, heads, config)
        blocks.append(replace(block, key=f"{role}.", span=span, transposed=transposed))
    return blocks


def _block(name: str, rows: int, cols: int, heads: int | None, config: LowRankConfig) -> Block:
    shared = heads is not None and matches(name, config.cross_head_targets or ())
    residual = config.residual == "sparse" and (
        config.residual_targets is None or matches(name, config.residual_targets)
    )
    if residual and rows * cols > LARGEST_RESIDUAL:
        raise ValueError(
            f"{name} has {rows} x {cols} entries, the sparse residual counts up to {LARGEST_RESIDUAL}. "
            "Take it out of `residual_targets`."
        )
    layout = _layout(name, rows, cols, config, heads=heads if shared and heads else None)
    return Block(layout=layout, cross_head=shared, residual=residual)


def _layout(
    name: str, rows: int, cols: int, config: LowRankConfig, *, heads: int | None = None, batch: tuple[int, ...] = ()
) -> MatrixLayout:
    """Return the layout; heads share the input side, else the basis is on the shorter side."""
    side = "right" if heads else shorter_side(rows, cols, square=config.square_side)
    try:
        return MatrixLayout(rows=rows, cols=cols, rank=config.rank, side=side, heads=heads or 1, batch=batch)
    except ValueError as error:
        raise ValueError(f"{name.removesuffix('.weight')}: {error}") from None


def _check_names(
    model: nn.Module,
    config: LowRankConfig,
    shape: AttentionShape | None,
    plans: dict[int, list[Block]],
    explicit: frozenset[str],
) -> None:
    """Check the names of cross-head and residual targets: an error if the user gave them, a note if a preset did."""
    found = matrices(model)
    names = set(found)
    for name, matrix in found.items():
        if shape and shape.fused_spans(name.rsplit(".", 1)[-1], matrix.shape[0]):
            names |= {".".join([*name.split(".")[:-1], role]) for role in ("q_proj", "k_proj", "v_proj")}
    for option in ("cross_head_targets", "residual_targets"):
        for pattern in getattr(config, option) or ():
            if option in explicit:
                require_match(pattern, names, option=option)
    wanted = [n for n in names if matches(n, config.cross_head_targets or ())]
    planned = {id(matrix.weight) for n, matrix in found.items() if n in wanted} & set(plans)
    shared = any(block.cross_head for plan in plans.values() for block in plan)
    if config.cross_head_targets and not shared and (planned or not wanted):
        what = f"{config.cross_head_targets} of a {getattr(getattr(model, 'config', None), 'model_type', 'model')}"
        logger.warning(
            "The attention heads of %s could not be determined: training without cross-head sharing. "
            "Set `cross_head_targets` to the names of query and key layers if the model has them.",
            what,
        )
    if (
        config.residual == "sparse"
        and config.residual_targets
        and not any(b.residual for plan in plans.values() for b in plan)
    ):
        logger.warning("No layer matches residual_targets %s: training without a residual.", config.residual_targets)
