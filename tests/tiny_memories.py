"""Tiny memory layers and decoders with memories, and the variants of their settings that the tests run over."""

import torch

from ultramem import UltraMemConfig, UltraMemForCausalLM
from ultramem.layers import MEMORY_TYPES

HIDDEN_SIZE, NUM_MEMORIES, MEMORY_INDEX = 14, 3, 1

SMALL = {"num_keys": 6, "key_dim": 8, "value_dim": 12, "pre_value_dim": 10, "top_k": 4}
_SMALL_KEYS = {"num_keys": 6, "key_dim": 8, "top_k": 4, "num_heads": 2}

# The smallest settings of each type.
SIZES = {
    "ultramem_v2": SMALL,
    "ultramem": {"num_keys": 6, "key_dim": 8, "value_dim": 12, "top_k": 4},
    "memory_plus": _SMALL_KEYS,
    "pkm": _SMALL_KEYS,
    "peer": _SMALL_KEYS,
}

# What `decoder` multiplies output projections by.
OUTPUT_SCALE = 20

_RING = {"tables": "ring", "share_ratio": 0.7}
_LOSSES = {"key_balance_weight": 0.1, "tucker_penalty_weight": 0.2, "tucker_penalty_margin": 0.0}
_NORMS = {"query_norm": "rms", "key_norm": True}

# What each variant changes about `SIZES` of its type.
_VARIANTS = {
    "ultramem_v2": {
        "default": {},
        "one_core_one_rank": {"num_cores": 1, "rank": 1},
        "more_cores_and_ranks": {"num_cores": 3, "rank": 3},
        "heads": {"num_heads": 3},
        "query_per_rank": {"query_per_rank": True, "num_heads": 2, "rank": 3},
        "ring": _RING,
        "shared": {"tables": "shared"},
        "expansion_summed": {"key_expansion": 2},
        "expansion_projected": {"key_expansion": 2, "projection": "project", "num_heads": 2, **_RING},
        "no_pre_values": {"pre_value_dim": 0},
        "gelu": {"pre_value_activation": "gelu"},
        "wide_top_k": {"top_k": 9, "coarse_top_k": 3},
        "narrow_top_k": {"top_k": 2, "coarse_top_k": 5},
        "signed": {"search": "signed", "coarse_top_k": 5},
        "exact": {"search": "exact"},
        "losses": _LOSSES,
        "released": {"init": "released"},
    },
    "ultramem": {
        "default": {},
        "no_expansion": {"key_expansion": 1},
        "expansion": {"key_expansion": 3, "num_heads": 2, "tables": "shared"},
        "heads": {"num_heads": 3, "num_cores": 3, "rank": 3},
        "one_core_one_rank": {"num_cores": 1, "rank": 1, "tucker_penalty_weight": 0.0},
        "query_conv": {"query_conv": 3},
        "one_tap": {"query_conv": 1, **_RING},
        "exact": {"search": "exact", "query_conv": 2},
        "losses": {**_LOSSES, "search": "signed", "coarse_top_k": 5},
        "released": {"init": "released"},
    },
    "memory_plus": {
        "default": {},
        "private": {"tables": "private", "num_heads": 1, "query_bias": False},
        "value_dim": {"value_dim": 9, "query_norm": "rms", **_RING},
        "norms": {**_NORMS, "init": "paper"},
        "batch": {"query_norm": "batch", "num_heads": 3},
    },
    "pkm": {
        "default": {},
        "no_bias": {"query_bias": False, "num_heads": 1},
        "value_dim": {"value_dim": 9, "tables": "shared"},
        "output_proj": {"output_proj": True, "num_heads": 3},
        "query_rms": {"query_norm": "rms"},
        "query_batch": {"query_norm": "batch", **_RING},
        "key_norm": {"key_norm": True, "query_bias": False},
        "norms": {"query_norm": "batch", "key_norm": True, "init": "paper"},
        # More slots than keys of a side.
        "wide_top_k": {"top_k": 9},
    },
    "peer": {
        "default": {},
        "relu": {"activation": "relu", "num_heads": 1, **_RING},
        "raw_scores": {"score_activation": None, "num_heads": 3},
        "norms": {**_NORMS, "init": "paper", "tables": "shared"},
        "batch": {"query_norm": "batch", "score_activation": None, "activation": "relu"},
    },
}

