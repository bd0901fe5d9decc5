"""UltraMemV2: its settings in tests, and its definition in loops; what the names mean is said in the package."""

from hypothesis import strategies as st

from memory_families import LOSSES, RING, TUCKER_CHANGES
from naive_memories import naive_gelu, naive_tucker_layer, naive_tucker_slots

SIZES = {"num_keys": 6, "key_dim": 8, "value_dim": 12, "pre_value_dim": 10, "top_k": 4}

VARIANTS = {
    "default": {},
    "one_core_one_rank": {"num_cores": 1, "rank": 1},
    "more_cores_and_ranks": {"num_cores": 3, "rank": 3},
    "heads": {"num_heads": 3},
    "query_per_rank": {"query_per_rank": True, "num_heads": 2, "rank": 3},
    "ring": RING,
    "shared": {"tables": "shared"},
    "expansion_summed": {"key_expansion": 2},
    "expansion_projected": {"key_expansion": 2, "projection": "project", "num_heads": 2, **RING},
    "no_pre_values": {"pre_value_dim": 0},
    "gelu": {"pre_value_activation": "gelu"},
    "wide_top_k": {"top_k": 9, "coarse_top_k": 3},
    "narrow_top_k": {"top_k": 2, "coarse_top_k": 5},
    "signed": {"search": "signed", "coarse_top_k": 5},
    "exact": {"search": "exact"},
    "losses": LOSSES,
    "released": {"init": "released"},
}

COMPILED = {("default", True), ("losses", True), ("expansion_projected", False), ("exact", False)}

CHANGES = {
    **TUCKER_CHANGES,
    "pre_value_dim": ({}, {"pre_value_dim": 9}),
    "projection": ({"key_expansion": 2}, {"projection": "project"}),
    "query_per_rank": ({}, {"query_per_rank": True}),
    "pre_value_activation": ({}, {"pre_value_activation": "gelu"}),
    "output_dropout": ({}, {"output_dropout": 0.5}),
}

STRATEGIES = {
    "pre_value_dim": st.integers(0, 4),
    "projection": st.sampled_from(["sum", "project"]),
    "query_per_rank": st.booleans(),
}

DECODER = {"placement": [0, 2], "num_heads": 2}


def naive(layer, pool, x_ND):
    config = layer.config

    def pre_value(x, row):
        if not config.pre_value_dim:
            return 1.0
        pre = float(layer.pre_proj.weight @ x @ pool.pre_values[row])
        gelu = config.pre_value_activation == "gelu"
        return naive_gelu(pre) if gelu else pre

    found = naive_tucker_slots(layer, x_ND, config.query_per_rank)
    return naive_tucker_layer(layer, pool, x_ND, found, pre_value, config.projection == "project")
