"""What a model costs, in plain Python from its config: parameters, FLOPs per token, bytes read per decode step."""

from dataclasses import dataclass

from ultramem.model.configuration import UltraMemConfig


@dataclass(frozen=True)
class CostCard:
    """Sizes and costs of one config; `cost_card` makes it.

    Attributes:
        dense_parameters: weights that every token reads: embedding, attention, FFN or router, norms, projections, keys.
        expert_parameters: weights of the experts; 0 without.
        table_parameters: elements of the memory's pool.
        active_parameters: dense parameters, the experts that a token visits, and k·H·(V+U) table elements per memory.
        num_ffns: blocks that have an FFN.
        num_memories: memory layers.
        embedding_parameters: the part of ``dense_parameters`` that only looks tokens up; 0 with tied embeddings.
        matmul_parameters: weights of matrix products on the path of a token.
        memory_flops_per_token: FLOPs of all memories, search and lookups included.
    """

    config: UltraMemConfig
    dense_parameters: int
    expert_parameters: int
    table_parameters: int
    active_parameters: int
    num_memories: int
    num_ffns: int
    embedding_parameters: int
    matmul_parameters: int
    memory_flops_per_token: int

    @property
    def total_parameters(self) -> int:
        """Dense, expert and table parameters."""
        return self.dense_parameters + self.expert_parameters + self.table_parameters

    def flops_per_token(self, context_length_tokens: int = 0) -> int:
        """FLOPs of one token's forward (a multiply-add counts as two), attending to so many tokens."""
        config = self.config
        attention = 4 * context_length_tokens * config.hidden_size * config.num_hidden_layers
        return 2 * self.matmul_parameters + self.memory_flops_per_token + attention

    def bytes_per_decode_step(self, batch_size: int, bytes_per_element: int = 2, context_length_tokens: int = 0) -> int:
        """Bytes read to decode one token for each of B sequences.

        Every dense weight is read once, the embedding only at B rows; of tables and experts the distinct ones expected
        under uniform access; of the KV cache all of it.
        """
        config, memory = self.config, self.config.memory_config
        elements: float = self.dense_parameters - self.embedding_parameters + batch_size * config.hidden_size
        sizes = (config.hidden_size, config.intermediate_size)
        ffn = config.ffn_config
        elements += self.num_ffns * (ffn.elements_per_step(batch_size, *sizes) - ffn.dense_parameters(*sizes))
        if memory is not None:
            elements += self.num_memories * memory.table_elements_per_step(
                batch_size, config.hidden_size, self.num_memories
            )
        assert config.num_key_value_heads is not None
        key_value_dim = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
        elements += batch_size * context_length_tokens * 2 * key_value_dim * config.num_hidden_layers
        return round(elements * bytes_per_element)


def cost_card(config: UltraMemConfig) -> CostCard:
    """Count what a config's model holds and costs, without building it."""
    assert config.num_key_value_heads is not None
    hidden, blocks = config.hidden_size, config.num_hidden_layers
    key_value_dim = hidden // config.num_attention_heads * config.num_key_value_heads
    attention_linear = 2 * hidden * hidden + 2 * hidden * key_value_dim
    attention_bias = 2 * hidden + 2 * key_value_dim if config.attention_bias else 0
    ffn, ffn_sizes = config.ffn_config, (hidden, config.intermediate_size)
    norms = 2 * hidden + hidden + key_value_dim
    vocabulary = config.vocab_size * hidden
    memory, num_memories = config.memory_config, len(config.memory_spans)
    memory_dense = memory_table = memory_active = memory_flops = 0
    if memory is not None:
        memory_dense = num_memories * memory.dense_parameters(hidden, num_memories)
        memory_table = memory.table_parameters(hidden, num_memories)
        memory_active = num_memories * memory.table_elements_per_token(hidden)
        memory_flops = num_memories * memory.flops_per_token(hidden, num_memories)
    num_ffns = blocks - len(config.replaced_blocks)
    ffn_dense, ffn_active = ffn.dense_parameters(*ffn_sizes), ffn.active_parameters(*ffn_sizes)
    always_read = blocks * attention_linear + num_ffns * ffn_dense + vocabulary
    embedding = 0 if config.tie_word_embeddings else vocabulary
    dense = always_read + embedding + blocks * (attention_bias + norms) + hidden + memory_dense
    return CostCard(
        config=config,
        dense_parameters=dense,
        expert_parameters=num_ffns * ffn.expert_parameters(*ffn_sizes),
        table_parameters=memory_table,
        active_parameters=dense + num_ffns * (ffn_active - ffn_dense) + memory_active,
        num_memories=num_memories,
        num_ffns=num_ffns,
        embedding_parameters=embedding,
        matmul_parameters=always_read + num_ffns * (ffn_active - ffn_dense),
        memory_flops_per_token=memory_flops,
    )
