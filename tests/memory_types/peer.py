"""PEER: its settings in tests, and its definition in loops; what the names mean is said in the package."""

import torch
from hypothesis import strategies as st

from memory_families import NORMS, PRODUCT_KEY_CHANGES, PRODUCT_KEY_SIZES, RING
from naive_memories import naive_gelu, naive_product_key_layer

SIZES = PRODUCT_KEY_SIZES

VARIANTS = {
    "default": {},
    "relu": {"activation": "relu", "num_heads": 1, **RING},
    "raw_scores": {"score_activation": None, "num_heads": 3},
    "norms": {**NORMS, "init": "paper", "tables": "shared"},
    "batch": {"query_norm": "batch", "score_activation": None, "activation": "relu"},
}

COMPILED = {("default", True)}

CHANGES = {
    **PRODUCT_KEY_CHANGES,
    "activation": ({}, {"activation": "relu"}),
    "score_activation": ({}, {"score_activation": None}),
}

STRATEGIES = {
    "activation": st.sampled_from(["gelu", "relu"]),
    "score_activation": st.sampled_from(["softmax", None]),
}

DECODER = RING


def naive(layer, pool, x_ND):
    def expert(x, row):
        inner = float(pool.pre_values[row] @ x)
        return naive_gelu(inner) if layer.config.activation == "gelu" else max(inner, 0.0)

    softmax = layer.config.score_activation == "softmax"
    pooled, slots = naive_product_key_layer(layer, pool, x_ND, expert, softmax)
    return torch.stack(pooled), slots
