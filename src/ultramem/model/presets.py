"""Settings by name: the published sizes, and families of small models that cost and hold the same; see docs/presets.md.

Only what differs from the defaults of `UltraMemConfig` and of the memory's settings is given. Special tokens belong to
the tokenizer, so no preset names any.
"""

import difflib
from copy import deepcopy
from typing import Any

from ultramem.errors import ConfigError

Settings = dict[str, Any]

# The decoder and vocabulary (of allenai/gpt-neox-olmo-dolma-v1_5, padded) of the runs with 227M active parameters.
_227M: Settings = {
    "vocab_size": 50_304,
    "hidden_size": 768,
    "num_hidden_layers": 20,
    "num_attention_heads": 12,
    "max_position_embeddings": 4096,
}
_1B: Settings = {
    "vocab_size": 50_304,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_TINY: Settings = {
    "vocab_size": 4096,
    "hidden_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "max_position_embeddings": 1024,
}
_SMALL: Settings = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
_BASE: Settings = {
    "vocab_size": 16_384,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}

# UltraMem, arXiv 2411.12364; UltraMemV2, arXiv 2508.18756, whose comparison the others of each size are from.
_PUBLISHED: dict[str, Settings] = {
    "ultramem_v2-227m-1.2b": {
        **_227M,
        "intermediate_size": 2496,
        "memory": {
            "type": "ultramem_v2",
            "tables": "ring",
            "share_ratio": 0.5,
            "num_keys": 360,
            "key_dim": 192,
            "value_dim": 192,
            "pre_value_dim": 192,
            "top_k": 32,
        },
    },
    "ultramem-227m-1.2b": {
        **_227M,
        "intermediate_size": 2752,
        "memory": {
            "type": "ultramem",
            "placement": "2:5/6:9/10:13/14:17",
            "num_keys": 808,
            "key_dim": 192,
            "value_dim": 384,
            "top_k": 80,
            "num_heads": 2,
        },
    },
    "memory_plus-227m-1.2b": {
        **_227M,
        "intermediate_size": 3008,
        "memory": {
            "type": "memory_plus",
            "placement": [4, 8, 12, 16],
            "num_keys": 1138,
            "key_dim": 384,
            "top_k": 80,
            "num_heads": 2,
        },
    },
    "olmoe-227m-1.2b": {
        **_227M,
        "intermediate_size": 3072,
        "memory": None,
        "ffn": {"type": "moe", "num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 384},
    },
    # Not published: the FFN's width is the multiple of 64 with the FLOPs per token nearest to UltraMemV2's.
    "dense-227m": {**_227M, "intermediate_size": 3136, "memory": None},
    "ultramem_v2-1b-7b": {
        **_1B,
        "intermediate_size": 7296,
        "memory": {
            "type": "ultramem_v2",
            "tables": "ring",
            "share_ratio": 1 / 16,
            "num_keys": 528,
            "key_dim": 512,
            "value_dim": 768,
            "pre_value_dim": 384,
            "top_k": 128,
        },
    },
    "dense-1b": {**_1B, "intermediate_size": 8192, "memory": None},
    "olmoe-1b-7b": {
        **_1B,
        "intermediate_size": 8192,
        "memory": None,
        "ffn": {"type": "moe", "num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 1024},
    },
}


def _family(
    name: str, decoder: Settings, dense_size: int, expert_size: int, memories: dict[str, tuple[int, Settings]]
) -> dict[str, Settings]:
    """The members of a family: dense, mixture of experts, and one of every memory type given.

    Args:
        name: prefix of the members' names.
        decoder: what all share.
        dense_size: inner width of the dense member's FFN.
        expert_size: inner width of each of the 64 experts, of which a token visits 8.
        memories: by type, the inner width of the FFN and the memory's settings.
    """
    moe = {"type": "moe", "num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": expert_size}
    members: dict[str, Settings] = {
        "dense": {"intermediate_size": dense_size, "memory": None},
        "moe": {"intermediate_size": 8 * expert_size, "memory": None, "ffn": moe},
    }
    for kind, (ffn_size, memory) in memories.items():
        members[kind] = {"intermediate_size": ffn_size, "memory": {"type": kind, **memory}}
    return {f"{name}-{kind}": {**decoder, **settings} for kind, settings in members.items()}


# Widths of keys and rows relative to the model's are the published ones, and so are 64 experts of which a token visits
# 8. FFN widths and num_keys were searched so that FLOPs and total parameters meet the MoE's; heads and top_k are such
# that all memories read the same number of table elements per token. The tests hold all three.
_FAMILIES: dict[str, Settings] = {
    **_family(
        "tiny",
        _TINY,
        dense_size=664,
        expert_size=80,
        memories={
            "pkm": (544, {"placement": [1, 3, 5], "num_keys": 164, "key_dim": 40, "top_k": 8, "num_heads": 4}),
            "peer": (608, {"placement": [1, 3, 5], "num_keys": 116, "key_dim": 40, "top_k": 8, "num_heads": 2}),
            "memory_plus": (456, {"placement": [1, 3, 5], "num_keys": 284, "key_dim": 80, "top_k": 16, "num_heads": 2}),
            "ultramem": (
                472,
                {"placement": "1:2/3:4", "num_keys": 284, "key_dim": 40, "value_dim": 80, "top_k": 48, "num_heads": 2},
            ),
            "ultramem_v2": (
                504,
                {
                    "tables": "ring",
                    "share_ratio": 0.5,
                    "num_keys": 164,
                    "key_dim": 40,
                    "value_dim": 40,
                    "pre_value_dim": 40,
                    "top_k": 32,
                },
            ),
        },
    ),
    **_family(
        "small",
        _SMALL,
        dense_size=1040,
        expert_size=128,
        memories={
            "pkm": (944, {"placement": [3, 6, 9], "num_keys": 294, "key_dim": 64, "top_k": 16, "num_heads": 4}),
            "peer": (960, {"placement": [3, 6, 9], "num_keys": 208, "key_dim": 64, "top_k": 8, "num_heads": 4}),
            "memory_plus": (
                864,
                {"placement": [3, 6, 9], "num_keys": 508, "key_dim": 128, "top_k": 32, "num_heads": 2},
            ),
            "ultramem": (
                832,
                {
                    "placement": "2:4/5:7/8:10",
                    "num_keys": 416,
                    "key_dim": 64,
                    "value_dim": 128,
                    "top_k": 64,
                    "num_heads": 2,
                },
            ),
            "ultramem_v2": (
                784,
                {
                    "tables": "ring",
                    "share_ratio": 0.5,
                    "num_keys": 208,
                    "key_dim": 64,
                    "value_dim": 64,
                    "pre_value_dim": 64,
                    "top_k": 32,
                },
            ),
        },
    ),
    **_family(
        "base",
        _BASE,
        dense_size=2080,
        expert_size=256,
        memories={
            "pkm": (1920, {"placement": [3, 6, 9], "num_keys": 414, "key_dim": 128, "top_k": 16, "num_heads": 4}),
            "peer": (1920, {"placement": [3, 6, 9], "num_keys": 294, "key_dim": 128, "top_k": 8, "num_heads": 4}),
            "memory_plus": (
                1760,
                {"placement": [3, 6, 9], "num_keys": 720, "key_dim": 256, "top_k": 32, "num_heads": 2},
            ),
            "ultramem": (
                1760,
                {
                    "placement": "2:4/5:7/8:10",
                    "num_keys": 586,
                    "key_dim": 128,
                    "value_dim": 256,
                    "top_k": 64,
                    "num_heads": 2,
                },
            ),
            "ultramem_v2": (
                1664,
                {
                    "tables": "ring",
                    "share_ratio": 0.5,
                    "num_keys": 294,
                    "key_dim": 128,
                    "value_dim": 128,
                    "pre_value_dim": 128,
                    "top_k": 32,
                },
            ),
        },
    ),
}

PRESETS: dict[str, Settings] = {**_PUBLISHED, **_FAMILIES}
"""Arguments of `UltraMemConfig` by the preset's name."""


def describe_presets(name: str) -> str:
    """The presets nearest to a name that is none, and all of them, for messages."""
    nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}? The" if nearest else "the"
    return f"{hint} presets are {', '.join(PRESETS)}."


def preset_settings(name: str, **overrides: Any) -> Settings:
    """A preset's arguments of `UltraMemConfig`, with some replaced.

    Args:
        name: one of `PRESETS`.
        overrides: win over the preset's. A mapping for ``memory`` or ``ffn`` is merged over the preset's, unless it
            names another ``type``: settings of one kind mean nothing to another, so it then stands alone.

    Raises:
        ConfigError: no such preset; names the nearest and lists all.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; {describe_presets(name)}")
    preset = deepcopy(PRESETS[name])
    settings = {**preset, **overrides}
    for section in ("memory", "ffn"):
        old, new = preset.get(section), overrides.get(section)
        if isinstance(old, dict) and isinstance(new, dict) and new.get("type", old["type"]) == old["type"]:
            settings[section] = {**old, **new}
    return settings
