"""Tiny memory layers and decoders with memories, and the variants of their settings that the tests run over."""

import torch

from memory_families import LOSSES, RING
from memory_types import memory_type
from ultramem import UltraMemConfig, UltraMemForCausalLM
from ultramem.layers import MEMORY_TYPES
from ultramem.layers.product_keys import ProductKeyMemory

HIDDEN_SIZE, NUM_MEMORIES, MEMORY_INDEX = 14, 3, 1

# The smallest settings of each type.
SIZES = {kind: memory_type(kind).SIZES for kind in MEMORY_TYPES}

# What `decoder` multiplies output projections by.
OUTPUT_SCALE = 20

# What each variant changes about `SIZES` of its type.
VARIANTS = {
    f"{kind}-{name}": {"type": kind, **changes}
    for kind in MEMORY_TYPES
    for name, changes in memory_type(kind).VARIANTS.items()
}

# Types whose slots have additive scores: what their base class promises holds for each.
PRODUCT_KEY_TYPES = [name for name, kind in MEMORY_TYPES.items() if issubclass(kind.layer, ProductKeyMemory)]


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
            elif not name.startswith("retrieval.") and (tensor == tensor.flatten()[0]).all():
                # A parameter of the layer's own that starts as one number.
                tensor.add_(torch.randn_like(tensor), alpha=0.3)
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
    "spans": {"memory": {"placement": "0:2/0:1/1:2/2:2"}},
    "losses": {"memory": LOSSES},
    "untied": {"tie_word_embeddings": False, "memory": {**RING, "key_expansion": 2}},
    "replace": {"memory": {"position": "replace", "placement": "0:1/0:0/2:2", "tables": "shared"}},
    **{kind: {"memory": {"type": kind, **memory_type(kind).DECODER}} for kind in MEMORY_TYPES},
}
