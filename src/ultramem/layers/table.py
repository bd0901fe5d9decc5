"""The pool of rows that memory layers read, and the ring windows through which layers see it."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ultramem.errors import ConfigError
from ultramem.ops import Activation, RowGradients, bag, pooled_read

TableGradients = Literal["dense", "rows"]


@dataclass(frozen=True)
class RingWindow:
    """The part of a ring of ``num_rows`` rows that one layer addresses: ``size`` rows from ``offset`` on."""

    offset: int
    size: int
    num_rows: int

    def physical_rows(self, virtual_NK: Tensor, num_blocks: int) -> Tensor:
        """Rows of the pool [N, K] int64 behind virtual indices: ((virtual mod size) + offset) mod num_rows.

        Args:
            virtual_NK: indices in [0, num_blocks · size).
            num_blocks: E, virtual blocks over the window.
        """
        # Remainders are slow, and most windows need none.
        rows_NK = virtual_NK.long()
        if num_blocks > 1:
            rows_NK = rows_NK % self.size
        if self.offset:
            rows_NK = rows_NK + self.offset
        if self.offset + self.size > self.num_rows:
            rows_NK = rows_NK % self.num_rows
        return rows_NK


def window_side(num_keys: int, num_memories: int, share_ratio: float | None) -> int:
    """Side w of a layer's square window: ⌊√(share_ratio · L · n²)⌋ (UltraMemV2, arXiv 2508.18756).

    Args:
        num_keys: n, keys per side of one layer's own share.
        num_memories: L.
        share_ratio: share of the pool that each layer sees, in (0, 1]; None for 1/L, a private window of n² rows.
    """
    if share_ratio is None:
        return num_keys
    # 1e-6 of a row: share_ratio 1/3 of 3·n² rows must not round down to n² − 1.
    return math.isqrt(int(share_ratio * num_memories * num_keys**2 + 1e-6))


class MemoryPool(nn.Module):
    """Rows of values, and optionally of pre-values, shared by the memory layers of a model, which owns it.

    Args:
        num_rows: R, rows of the pool (L·n² for UltraMemV2).
        value_dim: V.
        pre_value_dim: U; 0 for a pool without pre-values.
        std: standard deviation of the drawn rows; None leaves them undrawn, for an owner that draws them itself.
        table_gradients: ``dense`` leaves gradients in ``.grad``; ``rows`` collects them as (rows, row gradients) in
            ``value_gradients`` and ``pre_value_gradients`` (see `ultramem.ops.RowGradients`).
    """

    parameter_roles: ClassVar[dict[str, str]] = {"values": "table", "pre_values": "table"}
    pre_values: nn.Parameter | None

    def __init__(
        self,
        num_rows: int,
        value_dim: int,
        pre_value_dim: int = 0,
        std: float | None = 0.02,
        table_gradients: TableGradients = "dense",
    ) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.empty(num_rows, value_dim))
        self.register_parameter(
            "pre_values", nn.Parameter(torch.empty(num_rows, pre_value_dim)) if pre_value_dim else None
        )
        if std is not None:
            self.reset_parameters(std)
        self.set_table_gradients(table_gradients)

    @property
    def num_rows(self) -> int:
        """R, rows of the pool."""
        return self.values.shape[0]

    def set_table_gradients(self, mode: TableGradients) -> None:
        """Choose how table gradients are kept from now on. Raises ConfigError on an unknown mode."""
        if mode not in get_args(TableGradients):
            raise ConfigError(f"table_gradients must be one of {', '.join(get_args(TableGradients))}; got {mode!r}.")
        self.table_gradients = mode
        rows = mode == "rows"
        self.value_gradients = RowGradients(*self.values.shape) if rows else None
        self.pre_value_gradients = (
            RowGradients(*self.pre_values.shape) if rows and self.pre_values is not None else None
        )

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Draw values and pre-values from N(0, std²)."""
        init.normal_(self.values, std=std)
        if self.pre_values is not None:
            init.normal_(self.pre_values, std=std)

    def read(
        self,
        rows_NK: Tensor,
        scores: Tensor,
        x_NU: Tensor | None = None,
        activation: Activation | None = None,
        block_NK: Tensor | None = None,
        num_blocks: int = 1,
    ) -> Tensor:
        """Pool the values of the selected rows, weighed by scores and, where there are pre-values, by these.

        Args:
            rows_NK: selected rows per token.
            scores: [N, K] or, for C cores, [N, K, C].
            x_NU: what the pre-values are multiplied with; None for a pool without.
            activation: of the pre-value products; None for none.
            block_NK: the virtual block of each slot; None for one block.
            num_blocks: E.

        Returns:
            [N, E·V] in the values' dtype (see `ultramem.ops.pooled_read`).
        """
        assert (x_NU is None) == (self.pre_values is None), "either the pool or the layer has pre-values, the other not"
        if x_NU is None or self.pre_values is None:
            return bag(
                rows_NK,
                scores,
                self.values,
                block_NK=block_NK,
                num_blocks=num_blocks,
                row_gradients=self.value_gradients,
            )
        return pooled_read(
            rows_NK,
            scores,
            self.values,
            x_NU.to(self.values.dtype),
            self.pre_values,
            activation=activation,
            block_NK=block_NK,
            num_blocks=num_blocks,
            value_gradients=self.value_gradients,
            pre_value_gradients=self.pre_value_gradients,
        )
