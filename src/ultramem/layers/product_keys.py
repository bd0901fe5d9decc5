"""What PKM, Memory+ and PEER share: additive product keys and a softmax over the selected slots."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ultramem.layers.additive_retrieval import AdditiveRetrieval
from ultramem.layers.memory import MemoryConfig, MemoryLayer
from ultramem.ops import product_topk_flops


@strict
@dataclass
class ProductKeyConfig(MemoryConfig):
    """Settings of memories with additive product keys, beside those of `MemoryConfig`.

    Attributes:
        query_bias: a bias in the query projection.
        query_norm: null, ``rms`` (over each half of a query) or ``batch`` (batch norm of every query feature).
        key_norm: RMS norm of the keys.
        init: ``released`` (as in the published code) or ``paper``: the same with the norms' gains simulated so that the
            mean selected score is 1; without norms both are the same.
    """

    query_bias: bool = True
    query_norm: Literal["rms", "batch"] | None = None
    key_norm: bool = False
    init: Literal["paper", "released"] = "released"

    def matmul_weights(self, hidden_size: int, num_memories: int) -> int:
        """Weights of the query projection, and the keys."""
        return 2 * self.num_heads * self.key_dim * (hidden_size + self.side(num_memories))

    def other_weights(self, hidden_size: int) -> int:
        """The query's bias and the norms' parameters."""
        query_width = 2 * self.num_heads * self.key_dim
        norm = {None: 0, "rms": self.key_dim, "batch": 2 * query_width}[self.query_norm]
        return (query_width if self.query_bias else 0) + norm + (self.key_dim if self.key_norm else 0)

    def search_flops(self, num_memories: int) -> int:
        """FLOPs of one layer's search per token."""
        side = self.side(num_memories)
        coarse_top_k = min(self.top_k, side)
        return product_topk_flops(side, 1, self.num_heads, None, self.top_k, coarse_top_k, "two_stage")

    def table_std(
        self, hidden_size: int, num_blocks: int = 1, ffn_ratio: float = 1.0, score_variance: float = 0.0
    ) -> float:
        """Standard deviation of the rows at initialisation: 1/√V."""
        return float(self.row_widths(hidden_size)[0] ** -0.5)


class ProductKeyMemory(MemoryLayer):
    """A memory whose slots have additive scores; a softmax over each head's selected slots weighs the values."""

    parameter_roles: ClassVar[dict[str, str]] = {}
    config: ProductKeyConfig
    retrieval: AdditiveRetrieval

    def __init__(
        self, hidden_size: int, config: ProductKeyConfig, num_memories: int = 1, memory_index: int = 0
    ) -> None:
        super().__init__(hidden_size, config, num_memories, memory_index)
        self.retrieval = AdditiveRetrieval(
            hidden_size,
            num_keys=config.side(num_memories),
            key_dim=config.key_dim,
            num_heads=config.num_heads,
            top_k=config.top_k,
            query_bias=config.query_bias,
            query_norm=config.query_norm,
            key_norm=config.key_norm,
        )
        self.out_proj = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the layer's own tensors by the config's scheme; the pool's owner draws the rows."""
        if not self.retrieval.keys.is_meta:
            self.retrieval.reset_parameters(simulate_gains=self.config.init == "paper")

    def slot_weights(self, scores_NHKC: Tensor) -> Tensor:
        """Softmax over the slots of each head."""
        return scores_NHKC.softmax(2)
