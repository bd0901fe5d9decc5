"""UltraMemV2: a memory with pre-values in every block, reading rows that all layers share (arXiv 2508.18756)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from ultramem.errors import ConfigError
from ultramem.layers.plain import apply_linear
from ultramem.layers.tucker_memory import TuckerMemory, TuckerMemoryConfig
from ultramem.ops import Activation


@strict
@dataclass
class UltraMemV2Config(TuckerMemoryConfig):
    """Settings of the UltraMemV2 memories of a model (arXiv 2508.18756; exact definitions in
    docs/layers/ultramem_v2.md), beside those of `TuckerMemoryConfig` and `MemoryConfig`.

    Attributes:
        pre_value_dim: U; 0 switches pre-values off.
        projection: ``sum`` adds the virtual blocks before the output projection, ``project`` concatenates them.
        query_per_rank: a query of its own for every rank.
        pre_value_activation: null (linear) or ``gelu``.
        output_dropout: dropout rate of the layer's output.
    """

    type: Literal["ultramem_v2"] = "ultramem_v2"
    pre_value_dim: int = 64
    projection: Literal["sum", "project"] = "sum"
    query_per_rank: bool = False
    pre_value_activation: Literal["gelu"] | None = None
    output_dropout: float | int = 0.0

    _not_negative: ClassVar[tuple[str, ...]] = (*TuckerMemoryConfig._not_negative, "pre_value_dim")

    def __post_init__(self) -> None:
        """Check what does not depend on the number of layers. Raises ConfigError naming the field."""
        super().__post_init__()
        if not 0 <= self.output_dropout < 1:
            raise ConfigError(f"memory.output_dropout must lie in [0, 1); got {self.output_dropout}.")
        if self.pre_value_activation is not None and self.pre_value_dim == 0:
            raise ConfigError("memory.pre_value_activation needs pre-values; memory.pre_value_dim is 0.")

    @property
    def pooled_dim(self) -> int:
        """Inputs of the output projection: V, or E·V with ``projection: project``."""
        return self.value_dim * (self.num_blocks if self.projection == "project" else 1)

    @property
    def num_queries(self) -> int:
        """Queries per side: r with ``query_per_rank``, else one."""
        return self.rank if self.query_per_rank else 1

    def row_widths(self, hidden_size: int) -> tuple[int, int]:
        """(V, U)."""
        return self.value_dim, self.pre_value_dim

    def matmul_weights(self, hidden_size: int, num_memories: int) -> int:
        """Weights of the projections, and the keys."""
        return super().matmul_weights(hidden_size, num_memories) + hidden_size * self.pre_value_dim

    def table_std(
        self, hidden_size: int, num_blocks: int = 1, ffn_ratio: float = 1.0, score_variance: float = 0.0
    ) -> float:
        """Standard deviation of values and pre-values at initialisation (the paper's appendix).

        ``paper``: chosen so that the memory's output variance is 0.032·κ/L, the FFN's own at initialisation.
        """
        if self.init == "released":
            return 0.02
        selected = self.num_selected * (1 + score_variance)
        if self.pre_value_dim == 0:
            return math.sqrt(0.08 * ffn_ratio * hidden_size / (selected * self.value_dim * num_blocks))
        area = self.pre_value_dim * self.value_dim
        return float((0.2 * ffn_ratio * hidden_size / (selected * area * num_blocks)) ** 0.25)


class UltraMemV2(TuckerMemory):
    """One UltraMemV2 memory layer; the rows belong to a `MemoryPool` that is passed to ``forward``.

    y = W_out · pool_b( Σ_k g_c(k) · p_k · value[row_k] ),   p_k = ⟨W_pre x, pre_value[row_k]⟩
    """

    config: UltraMemV2Config

    def __init__(
        self, hidden_size: int, config: UltraMemV2Config, num_memories: int = 1, memory_index: int = 0
    ) -> None:
        super().__init__(hidden_size, config, num_memories, memory_index)
        self.pre_proj = nn.Linear(hidden_size, config.pre_value_dim, bias=False) if config.pre_value_dim else None
        self.output_dropout = nn.Dropout(config.output_dropout)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the layer's own tensors by the config's scheme; the pool's owner draws the rows."""
        if self.permutation.is_meta:
            return
        config = self.config
        gain: float | None
        if config.init == "paper":
            linear_std = math.sqrt(2 / (5 * self.hidden_size))
            query_std, out_std, pre_std, gain = linear_std, linear_std, linear_std, None
        else:
            query_std, out_std = config.key_dim**-0.5, config.pooled_dim**-0.5
            pre_std, gain = self.hidden_size**-0.5, config.key_dim**-0.4
        init.normal_(self.out_proj.weight, std=out_std)
        if self.pre_proj is not None:
            init.normal_(self.pre_proj.weight, std=pre_std)
        self.reset_retrieval(query_std, gain)

    def pre_input(self, x_ND: Tensor) -> Tensor:
        """W_pre x."""
        assert self.pre_proj is not None, "the pool has pre-values but the layer does not"
        return apply_linear(self.pre_proj, x_ND)

    @property
    def pre_activation(self) -> Activation | None:
        """The activation of the pre-value products."""
        return self.config.pre_value_activation

    def project(self, x_ND: Tensor, pooled: Tensor) -> Tensor:
        """W_out, then dropout."""
        y_ND: Tensor = self.output_dropout(super().project(x_ND, pooled))
        return y_ND
