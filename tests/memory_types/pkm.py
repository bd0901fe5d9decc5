"""PKM: its settings in tests, and its definition in loops; what the names mean is said in the package."""

import torch
from hypothesis import strategies as st

from memory_families import PRODUCT_KEY_CHANGES, PRODUCT_KEY_SIZES, RING
from naive_memories import naive_linear, naive_product_key_layer

SIZES = PRODUCT_KEY_SIZES

VARIANTS = {
    "default": {},
    "no_bias": {"query_bias": False, "num_heads": 1},
    "value_dim": {"value_dim": 9, "tables": "shared"},
    "output_proj": {"output_proj": True, "num_heads": 3},
    "query_rms": {"query_norm": "rms"},
    "query_batch": {"query_norm": "batch", **RING},
    "key_norm": {"key_norm": True, "query_bias": False},
    "norms": {"query_norm": "batch", "key_norm": True, "init": "paper"},
    # More slots than keys of a side.
    "wide_top_k": {"top_k": 9},
}

COMPILED = {("query_batch", True)}

CHANGES = {
    **PRODUCT_KEY_CHANGES,
    "value_dim": ({}, {"value_dim": 9}),
    "output_proj": ({}, {"output_proj": True}),
}

STRATEGIES = {"value_dim": st.none() | st.integers(1, 6)}

DECODER = {"query_norm": "batch", "value_dim": 9}


def naive(layer, pool, x_ND):
    pooled, slots = naive_product_key_layer(layer, pool, x_ND)
    project = layer.config.output_proj or layer.config.value_dim not in (None, len(x_ND[0]))
    return torch.stack([naive_linear(layer.out_proj, total) for total in pooled] if project else pooled), slots
