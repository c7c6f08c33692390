"""Estimates as text and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from crosslore.estimate.activations import LLAMA_LIKE
from crosslore.estimate.methods import Method, Setting
from crosslore.estimate.peak import GB, GIB, LARGEST_BATCH, Estimate, Estimator

COLUMNS = (
    "method", "weights", "gradients", "state", "residual", "refresh", "activations", "peak", "at", "fits", "max batch",
    "max rank",
)  # fmt: skip
NUMBERS = tuple(name for name in COLUMNS if name not in ("method", "at", "fits"))


def row(estimator: Estimator, method: Method, setting: Setting, gpu_bytes: int) -> dict[str, Any]:  # Any: JSON
    """Return everything about one method: bytes, whether it fits, what would; or why it cannot be."""
    base: dict[str, Any] = {"method": method.name, "gradients_mode": method.gradients, "weights_mode": method.weights}
    try:
        found = estimator.estimate(method, setting)
    except ValueError as error:
        return base | {"status": "refused", "reason": str(error)}
    return base | {
        "status": "ok",
        "rank": setting.rank if method.has_rank else None,
        "rule": method.rule or setting.rule,
        "bytes": bytes_of(found),
        "peak_at": found.peak_at,
        "fits": found.peak <= gpu_bytes,
        "largest_batch": estimator.largest_batch(method, setting, gpu_bytes),
        "largest_rank": estimator.largest_rank(method, setting, gpu_bytes),
    }


def bytes_of(found: Estimate) -> dict[str, Any]:  # Any: JSON
    """Return the parts of an estimate in bytes."""
    held = found.tensors
    on, off = found.activations, found.activations_otherwise
    if not found.setting.checkpointing:
        on, off = off, on
    return {
        "weights": held.weights,
        "gradients": held.gradients,
        "state": held.state,
        "residual": held.residual,
        "deferred": held.deferred,
        "refresh": held.refresh,
        "activations": found.activations.saved,
        "activations_with_checkpointing": on.saved,
        "activations_without_checkpointing": off.saved,
        "loss": found.activations.loss,
        "cuda": found.cuda,
        "moments": found.moments,
        "peak": found.peak,
    }


def header(name: str, estimator: Estimator, setting: Setting, gpu_gb: float) -> list[str]:
    """Return the lines above the table: what is estimated, in which units, what is assumed."""
    entries = sum(p.numel() for p in estimator.model(setting.dtype).parameters())
    kind = getattr(estimator.config, "model_type", "?")
    lines = [
        f"{name}: {entries / GB:.2f} G weights in {setting.dtype}; {setting.batch} x {setting.seq} tokens, "
        f"checkpointing {'on' if setting.checkpointing else 'off'}, rank {setting.rank}, {setting.rule}, "
        f"accumulation {setting.accumulation}, embeddings {setting.embeddings}.",
        f"GB are 10^9 bytes. --gpu-gb {gpu_gb:g} is read as cards are sold, in GiB: {gpu_gb * GIB / GB:.2f} GB.",
        f"Counted from shapes, nothing is measured. CUDA's own {setting.cuda_gb:g} GB is assumed (--cuda-gb), and "
        "attention by SDPA or FlashAttention.",
    ]
    if kind not in LLAMA_LIKE:
        lines.append(f"Activations follow the LLaMA layer's formula, which was not checked for type {kind!r}.")
    return lines


def table(rows: Sequence[dict[str, Any]], chosen: str) -> list[list[str]]:  # Any: JSON
    """Return the cells of the table, the chosen method marked; refused ones are left out."""
    lines = []
    for one in rows:
        if one["status"] != "ok":
            continue
        held = one["bytes"]
        state = held["state"] + held["deferred"]
        sizes = (held["weights"], held["gradients"], state, held["residual"], held["refresh"], held["activations"])
        batch = one["largest_batch"]
        lines.append([
            ("* " if one["method"] == chosen else "  ") + one["method"],
            *(f"{size / GB:.2f}" for size in sizes), f"{held['peak'] / GB:.2f}", one["peak_at"],
            "yes" if one["fits"] else "no", f">= {batch}" if batch == LARGEST_BATCH else str(batch),
            "-" if one["largest_rank"] is None else str(one["largest_rank"]),
        ])  # fmt: skip
    return lines


def details(one: dict[str, Any]) -> list[str]:  # Any: JSON
    """Return the lines about the chosen method."""
    if one["status"] != "ok":
        return [f"{one['method']}: {one['reason']}"]
    held = one["bytes"]
    moments = ", ".join(f"{name} {size / GB:.2f}" for name, size in held["moments"].items())
    fixed = held["weights"] + held["state"] + held["residual"] + held["deferred"]
    return [
        f"* {one['method']}: {fixed / GB:.2f} of weights and state, {held['cuda'] / GB:.2f} of CUDA, and the largest "
        f"of the moments of a step: {moments}. Peak {held['peak'] / GB:.2f} GB ({held['peak'] / GIB:.2f} GiB).",
        f"  Activations {held['activations_with_checkpointing'] / GB:.2f} with checkpointing, "
        f"{held['activations_without_checkpointing'] / GB:.2f} without; the loss' own gradient {held['loss'] / GB:.2f}"
        + (f"; deferred updates {held['deferred'] / GB:.2f}, in `state`." if held["deferred"] else "."),
    ]


def as_json(
    name: str, setting: Setting, gpu_gb: float, *, rows: Sequence[dict[str, Any]], chosen: str
) -> dict[str, Any]:
    """Return the whole report as plain values; all sizes in bytes."""
    return {
        "model": name, "setting": asdict(setting), "gpu_bytes": round(gpu_gb * GIB), "cuda_is_assumed": True,
        "chosen": chosen, "methods": list(rows),
    }  # fmt: skip
