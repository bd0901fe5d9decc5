"""Memory+: product-key memories that share one table, with an input gate (arXiv 2412.09764)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from ultramem.layers.plain import apply_linear
from ultramem.layers.product_keys import ProductKeyConfig, ProductKeyMemory


@strict
@dataclass
class MemoryPlusConfig(ProductKeyConfig):
    """Settings of the Memory+ memories of a model (arXiv 2412.09764; exact definitions in docs/layers/memory_plus.md),
    beside those of `ProductKeyConfig` and `MemoryConfig`.

    Attributes:
        value_dim: V; null for the model's width, as published.
    """

    type: Literal["memory_plus"] = "memory_plus"
    tables: Literal["private", "shared", "ring"] = "shared"
    value_dim: int | None = None

    _positive: ClassVar[tuple[str, ...]] = (*ProductKeyConfig._positive, "value_dim")

    def row_widths(self, hidden_size: int) -> tuple[int, int]:
        """(V, 0)."""
        return self.value_dim or hidden_size, 0

    def matmul_weights(self, hidden_size: int, num_memories: int) -> int:
        """Weights of the projections and the gate, and the keys."""
        gate_and_output = 2 * hidden_size * self.row_widths(hidden_size)[0]
        return super().matmul_weights(hidden_size, num_memories) + gate_and_output

    def other_weights(self, hidden_size: int) -> int:
        """Biases and the norms' parameters."""
        return super().other_weights(hidden_size) + self.row_widths(hidden_size)[0] + hidden_size


class MemoryPlus(ProductKeyMemory):
    """One Memory+ layer; the rows belong to a `MemoryPool` that is passed to ``forward``.

    y = W_out ( Σ_h Σ_k softmax_k(s_row[i_k] + s_col[j_k]) · value[row_k] ⊙ silu(W_gate x) )
    """

    config: MemoryPlusConfig
    out_proj: nn.Linear

    def __init__(
        self, hidden_size: int, config: MemoryPlusConfig, num_memories: int = 1, memory_index: int = 0
    ) -> None:
        super().__init__(hidden_size, config, num_memories, memory_index)
        value_dim = config.row_widths(hidden_size)[0]
        self.gate_proj = nn.Linear(hidden_size, value_dim)
        self.out_proj = nn.Linear(value_dim, hidden_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the layer's own tensors by the config's scheme; the pool's owner draws the rows."""
        super().reset_parameters()
        for linear in (self.gate_proj, self.out_proj):
            init.normal_(linear.weight, std=self.hidden_size**-0.5)
            init.zeros_(linear.bias)

    def project(self, x_ND: Tensor, pooled: Tensor) -> Tensor:
        """The gate, then W_out."""
        return super().project(x_ND, pooled * nn.functional.silu(apply_linear(self.gate_proj, x_ND)))
