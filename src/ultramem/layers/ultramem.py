"""UltraMem: large memories on spans of blocks, with implicit value expansion (arXiv 2411.12364)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from ultramem.layers.retrieval import is_loaded
from ultramem.layers.tucker_memory import TuckerMemory, TuckerMemoryConfig


@strict
@dataclass
class UltraMemLayerConfig(TuckerMemoryConfig):
    """Settings of the UltraMem memories of a model (arXiv 2411.12364; exact definitions in docs/layers/ultramem.md),
    beside those of `TuckerMemoryConfig` and `MemoryConfig`.

    Attributes:
        query_conv: taps of the causal depthwise convolution before the query projection; 0 for none.
    """

    type: Literal["ultramem"] = "ultramem"
    key_expansion: int = 2
    tucker_penalty_weight: float | int = 0.001
    query_conv: int = 0

    _not_negative: ClassVar[tuple[str, ...]] = (*TuckerMemoryConfig._not_negative, "query_conv")

    @property
    def num_past_tokens(self) -> int:
        """Tokens before the present one that the convolution reads."""
        return max(0, self.query_conv - 1)

    @property
    def pooled_dim(self) -> int:
        """Inputs of the output projection: E·V, one block beside the other."""
        return self.value_dim * self.num_blocks

    def matmul_weights(self, hidden_size: int, num_memories: int) -> int:
        """Weights of the projections, the keys, and the taps of the convolution."""
        return super().matmul_weights(hidden_size, num_memories) + hidden_size * self.query_conv

    def table_std(
        self, hidden_size: int, num_blocks: int = 1, ffn_ratio: float = 1.0, score_variance: float = 0.0
    ) -> float:
        """Standard deviation of the values at initialisation.

        ``paper``: √(E / (2·k·H·L)), with which the memory's output variance is 1/(2L) at a mean score of 1.
        """
        if self.init == "released":
            return 0.02
        return math.sqrt(self.num_blocks / (2 * self.num_selected * num_blocks))


class UltraMem(TuckerMemory):
    """One UltraMem memory layer; the rows belong to a `MemoryPool` that is passed to ``forward``.

    y = W_out · concat_b P_b,   P_b = Σ_{k in block b} g_c(k) · value[row_k]
    """

    config: UltraMemLayerConfig

    def __init__(
        self, hidden_size: int, config: UltraMemLayerConfig, num_memories: int = 1, memory_index: int = 0
    ) -> None:
        super().__init__(hidden_size, config, num_memories, memory_index)
        taps = config.query_conv
        self.query_conv = nn.Conv1d(hidden_size, hidden_size, taps, groups=hidden_size, bias=False) if taps else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the layer's own tensors by the config's scheme; the pool's owner draws the rows."""
        if self.permutation.is_meta:
            return
        config = self.config
        if self.query_conv is not None and not is_loaded(self.query_conv.weight):
            # The present token alone: at the start the convolution changes nothing.
            nn.init.zeros_(self.query_conv.weight)
            nn.init.ones_(self.query_conv.weight[:, :, -1])
        gain = None if config.init == "paper" else config.key_dim**-0.33
        init.normal_(self.out_proj.weight, std=config.pooled_dim**-0.5)
        self.reset_retrieval(config.key_dim**-0.5, gain)

    def query_input(self, x: Tensor, past: Tensor | None) -> Tensor:
        """The inputs, convolved along the tokens (the axis before the last) where the layer has a convolution."""
        if self.query_conv is None or x.numel() == 0:
            return x
        x_BTD = x.reshape(-1, x.shape[-2] if x.ndim > 1 else 1, self.hidden_size)
        seen_BTD = x_BTD
        if past is not None:
            seen_BTD = torch.cat([past.reshape(x_BTD.shape[0], -1, self.hidden_size).to(x_BTD.dtype), x_BTD], dim=1)
        # Zeros stand before the first token.
        missing = x_BTD.shape[1] + self.config.num_past_tokens - seen_BTD.shape[1]
        seen_BTD = nn.functional.pad(seen_BTD, (0, 0, missing, 0))
        convolved_BDT: Tensor = self.query_conv(seen_BTD.transpose(1, 2))
        return convolved_BDT.transpose(1, 2)
