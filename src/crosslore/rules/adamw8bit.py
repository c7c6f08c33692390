"""AdamW whose moments are stored in 8 bits, block by block, with bitsandbytes' quantiser."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from crosslore.config import Hyper
from crosslore.rules.adamw import AdamW, adamw_update_

# Elements that share one scale; bitsandbytes' block size for optimizer states.
BLOCK_SIZE = 256
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


@lru_cache(maxsize=4)
def _code(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 values that the 8-bit codes stand for (dynamic tree quantisation)."""
    code: Tensor = _functional().create_dynamic_map(signed=signed)
    return code.to(device)


@dataclass(frozen=True)
class AdamW8bit:
    """Dequantise, one fp32 step of `AdamW`, quantise again; 2 bytes and 1/32 per compact entry.

    State: `exp_avg`, `exp_avg_sq` uint8 and their block scales `exp_avg_scale`, `exp_avg_sq_scale` fp32.
    """

    # See AdamW.
    eps_placement: str = "corrected"

    def init(self, low: Tensor) -> dict[str, Tensor]:
        """Return zero moments; fp32 below 4096 entries."""
        _functional()
        state = AdamW(self.eps_placement).init(low.float())
        if low.numel() >= MIN_8BIT_SIZE:
            for key in ("exp_avg", "exp_avg_sq"):
                _store(state, key, state[key])
        return state

    def update(self, low: Tensor, state: dict[str, Tensor], t: int, hp: Hyper) -> Tensor:
        """Return N_t in fp32; the quantised moments change in place."""
        exp_avg, exp_avg_sq = self._load(state, "exp_avg"), self._load(state, "exp_avg_sq")
        update = adamw_update_(low.to(exp_avg.dtype), exp_avg, exp_avg_sq, t=t, hp=hp, eps_placement=self.eps_placement)
        if "exp_avg_scale" in state:
            _store(state, "exp_avg", exp_avg)
            _store(state, "exp_avg_sq", exp_avg_sq)
        return update

    def first_moment(self, state: dict[str, Tensor]) -> Tensor | None:
        """Return M'_t, dequantised."""
        return self._load(state, "exp_avg")

    def second_moment(self, state: dict[str, Tensor]) -> Tensor | None:
        """Return V'_t, dequantised."""
        return self._load(state, "exp_avg_sq")

    def _load(self, state: dict[str, Tensor], key: str) -> Tensor:
        if f"{key}_scale" not in state:
            return state[key]
        codes = state[key]
        values: Tensor = _functional().dequantize_blockwise(
            codes,
            absmax=state[f"{key}_scale"],
            code=_code(key == "exp_avg", codes.device),
            blocksize=BLOCK_SIZE,
        )
        return values


def _store(state: dict[str, Tensor], key: str, values: Tensor) -> None:
    codes, info = _functional().quantize_blockwise(
        values.float(), code=_code(key == "exp_avg", values.device), blocksize=BLOCK_SIZE
    )
    state[key], state[f"{key}_scale"] = codes, info.absmax
