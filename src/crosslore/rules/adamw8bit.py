"""AdamW whose moments are stored in 8 bits, block by block, with bitsandbytes' quantiser."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from crosslore.config import Hyper
from crosslore.kernels import dispatch
from crosslore.rules.adamw import AdamW
from crosslore.rules.base import PIECE, Rule, State

# Elements that share one scale; bitsandbytes' block size for optimizer states.
BLOCK_SIZE = 256
# Lowest code of a second moment: 0 stands for nothing, and the update of an entry whose second moment is rounded to
# nothing while its first is not is 1 / eps times too large as soon as one of its gradients is 0. bitsandbytes' own
# optimizers have this trap; transformers keeps their embeddings, whose rows rest between tokens, in fp32.
LOWEST_SECOND = 1
# Values below this share of their block's largest are too close together for bitsandbytes' routine on the CPU.
COARSE = 1e-3
# Smaller tensors stay in fp32, as bitsandbytes' `min_8bit_size`.
MIN_8BIT_SIZE = 4096


@lru_cache(maxsize=1)
def _functional() -> Any:  # Any: bitsandbytes ships no types
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ImportError(
            "rule 'adamw8bit' needs bitsandbytes, which is not installed. "
            'Run `pip install "crosslore[bnb]"`, or use rule="adamw".'
        ) from error
    return functional


@lru_cache(maxsize=32)  # two for each device
def _code(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 values that the 8-bit codes stand for (dynamic tree quantisation)."""
    code: Tensor = _functional().create_dynamic_map(signed=signed)
    return code.to(device)


