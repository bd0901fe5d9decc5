"""PKM: product-key memory, the common ancestor (Lample et al. 2019, arXiv 1907.05242)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from ultramem.errors import ConfigError
from ultramem.layers.product_keys import ProductKeyConfig, ProductKeyMemory


@strict
@dataclass
class PKMConfig(ProductKeyConfig):
    """Settings of the product-key memories of a model (arXiv 1907.05242; exact definitions in docs/layers/pkm.md),
    beside those of `ProductKeyConfig` and `MemoryConfig`.

    Attributes:
        value_dim: V; null for the model's width.
        output_proj: a linear layer with bias after pooling; null for one only where V differs from the model's width.
    """

    type: Literal["pkm"] = "pkm"
    value_dim: int | None = None
    output_proj: bool | None = None

    _positive: ClassVar[tuple[str, ...]] = (*ProductKeyConfig._positive, "value_dim")

    def row_widths(self, hidden_size: int) -> tuple[int, int]:
        """(V, 0)."""
        return self.value_dim or hidden_size, 0

    def has_output_proj(self, hidden_size: int) -> bool:
        """Whether there is an output projection. Raises ConfigError where one is needed and refused."""
        differs = self.row_widths(hidden_size)[0] != hidden_size
        if differs and self.output_proj is False:
            raise ConfigError(
                f"memory.output_proj: false needs memory.value_dim to be the model's width {hidden_size}; got "
                f"{self.value_dim}."
            )
        return differs if self.output_proj is None else self.output_proj

    def matmul_weights(self, hidden_size: int, num_memories: int) -> int:
        """Weights of the projections, and the keys."""
        output = hidden_size * self.row_widths(hidden_size)[0] if self.has_output_proj(hidden_size) else 0
        return super().matmul_weights(hidden_size, num_memories) + output

    def other_weights(self, hidden_size: int) -> int:
        """Biases and the norms' parameters."""
        return super().other_weights(hidden_size) + (hidden_size if self.has_output_proj(hidden_size) else 0)


class PKM(ProductKeyMemory):
    """One product-key memory; the rows belong to a `MemoryPool` that is passed to ``forward``.

    y = W_out · Σ_h Σ_k softmax_k(s_row[i_k] + s_col[j_k]) · value[row_k]; W_out where the config asks for it.
    """

    config: PKMConfig

    def __init__(self, hidden_size: int, config: PKMConfig, num_memories: int = 1, memory_index: int = 0) -> None:
        super().__init__(hidden_size, config, num_memories, memory_index)
        if config.has_output_proj(hidden_size):
            self.out_proj = nn.Linear(config.row_widths(hidden_size)[0], hidden_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the layer's own tensors by the config's scheme; the pool's owner draws the rows."""
        super().reset_parameters()
        if self.out_proj is not None:
            init.normal_(self.out_proj.weight, std=self.hidden_size**-0.5)
            init.zeros_(self.out_proj.bias)
