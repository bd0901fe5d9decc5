"""How AdamW's two moments of a table are kept: in full, in bf16, or in 8 bits with one scale per row."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

State = dict[str, Tensor]
FIRST, SECOND = "exp_avg", "exp_avg_sq"


class PlainMoments:
    """Moments as they are, in the table's dtype or a narrower one."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """Args: dtype: of the moments; None for the table's."""
        self.dtype = dtype

    def new_state(self, table_RV: Tensor) -> State:
        """Moments of a table that has not been updated: zeros [R, V]."""
        return {name: torch.zeros_like(table_RV, dtype=self.dtype) for name in (FIRST, SECOND)}

    def read_rows(self, state: State, name: str, rows_M: Tensor) -> Tensor:
        """One moment of some rows, [M, V]."""
        return state[name].index_select(0, rows_M)

    def write_rows(self, state: State, name: str, rows_M: Tensor, moment_MV: Tensor) -> None:
        """Put back what :meth:`read_rows` gave; the rows are distinct."""
        state[name].index_copy_(0, rows_M, moment_MV.to(state[name].dtype))


class EightBitMoments:
    """Moments in 8-bit dynamic codes (Dettmers et al., arXiv 2110.02861) with one fp32 scale per row.

    A row is a block, so that a step reads and writes the touched rows alone; blocks of a fixed size, as in torchao and
    bitsandbytes, span rows. Of the second moment the square root is coded: a code reaches down to 5·10⁻⁷ of the row's
    largest element, and the square of a small gradient would be rounded to 0 while its first moment is not.
    """

    def new_state(self, table_RV: Tensor) -> State:
        """Codes [R, V] uint8 and scales [R] fp32 of moments that are zero."""
        state = {}
        for name in (FIRST, SECOND):
            state[f"{name}_code"] = torch.zeros_like(table_RV, dtype=torch.uint8)
            state[f"{name}_scale"] = table_RV.new_zeros(table_RV.shape[0], dtype=torch.float32)
        return state

    def read_rows(self, state: State, name: str, rows_M: Tensor) -> Tensor:
        """One moment of some rows, [M, V] fp32."""
        levels, _ = _codebook(name == FIRST, rows_M.device)
        code_MV = state[f"{name}_code"].index_select(0, rows_M)
        unit_MV = levels[code_MV.int()]
        moment_MV = unit_MV * state[f"{name}_scale"].index_select(0, rows_M)[:, None]
        return moment_MV if name == FIRST else moment_MV.square_()

    def write_rows(self, state: State, name: str, rows_M: Tensor, moment_MV: Tensor) -> None:
        """Put back what :meth:`read_rows` gave; the rows are distinct."""
        _, codes = _codebook(name == FIRST, rows_M.device)
        moment_MV = moment_MV.float() if name == FIRST else moment_MV.float().sqrt()
        scale_M = moment_MV.abs().amax(1)
        unit_MV = moment_MV / scale_M.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        state[f"{name}_code"].index_copy_(0, rows_M, codes[_bf16_pattern(unit_MV)])
        state[f"{name}_scale"].index_copy_(0, rows_M, scale_M)


Moments = PlainMoments | EightBitMoments

MOMENT_TYPES: dict[str, Callable[[], Moments]] = {
    "fp32": PlainMoments,
    "bf16": lambda: PlainMoments(torch.bfloat16),
    "8bit": EightBitMoments,
}


def _bf16_pattern(x: Tensor) -> Tensor:
    """The 16 bits of each element rounded to bf16, as a number in [0, 65536)."""
    return x.bfloat16().view(torch.int16).int() & 0xFFFF


@cache
def _codebook(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels [256] fp32 of the dynamic code, ascending in [−1, 1] or [0, 1], and the code of every bf16 number.

    Decade by decade below 1 the number of levels halves: 64 with a sign, 128 without, in [0.1, 1]. A table of all bf16
    numbers finds the nearest level 10 times faster than a search; bf16 is finer than any gap between levels.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade * (1 if signed else 2) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        levels += [middles, -middles] if signed else [middles]
    ascending = torch.cat(levels).sort().values
    if signed:
        # The published code has no −1: a row's largest element, if negative, would shrink every time it is written.
        ascending[0] = -1.0
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    codes = torch.bucketize(numbers, (ascending[:-1] + ascending[1:]) / 2).to(torch.uint8)
    return ascending.to(device), codes.to(device)
