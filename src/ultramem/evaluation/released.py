"""Fixtures of published implementations in our words: settings from their headers, our names of their tensors."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ultramem.layers import MEMORY_TYPES, MemoryLayer, MemoryPool
from ultramem.layers.tucker_memory import TuckerMemory

_TUCKER_TENSORS = {
    "keys": "retrieval.keys",
    "query_proj.weight": "retrieval.query_proj.weight",
    "query_norm.weight": "retrieval.query_norm",
    "keys_norm.weight": "retrieval.key_norm",
    "pre_values_proj.weight": "pre_proj.weight",
    "values_proj.weight": "out_proj.weight",
    "shuffle_index": "permutation",
    "tucker_core_u": "retrieval.row_direction",
    "tucker_core_v": "retrieval.col_direction",
    "values_for_look_up": "values",
    "pre_values_for_look_up": "pre_values",
}
# torch counts elements in 64 bits.
_MOST_ELEMENTS = 1 << 60

# A fixture whose norms have no gains holds none.
OPTIONAL_TENSORS = {"query_norm.weight", "keys_norm.weight"}
_PRODUCT_KEY_TENSORS = {
    "keys": "retrieval.keys",
    "query_proj.query_mlps.0.weight": "retrieval.query_proj.weight",
    "query_proj.query_mlps.0.bias": "retrieval.query_proj.bias",
}
_PKM_TENSORS = {
    **_PRODUCT_KEY_TENSORS,
    "value_proj.weight": "out_proj.weight",
    "value_proj.bias": "out_proj.bias",
    "values.weight": "values",
}
_MEMORY_PLUS_TENSORS = {
    **_PKM_TENSORS,
    "swilu_projection.weight": "gate_proj.weight",
    "swilu_projection.bias": "gate_proj.bias",
}
_PEER_TENSORS = {**_PRODUCT_KEY_TENSORS, "values_u.weight": "pre_values", "values_v.weight": "values"}


class ReleasedLayer(NamedTuple):
    """How a fixture's layer is built here.

    Attributes:
        memory_type: its type here.
        tensors: published name → name in our layer or its pool.
        settings: from the header to the fields of our config.
        hidden_size: the header's name of D.
        slots: the fixture's name of the selected slots of the grid.
        scores: the fixture's name of their scores.
    """

    memory_type: str
    tensors: dict[str, str]
    settings: Callable[[Mapping[str, str]], dict[str, Any]]
    hidden_size: str
    slots: str
    scores: str


def _tucker_settings(header: Mapping[str, str]) -> dict[str, Any]:
    return {
        "num_keys": int(header["knum"]),
        "key_dim": int(header["kdim"]),
        "value_dim": int(header["vdim"]),
        "top_k": int(header["knn"]),
        "num_heads": int(header["head"]),
        "num_cores": int(header["tucker_multihead"]),
        "rank": int(header["tucker_rank"]),
    }


def _ultramem_settings(header: Mapping[str, str]) -> dict[str, Any]:
    num_blocks = int(header["value_expand_time"])
    expansion = round(num_blocks**0.5)
    if expansion**2 != num_blocks:
        raise ValueError(f"value_expand_time {num_blocks} is no square, as an expansion must be.")
    return {**_tucker_settings(header), "key_expansion": expansion, "tucker_penalty_weight": 0.0}


def _ultramem_v2_settings(header: Mapping[str, str]) -> dict[str, Any]:
    return {
        **_tucker_settings(header),
        "pre_value_dim": int(header["pre_vdim"]),
        "key_expansion": int(header["mem_key_expand_time"]),
        "projection": "project" if int(header["value_expand_time"]) > 1 else "sum",
        "tables": "ring",
        "share_ratio": float(header["share_ratio"]),
        "query_per_rank": header["mem_q_for_each_tucker_rank"] == "True",
        "pre_value_activation": "gelu" if header["mem_use_glu_act"] == "True" else None,
        "key_balance_weight": float(header["mem_key_balance_reg_coef"]),
    }


def _product_key_settings(header: Mapping[str, str]) -> dict[str, Any]:
    doubled_key_dim = int(header["mem_k_dim"])
    if doubled_key_dim % 2:
        raise ValueError(f"mem_k_dim {doubled_key_dim} is no two halves of a query.")
    return {
        "num_keys": int(header["mem_n_keys"]),
        "key_dim": doubled_key_dim // 2,
        "top_k": int(header["mem_knn"]),
        "num_heads": int(header["mem_heads"]),
        "query_bias": header["mem_query_bias"] == "True",
    }


def _value_settings(header: Mapping[str, str]) -> dict[str, Any]:
    value_dim = int(header["mem_v_dim"])
    return {**_product_key_settings(header), "value_dim": None if value_dim == -1 else value_dim}


_TUCKER_OUTPUTS = ("hidden_size", "virtual_indices_before_shuffle", "scores")
_PRODUCT_KEY_OUTPUTS = ("dim", "indices", "raw_scores")

RELEASED_LAYERS: dict[str, ReleasedLayer] = {
    "ultramem_v2": ReleasedLayer("ultramem_v2", _TUCKER_TENSORS, _ultramem_v2_settings, *_TUCKER_OUTPUTS),
    "ultramem_v1": ReleasedLayer("ultramem", _TUCKER_TENSORS, _ultramem_settings, *_TUCKER_OUTPUTS),
    "memory_plus": ReleasedLayer("memory_plus", _MEMORY_PLUS_TENSORS, _value_settings, *_PRODUCT_KEY_OUTPUTS),
    "pkm": ReleasedLayer("pkm", _PKM_TENSORS, _value_settings, *_PRODUCT_KEY_OUTPUTS),
    "peer": ReleasedLayer("peer", _PEER_TENSORS, _product_key_settings, *_PRODUCT_KEY_OUTPUTS),
}


def build(released: ReleasedLayer, header: Mapping[str, str]) -> tuple[MemoryLayer, MemoryPool, list[str]]:
    """Our layer and pool for a fixture's header, in evaluation mode, and where the header describes others.

    Both are on the meta device: a header may ask for more than there is memory.

    Raises:
        KeyError: the header lacks a setting.
        ValueError: settings that describe no layer.
    """
    kind = MEMORY_TYPES[released.memory_type]
    config = kind.config(**released.settings(header))
    hidden_size, num_memories = int(header[released.hidden_size]), int(header.get("mem_layer_num", 1))
    index = int(header.get("layer_id", 0))
    if hidden_size < 1 or not 0 <= index < num_memories:
        raise ValueError(f"its header describes layer {index} of {num_memories} layers of width {hidden_size}.")
    num_elements = config.dense_parameters(hidden_size, num_memories) + config.table_parameters(
        hidden_size, num_memories
    )
    if num_elements > _MOST_ELEMENTS:
        raise ValueError(f"its header describes a layer of {num_elements} numbers, which no computer holds.")
    with torch.device("meta"):
        pool = kind.layer.make_pool(hidden_size, config, num_memories)
        layer = kind.layer(hidden_size, config, num_memories, index).eval()
    ours = {
        "rows_total": layer.window.num_rows,
        "rows_window": layer.window.size,
        "window_offset": layer.window.offset,
        "keys_per_axis": config.side(num_memories),
    }
    differences = [
        f"{name} is {value} here and {header[name]} in the fixture"
        for name, value in ours.items()
        if name in header and value != int(header[name])
    ]
    return layer, pool, differences


def places(released: ReleasedLayer, layer: MemoryLayer, pool: MemoryPool) -> dict[str, Tensor]:
    """Our parameters and buffers under their published names."""
    ours = {**dict(layer.named_parameters()), **dict(layer.named_buffers()), **dict(pool.named_parameters())}
    found = {published: ours[name] for published, name in released.tensors.items() if name in ours}
    if isinstance(layer, TuckerMemory):
        found |= {f"tucker_core.{index}": core for index, core in enumerate(layer.retrieval.cores.detach())}
    return found


def gradients(released: ReleasedLayer, layer: MemoryLayer, pool: MemoryPool) -> dict[str, Tensor | None]:
    """Gradients of our parameters under their published names."""
    found = {
        name: tensor.grad for name, tensor in places(released, layer, pool).items() if isinstance(tensor, nn.Parameter)
    }
    if isinstance(layer, TuckerMemory):
        cores = layer.retrieval.cores.grad
        assert cores is not None
        found |= {f"tucker_core.{index}": core for index, core in enumerate(cores)}
    return found