VARIANTS = {
    f"{kind}-{name}": {"type": kind, **changes}
    for kind, variants in _VARIANTS.items()
    for name, changes in variants.items()
}


def memory_config(type="ultramem_v2", **changes):
    return MEMORY_TYPES[type].config(**{**SIZES[type], **changes})


def drawn_layer(config, seed=0, memory_index=MEMORY_INDEX):
    """A layer in the middle of three and its pool, as they are drawn, in fp32."""
    torch.manual_seed(seed)
    kind = MEMORY_TYPES[config.type].layer
    return kind(HIDDEN_SIZE, config, NUM_MEMORIES, memory_index), kind.make_pool(HIDDEN_SIZE, config, NUM_MEMORIES)


def memory_layer(config=None, dtype=torch.float64, std=0.5, seed=0, memory_index=MEMORY_INDEX, **changes):
    """A layer in the middle of three and its pool, in training mode; what starts at zero, one or small is not there."""
    layer, pool = drawn_layer(config or memory_config(**changes), seed, memory_index)
    pool.reset_parameters(std)
    retrieval = layer.retrieval
    with torch.no_grad():
        # Gains that differ along kd: a gain applied along another axis shows.
        for gain in (retrieval.query_norm, retrieval.key_norm):
            if gain is not None:
                gain.copy_(torch.linspace(0.5, 1.5, len(gain)))
        for name, tensor in layer.named_parameters():
            if name.endswith(("bias", "query_shift")):
                tensor.normal_(std=0.3)
            elif name.startswith("query_conv"):
                tensor.normal_()
        for name, tensor in layer.named_buffers():
            if name.endswith("query_mean"):
                tensor.normal_(std=0.3)
            elif name.endswith("query_variance"):
                tensor.uniform_(0.5, 2)
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
    if memory is not None:
        memory = {**SIZES[memory.get("type", "ultramem_v2")], **memory}
    return UltraMemConfig(**{**sizes, **settings}, memory=memory)


def decoder(dtype=torch.float64, seed=0, **settings):
    """A decoder in evaluation mode whose blocks outweigh its embedding: what it says depends on the whole context."""
    torch.manual_seed(seed)
    model = UltraMemForCausalLM(decoder_config(**settings)).eval()
    with torch.no_grad():
        for block in model.model.layers:
            ffn = [] if block.mlp is None else [block.mlp.down_proj]
            outputs = [memory.out_proj for memory in block.memories if memory.out_proj is not None]
            for linear in (block.self_attn.o_proj, *ffn, *outputs):
                linear.weight.mul_(OUTPUT_SCALE)
        memories = model.model.memories
        if memories and memories[0].out_proj is None:
            model.model.memory_pool.values.mul_(OUTPUT_SCALE)
        for name, parameter in model.named_parameters():
            if "query_conv" in name:
                parameter.normal_()
    return model.to(dtype)


def token_ids(*shape, seed=1):
    """Ids without those of end and padding."""
    return torch.randint(2, 61, shape, generator=torch.Generator().manual_seed(seed))


# Decoders that differ in where memories stand, of which type they are and what they return.
DECODERS = {
    "every": {},
    "dense": {"memory": None},
    "blocks": {"memory": {"placement": [0, 2], "num_heads": 2}},
    "spans": {"memory": {"placement": "0:2/0:1/1:2/2:2"}},
    "losses": {"memory": _LOSSES},
    "untied": {"tie_word_embeddings": False, "memory": {**_RING, "key_expansion": 2}},
    "replace": {"memory": {"position": "replace", "placement": "0:1/0:0/2:2", "tables": "shared"}},
    "ultramem": {"memory": {"type": "ultramem", "placement": "0:2/1:1", "query_conv": 3}},
    "memory_plus": {"memory": {"type": "memory_plus", "placement": [0, 2], "position": "replace"}},
    "pkm": {"memory": {"type": "pkm", "query_norm": "batch", "value_dim": 9}},
    "peer": {"memory": {"type": "peer", **_RING}},
}
