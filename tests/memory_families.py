"""Settings that the tests of several memory types share; of one type alone: tests/memory_types."""

PRODUCT_KEY_SIZES = {"num_keys": 6, "key_dim": 8, "top_k": 4, "num_heads": 2}

RING = {"tables": "ring", "share_ratio": 0.7}
LOSSES = {"key_balance_weight": 0.1, "tucker_penalty_weight": 0.2, "tucker_penalty_margin": 0.0}
NORMS = {"query_norm": "rms", "key_norm": True}

# (settings before, what is changed) per setting, of every memory and of its family.
_COMMON_CHANGES = {
    "tables": ({"tables": "private"}, {"tables": "shared"}),
    "share_ratio": ({"tables": "ring", "share_ratio": 0.4}, {"share_ratio": 0.7}),
    "num_keys": ({}, {"num_keys": 7}),
    "key_dim": ({}, {"key_dim": 10}),
    "top_k": ({}, {"top_k": 5}),
    "num_heads": ({}, {"num_heads": 3}),
}
TUCKER_CHANGES = {
    **_COMMON_CHANGES,
    "value_dim": ({}, {"value_dim": 18}),
    "coarse_top_k": ({}, {"coarse_top_k": 3}),
    "num_cores": ({}, {"num_cores": 3}),
    "rank": ({}, {"rank": 3}),
    "key_expansion": ({}, {"key_expansion": 3}),
    "search": ({}, {"search": "exact"}),
    "key_balance_weight": ({}, {"key_balance_weight": 0.1}),
    "tucker_penalty_weight": ({"tucker_penalty_margin": 0.0}, {"tucker_penalty_weight": 0.1}),
    "tucker_penalty_margin": ({"tucker_penalty_weight": 0.1}, {"tucker_penalty_margin": 0.05}),
    "init": ({"init": "paper"}, {"init": "released"}),
    "shuffle_seed": ({}, {"shuffle_seed": 1}),
}
PRODUCT_KEY_CHANGES = {
    **_COMMON_CHANGES,
    "query_bias": ({}, {"query_bias": False}),
    "query_norm": ({"query_norm": "rms"}, {"query_norm": "batch"}),
    "key_norm": ({}, {"key_norm": True}),
    "init": ({"query_norm": "rms", "init": "released"}, {"init": "paper"}),
}
