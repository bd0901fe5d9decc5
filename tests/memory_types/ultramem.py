"""UltraMem: its settings in tests, and its definition in loops; what the names mean is said in the package."""

from hypothesis import strategies as st

from memory_families import LOSSES, RING, TUCKER_CHANGES
from naive_memories import naive_tucker_layer, naive_tucker_slots

SIZES = {"num_keys": 6, "key_dim": 8, "value_dim": 12, "top_k": 4}

VARIANTS = {
    "default": {},
    "no_expansion": {"key_expansion": 1},
    "expansion": {"key_expansion": 3, "num_heads": 2, "tables": "shared"},
    "heads": {"num_heads": 3, "num_cores": 3, "rank": 3},
    "one_core_one_rank": {"num_cores": 1, "rank": 1, "tucker_penalty_weight": 0.0},
    "query_conv": {"query_conv": 3},
    "one_tap": {"query_conv": 1, **RING},
    "exact": {"search": "exact", "query_conv": 2},
    "losses": {**LOSSES, "search": "signed", "coarse_top_k": 5},
    "released": {"init": "released"},
}

COMPILED = {("query_conv", True)}

CHANGES = {**TUCKER_CHANGES, "query_conv": ({}, {"query_conv": 2})}

STRATEGIES = {"query_conv": st.integers(0, 3)}

DECODER = {"placement": "0:2/1:1", "query_conv": 3}


def naive(layer, pool, x_ND):
    """The tokens are one sequence: the query convolution looks back along them."""
    taps = layer.config.query_conv
    queried = x_ND.clone()
    for n in range(len(x_ND) if taps else 0):
        queried[n] = sum(
            layer.query_conv.weight[:, 0, tap] * x_ND[n - taps + 1 + tap]
            for tap in range(taps)
            if n - taps + 1 + tap >= 0
        )
    found = naive_tucker_slots(layer, queried)
    return naive_tucker_layer(layer, pool, x_ND, found, lambda x, row: 1.0, project=True)
