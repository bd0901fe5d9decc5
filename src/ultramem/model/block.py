"""One block of the decoder: OLMoE's attention and norms, an FFN, and memories beside it or in its place."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, OlmoeRMSNorm

from ultramem.layers import MEMORY_TYPES, MemoryOutput, MemoryPool, Statistics
from ultramem.model.configuration import UltraMemConfig
from ultramem.model.ffn import build_ffn


class BlockOutput(NamedTuple):
    """What a block returns.

    Attributes:
        hidden_states: [B, T, D].
        memories: results of the memories that start here.
        router_logits: of the experts' router; None without experts.
    """

    hidden_states: Tensor
    memories: tuple[MemoryOutput, ...]
    router_logits: Tensor | None


class UltraMemDecoderLayer(GradientCheckpointingLayer):
    """One block: x ← x + attention(norm(x)); h = norm(x); x ← x + ffn(h) + memories that end here.

    Where a memory replaces the FFN, the block has none.

    Args:
        config: the decoder's settings.
        layer_idx: the block's number.
    """

    def __init__(self, config: UltraMemConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = OlmoeAttention(config, layer_idx=layer_idx)  # type: ignore[arg-type]
        replaced = layer_idx in config.replaced_blocks
        self.mlp = None if replaced else build_ffn(config)
        self.input_layernorm = OlmoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = OlmoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        spans, memory_config = config.memory_spans, config.memory_config
        starting = [(index, span) for index, span in enumerate(spans) if span.start == layer_idx]
        self.memory_ends = [span.end for _, span in starting]
        self.memories = nn.ModuleList()
        self.num_past_tokens = 0
        if memory_config is not None and starting:
            layer = MEMORY_TYPES[memory_config.type].layer
            self.memories.extend(layer(config.hidden_size, memory_config, len(spans), index) for index, _ in starting)
            self.num_past_tokens = memory_config.num_past_tokens

    def forward(
        self,
        hidden_states: Tensor,
        arriving: tuple[Tensor, ...] = (),
        pool: MemoryPool | None = None,
        output_memory_statistics: Statistics = False,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BlockOutput:
        """Run the block.

        Args:
            hidden_states: [B, T, D].
            arriving: results [B, T, D] of memories that started in earlier blocks and end here.
            pool: the rows of the memories.
            output_memory_statistics: passed to the memories.
            padding_mask: [B, past and present tokens], zero at padding, for memories whose queries look back.
            **kwargs: passed to the attention (mask, cache, position embeddings, and what serving engines add).
        """
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        looked_up, past = normed, None
        if self.num_past_tokens:
            looked_up, past = self._with_past(normed, padding_mask, kwargs.get("past_key_values"))
        results = tuple(
            memory(looked_up, pool, past, return_statistics=output_memory_statistics) for memory in self.memories
        )
        router_logits = None
        if self.mlp is not None:
            transformed, router_logits = self.mlp(normed)
            hidden_states = hidden_states + transformed
        here = [result.output for result, end in zip(results, self.memory_ends, strict=True) if end == self.layer_idx]
        for output in (*here, *arriving):
            hidden_states = hidden_states + output
        return BlockOutput(hidden_states, results, router_logits)

    def _with_past(
        self, normed: Tensor, padding_mask: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """The memories' inputs, zero at padding, and the tokens right before them, which the cache keeps."""
        num_tokens = normed.shape[1]
        if padding_mask is not None:
            normed = normed * padding_mask[:, -num_tokens:, None].to(normed.dtype)
        if cache is None:
            return normed, None
        # The cache keeps [B, D, T].
        seen = cache.update_conv_state(
            normed.transpose(1, 2), self.layer_idx, conv_kernel_size=self.num_past_tokens
        ).transpose(1, 2)
        return normed, seen[:, :-num_tokens][:, -self.num_past_tokens :]