def quantise(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest codes of fp32 values, uint8 in their shape, and the largest magnitude of each block.

    bitsandbytes' routine for the CPU (0.50.2) looks a value up in a table of 65536 equal bins, which gives all below
    1.6e-5 of their block's largest one code. Those are looked up again.
    """
    codes, info = _functional().quantize_blockwise(values, code=code, blocksize=BLOCK_SIZE)
    if values.device.type == "cpu":
        whole = values.numel() // BLOCK_SIZE * BLOCK_SIZE
        midpoints, flat, flat_codes = (code[:-1] + code[1:]) / 2, values.reshape(-1), codes.view(-1)
        for part in (slice(0, whole), slice(whole, None)):
            if flat[part].numel():
                rows, scales = flat[part].view(-1, min(BLOCK_SIZE, len(flat[part]))), info.absmax[_blocks(part)]
                small = rows.abs() < (scales * COARSE)[:, None]
                exact = rows[small] / scales[small.nonzero()[:, 0]]
                flat_codes[part].view(rows.shape)[small] = torch.bucketize(exact, midpoints).to(torch.uint8)
    return codes, info.absmax


def _blocks(part: slice) -> slice:
    """Return the blocks of these elements."""
    return slice(part.start // BLOCK_SIZE, None if part.stop is None else part.stop // BLOCK_SIZE)


@dataclass(frozen=True)
class AdamW8bit(Rule):
    """Dequantise, one fp32 step of `AdamW`, quantise again; 2 bytes and 1/32 per compact entry.

    On a GPU the three are one Triton kernel where Triton is at hand. State: `exp_avg`, `exp_avg_sq` uint8 and their
    block scales `exp_avg_scale`, `exp_avg_sq_scale` fp32; tensors of fewer than 4096 entries keep fp32 moments.
    """

    elementwise: ClassVar[bool] = True
    # Whether the codes live in memory that the driver moves between GPU and host.
    paged: ClassVar[bool] = False

    def init(self, low: Tensor) -> State:
        """Return zero moments; fp32 below 4096 entries."""
        _functional()
        if low.numel() < MIN_8BIT_SIZE:
            return AdamW(self.eps_placement).init(low.float())
        state: State = {}
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = self._allocate(low)
            # The code that stands for zero: the middle of the signed map, the start of the unsigned one.
            state[key].fill_(int(_code(key == "exp_avg", low.device).abs().argmin()))
            state[f"{key}_scale"] = torch.zeros(-(-low.numel() // BLOCK_SIZE), dtype=torch.float32, device=low.device)
        return state

    def update(self, low: Tensor, state: State, t: int, hp: Hyper) -> Tensor:
        """Return N_t in fp32; the moments change in place."""
        adamw = AdamW(self.eps_placement)
        if "exp_avg_scale" not in state:
            return adamw.update(low, state, t, hp)
        if dispatch.use_triton(low) or (self.paged and low.is_cuda):
            return self._update_fused(low, state, t, hp)
        first, second = self.load(state)
        assert first is not None and second is not None
        update = adamw.update(low, {"exp_avg": first, "exp_avg_sq": second}, t, hp)
        self.store_(state, first, second)
        return update

    def update_many(
        self, lows: Sequence[Tensor], states: Sequence[State], steps: Sequence[int], hp: Hyper
    ) -> list[Tensor]:
        """Return the updates of several tensors; by one kernel for those of one step and dtype, on a GPU."""
        fused: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
        updates: dict[int, Tensor] = {}
        for i, (low, state, t) in enumerate(zip(lows, states, steps, strict=True)):
            if "exp_avg_scale" in state and not self.paged and dispatch.use_triton(low):
                fused.setdefault((t, low.dtype, low.device), []).append(i)
            else:
                updates[i] = self.update(low, state, t, hp)
        for (t, _, _), those in fused.items():
            grads, moments = [lows[i].contiguous() for i in those], [states[i] for i in those]
            made = dispatch.adamw8bit_update_many_(grads, moments, **self._numbers(grads[0], t, hp))
            updates |= zip(those, made, strict=True)
        return [updates[i] for i in range(len(lows))]

    def step_weight_(
        self, weight: Tensor, grad: Tensor, state: State, t: int, hp: Hyper, *, draws: torch.Generator | None = None
    ) -> None:
        """Do one step of a weight at full rank; by one kernel on a GPU, without anything of its size in fp32."""
        plain = draws is None and "exp_avg_scale" in state and not self.paged and weight.is_contiguous()
        if not (plain and dispatch.use_triton(weight) and dispatch.use_triton(grad)):
            return super().step_weight_(weight, grad, state, t, hp, draws=draws)
        factors = {"weight_factor": hp.weight_factor, "update_factor": hp.update_factor}
        dispatch.adamw8bit_weight_(weight, grad.contiguous(), state, **self._numbers(grad, t, hp), **factors)

    def _numbers(self, low: Tensor, t: int, hp: Hyper) -> dict[str, Any]:  # Any: the kernels' own arguments
        """Return what the kernels take beside the tensors."""
        books = {"code_signed": _code(True, low.device), "code_unsigned": _code(False, low.device)}
        eps = AdamW(self.eps_placement).factors(t, hp)[1]
        return {**books, "t": t, "beta1": hp.betas[0], "beta2": hp.betas[1], "eps": eps}

    def load(self, state: State) -> tuple[Tensor | None, Tensor | None]:
        """Return M'_t and V'_t, dequantised; the state itself where it is fp32."""
        if "exp_avg_scale" not in state:
            return super().load(state)
        return self._dequantised(state, "exp_avg"), self._dequantised(state, "exp_avg_sq")

    def first_moment(self, state: State) -> Tensor | None:
        """Return M'_t alone."""
        return self._dequantised(state, "exp_avg") if "exp_avg_scale" in state else super().first_moment(state)

    def second_moment(self, state: State) -> Tensor | None:
        """Return V'_t alone."""
        return self._dequantised(state, "exp_avg_sq") if "exp_avg_scale" in state else super().second_moment(state)

    def _dequantised(self, state: State, key: str) -> Tensor:
        scale = state[f"{key}_scale"]
        codes = state[key].to(scale.device)  # paged codes count as the CPU's
        values: Tensor = _functional().dequantize_blockwise(
            codes, absmax=scale, code=_code(key == "exp_avg", scale.device), blocksize=BLOCK_SIZE
        )
        return values

    def store_(self, state: State, first: Tensor | None, second: Tensor | None) -> None:
        """Quantise the moments into the state."""
        if "exp_avg_scale" not in state:
            return super().store_(state, first, second)
        for key, values in (("exp_avg", first), ("exp_avg_sq", second)):
            if values is not None:
                code = _code(key == "exp_avg", values.device)
                codes, scale = quantise(values.float(), code)
                state[key].copy_(codes if key == "exp_avg" else codes.clamp_(min=LOWEST_SECOND))
                state[f"{key}_scale"].copy_(scale)

    def accumulate_(self, first: Tensor, second: Tensor, value: Tensor, square: Tensor, *, t: int, hp: Hyper) -> None:
        """Advance both moving averages (Eq. 7), which the residual keeps in fp32."""
        AdamW(self.eps_placement).accumulate_(first, second, value, square, t=t, hp=hp)

    def direction(self, first: Tensor, second: Tensor, *, t: int, hp: Hyper) -> Tensor:
        """Return N_t of these moments, a new tensor."""
        return AdamW(self.eps_placement).direction(first, second, t=t, hp=hp)

    def bias_factor(self, t: int, hp: Hyper) -> float:
        """Return AdamW's."""
        return AdamW(self.eps_placement).bias_factor(t, hp)

    def pieces(self, weight: Tensor, grad: Tensor, state: State) -> list[tuple[Tensor, Tensor, State]]:
        """Return views that hold whole quantisation blocks."""
        whole = weight.is_contiguous() and grad.is_contiguous() and not self.paged
        if "exp_avg_scale" not in state or weight.numel() <= PIECE or not whole:
            return super().pieces(weight, grad, state)
        lengths = {"exp_avg": PIECE, "exp_avg_sq": PIECE}
        lengths |= {f"{key}_scale": PIECE // BLOCK_SIZE for key in ("exp_avg", "exp_avg_sq")}
        parts = [weight.view(-1).split(PIECE), grad.view(-1).split(PIECE)]
        parts += [state[key].view(-1).split(length) for key, length in lengths.items()]
        return [(w, g, dict(zip(lengths, rest, strict=True))) for w, g, *rest in zip(*parts, strict=True)]

    def state_of_rows(self, state: State, weight: Tensor, rows: slice) -> State:
        """Return views of codes and of the scales of their blocks."""
        if "exp_avg_scale" not in state:
            return super().state_of_rows(state, weight, rows)
        first, stop = rows.start * weight.shape[1] // BLOCK_SIZE, -(-rows.stop * weight.shape[1] // BLOCK_SIZE)
        part = {key: state[key][rows] for key in ("exp_avg", "exp_avg_sq")}
        return part | {f"{key}_scale": state[f"{key}_scale"][first:stop] for key in part}

    def _allocate(self, low: Tensor) -> Tensor:
        return torch.empty(low.shape, dtype=torch.uint8, device=low.device)

    def _update_fused(self, low: Tensor, state: State, t: int, hp: Hyper) -> Tensor:
        moments = (state[key] for key in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"))
        return dispatch.adamw8bit_update_(low.contiguous(), *moments, **self._numbers(low, t, hp))


@dataclass(frozen=True)
class PagedAdamW8bit(AdamW8bit):
    """`AdamW8bit` with its codes in CUDA's managed memory, which moves to the host when the GPU is full.

    bitsandbytes' own block-wise kernel reads them there, with its trap (`LOWEST_SECOND`). On other devices it is
    `AdamW8bit`.
    """

    paged: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False  # a view of paged codes is not paged

    def _allocate(self, low: Tensor) -> Tensor:
        if low.device.type != "cuda":
            return super()._allocate(low)
        paged: Tensor = _functional().get_paged(*low.shape, dtype=torch.uint8, device=low.device)
        return paged

    def _update_fused(self, low: Tensor, state: State, t: int, hp: Hyper) -> Tensor:
        for key in ("exp_avg", "exp_avg_sq"):
            if low.is_cuda and not getattr(state[key], "is_paged", False):  # they were loaded from a checkpoint
                codes, state[key] = state[key], self._allocate(low)
                state[key].copy_(codes)
        return self.update_by_bitsandbytes(low, state, t, hp)

    def update_by_bitsandbytes(self, low: Tensor, state: State, t: int, hp: Hyper) -> Tensor:
        """Return N_t from bitsandbytes' kernel, which is given a weight of zeros and learning rate -1."""
        update = torch.zeros_like(low, dtype=torch.float32, memory_format=torch.contiguous_format)
        _, eps, _ = AdamW(self.eps_placement).factors(t, hp)
        _functional().optimizer_update_8bit_blockwise(
            optimizer_name="adam",
            g=low.float().contiguous(),
            p=update,
            state1=state["exp_avg"],
            state2=state["exp_avg_sq"],
            beta1=hp.betas[0],
            beta2=hp.betas[1],
            beta3=0.0,
            alpha=0.0,
            eps=eps,
            step=t,
            lr=-1.0,
            qmap1=_code(True, low.device),
            qmap2=_code(False, low.device),
            absmax1=state["exp_avg_scale"],
            absmax2=state["exp_avg_sq_scale"],
            weight_decay=0.0,
            gnorm_scale=1.0,
            skip_zeros=False,
        )
        return update
