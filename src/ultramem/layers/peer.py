"""PEER: a mixture of a million experts of one neuron each, found by product keys (arXiv 2407.04153)."""

from dataclasses import dataclass
from typing import Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor

from ultramem.layers.product_keys import ProductKeyConfig, ProductKeyMemory
from ultramem.ops import Activation


@strict
@dataclass
class PEERConfig(ProductKeyConfig):
    """Settings of the PEER layers of a model (arXiv 2407.04153; exact definitions in docs/layers/peer.md), beside those
    of `ProductKeyConfig` and `MemoryConfig`. Rows are as wide as the model: u and v of one expert.

    Attributes:
        activation: of an expert's neuron, ``gelu`` (exact) or ``relu``.
        score_activation: ``softmax`` over each head's experts, or null for raw scores.
    """

    type: Literal["peer"] = "peer"
    activation: Literal["gelu", "relu"] = "gelu"
    score_activation: Literal["softmax"] | None = "softmax"

    def row_widths(self, hidden_size: int) -> tuple[int, int]:
        """(D, D): v and u."""
        return hidden_size, hidden_size


class PEER(ProductKeyMemory):
    """One PEER layer; the rows belong to a `MemoryPool` that is passed to ``forward``: v its values, u its pre-values.

    y = Σ_h Σ_k softmax_k(s_row[i_k] + s_col[j_k]) · gelu(⟨u_k, x⟩) · v_k
    """

    config: PEERConfig

    def __init__(self, hidden_size: int, config: PEERConfig, num_memories: int = 1, memory_index: int = 0) -> None:
        super().__init__(hidden_size, config, num_memories, memory_index)
        self.reset_parameters()

    def slot_weights(self, scores_NHKC: Tensor) -> Tensor:
        """Softmax over the experts of each head, or the scores as they are."""
        return super().slot_weights(scores_NHKC) if self.config.score_activation == "softmax" else scores_NHKC

    @property
    def pre_activation(self) -> Activation:
        """The activation of each expert's neuron."""
        return self.config.activation
