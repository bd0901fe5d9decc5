"""Memory+: its settings in tests, and its definition in loops; what the names mean is said in the package."""

import torch
from hypothesis import strategies as st

from memory_families import NORMS, PRODUCT_KEY_CHANGES, PRODUCT_KEY_SIZES, RING
from naive_memories import naive_linear, naive_product_key_layer

SIZES = PRODUCT_KEY_SIZES

VARIANTS = {
    "default": {},
    "private": {"tables": "private", "num_heads": 1, "query_bias": False},
    "value_dim": {"value_dim": 9, "query_norm": "rms", **RING},
    "norms": {**NORMS, "init": "paper"},
    "batch": {"query_norm": "batch", "num_heads": 3},
}

COMPILED = {("norms", True)}

CHANGES = {**PRODUCT_KEY_CHANGES, "value_dim": ({}, {"value_dim": 9})}

STRATEGIES = {"value_dim": st.none() | st.integers(1, 6)}

DECODER = {"placement": [0, 2], "position": "replace"}


def naive(layer, pool, x_ND):
    pooled, slots = naive_product_key_layer(layer, pool, x_ND)
    outputs = []
    for x, total in zip(x_ND, pooled, strict=True):
        gate = naive_linear(layer.gate_proj, x)
        outputs.append(naive_linear(layer.out_proj, total * gate / (1 + torch.exp(-gate))))
    return torch.stack(outputs), slots
