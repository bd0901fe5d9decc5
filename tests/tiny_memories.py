"""Tiny memory layers and decoders with memories, and the variants of their settings that the tests run over."""

import torch

from ultramem import UltraMemConfig, UltraMemForCausalLM, UltraMemV2Config
from ultramem.layers import MEMORY_TYPES

HIDDEN_SIZE, NUM_MEMORIES, MEMORY_INDEX = 14, 3, 1

SMALL = {"num_keys": 6, "key_dim": 8, "value_dim": 12, "pre_value_dim": 10, "top_k": 4}

# What `decoder` multiplies output projections by.
OUTPUT_SCALE = 20

# What each variant changes about `SMALL`.
VARIANTS = {
    "default": {},
    "one_core_one_rank": {"num_cores": 1, "rank": 1},
    "more_cores_and_ranks": {"num_cores": 3, "rank": 3},
    "heads": {"num_heads": 3},
    "query_per_rank": {"query_per_rank": True, "num_heads": 2, "rank": 3},
    "shared_window": {"tables": "ring", "share_ratio": 0.7},
    "expansion_summed": {"key_expansion": 2},
    "expansion_projected": {"key_expansion": 2, "projection": "project", "num_heads": 2, "tables": "ring", "share_ratio": 0.5},
    "no_pre_values": {"pre_value_dim": 0},
    "gelu": {"pre_value_activation": "gelu"},
    "wide_top_k": {"top_k": 9, "coarse_top_k": 3},
    "narrow_top_k": {"top_k": 2, "coarse_top_k": 5},
    "signed": {"search": "signed", "coarse_top_k": 5},
    "exact": {"search": "exact"},
    "losses": {"key_balance_weight": 0.1, "tucker_penalty_weight": 0.2, "tucker_penalty_margin": 0.0},
    "released": {"init": "released"},
}


def memory_config(**changes):
    return UltraMemV2Config(**{**SMALL, **changes})


def memory_layer(config=None, dtype=torch.float64, std=0.5, seed=0, memory_index=MEMORY_INDEX, **changes):
    """A layer in the middle of three and its pool, with rows and gains large enough to see; in training mode."""
    config = config or memory_config(**changes)
    torch.manual_seed(seed)
    kind = MEMORY_TYPES[config.type].layer
    layer = kind(HIDDEN_SIZE, config, NUM_MEMORIES, memory_index)
    pool = kind.make_pool(HIDDEN_SIZE, config, NUM_MEMORIES, draw=False)
    pool.reset_parameters(std)
    with torch.no_grad():
        # Gains that differ along kd: a gain applied along another axis shows.
        for gain in (layer.retrieval.query_norm, layer.retrieval.key_norm):
            gain.copy_(torch.linspace(0.5, 1.5, len(gain)))
    return layer.to(dtype), pool.to(dtype)


def tokens(*shape, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, HIDDEN_SIZE, generator=generator, dtype=torch.float64).to(dtype)


def decoder_config(**settings):
    """A decoder of three blocks; ``memory`` changes single settings of its memories, None leaves them out."""
    memory = settings.pop("memory", {})
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return UltraMemConfig(**{**sizes, **settings}, memory=None if memory is None else {**SMALL, **memory})


def decoder(dtype=torch.float64, seed=0, **settings):
    """A decoder in evaluation mode whose blocks outweigh its embedding: what it says depends on the whole context."""
    torch.manual_seed(seed)
    model = UltraMemForCausalLM(decoder_config(**settings)).eval()
    with torch.no_grad():
        for block in model.model.layers:
            for linear in (
                block.self_attn.o_proj,
                block.mlp.down_proj,
                *(memory.out_proj for memory in block.memories),
            ):
                linear.weight.mul_(OUTPUT_SCALE)
    return model.to(dtype)


def token_ids(*shape, seed=1):
    """Ids without those of end and padding."""
    return torch.randint(2, 61, shape, generator=torch.Generator().manual_seed(seed))


# Decoders that differ in where memories stand and what they return.
DECODERS = {
    "every": {},
    "dense": {"memory": None},
    "blocks": {"memory": {"placement": [0, 2], "num_heads": 2}},
    "spans": {"memory": {"placement": "0:2/0:1/1:2/2:2"}},
    "losses": {"memory": {"key_balance_weight": 0.1, "tucker_penalty_weight": 0.2, "tucker_penalty_margin": 0.0}},
    "untied": {"tie_word_embeddings": False, "memory": {"tables": "ring", "share_ratio": 0.7, "key_expansion": 2}},
}
