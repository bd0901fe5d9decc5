"""Fixtures in the form of the published implementations, written from our layers in fp64 under the released names."""

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tiny_memories import memory_config
from ultramem.layers import MEMORY_TYPES

TUCKER_NAMES = {
    "keys": "retrieval.keys",
    "query_proj.weight": "retrieval.query_proj.weight",
    "query_norm.weight": "retrieval.query_norm",
    "keys_norm.weight": "retrieval.key_norm",
    "pre_values_proj.weight": "pre_proj.weight",
    "values_proj.weight": "out_proj.weight",
    "values_for_look_up": "values",
    "pre_values_for_look_up": "pre_values",
}
ADDITIVE_NAMES = {
    "keys": "retrieval.keys",
    "query_proj.query_mlps.0.weight": "retrieval.query_proj.weight",
    "query_proj.query_mlps.0.bias": "retrieval.query_proj.bias",
    "value_proj.weight": "out_proj.weight",
    "value_proj.bias": "out_proj.bias",
    "swilu_projection.weight": "gate_proj.weight",
    "swilu_projection.bias": "gate_proj.bias",
}
NAMES = {
    "ultramem_v2": TUCKER_NAMES,
    "ultramem": TUCKER_NAMES,
    "memory_plus": ADDITIVE_NAMES | {"values.weight": "values"},
    "pkm": ADDITIVE_NAMES | {"values.weight": "values"},
    "peer": ADDITIVE_NAMES | {"values_u.weight": "pre_values", "values_v.weight": "values"},
}


def read_fixture(path):
    """(header, tensors)."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_fixture(path, type="ultramem_v2", hidden_size=18, num_memories=1, layer_id=0, affine=True, **changes):
    """Run our layer in fp64 and write what the published code would have written about it."""
    torch.manual_seed(0)
    config, layer_class = memory_config(type, **changes), MEMORY_TYPES[type].layer
    layer = layer_class(hidden_size, config, num_memories, layer_id).double().eval()
    pool = layer_class.make_pool(hidden_size, config, num_memories, draw=False)
    pool.reset_parameters(0.2)
    pool = pool.double()
    tucker = type.startswith("ultramem")
    with torch.no_grad():
        if tucker:
            for gain in (layer.retrieval.query_norm, layer.retrieval.key_norm):
                gain.copy_(torch.linspace(0.5, 1.5, len(gain)) if affine else torch.ones(len(gain)))
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    x = torch.randn(2, 5, hidden_size).double().requires_grad_()
    grad_y = torch.randn(2, 5, hidden_size).double()
    result = layer(x, pool)
    ((result.output * grad_y).sum() + sum(result.losses.values())).backward()
    ours = dict(layer.named_parameters()) | dict(pool.named_parameters())
    tensors = {"in.x": x.detach(), "in.grad_y": grad_y, "grad.x": x.grad, "out.y": result.output}
    for published, name in NAMES[type].items():
        if name in ours and (affine or "norm" not in name):
            tensors |= {f"param.{published}": ours[name], f"grad.{published}": ours[name].grad}
    retrieved = layer.retrieval(x.detach().flatten(0, 1))
    # Slots in another order than ours within each head.
    scores, slots = retrieved.scores_NHKC.flip(2), retrieved.slots_NHK.flip(2).contiguous()
    if tucker:
        tensors |= _tucker_tensors(layer, retrieved) | {"out.scores": scores.flatten(1, 2)}
        whole = {
            "out.virtual_indices_before_shuffle": slots.flatten(1),
            "buffer.shuffle_index": layer.permutation.long(),
        }
    else:
        # Keys [heads·2·n, kd].
        tensors |= {name: tensors[name].flatten(0, 2) for name in ("param.keys", "grad.keys")}
        tensors["out.raw_scores"], whole = scores[..., 0], {"out.indices": slots}
    tensors = {name: tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()}
    header = _tucker_header(layer, num_memories, affine) if tucker else _additive_header(layer)
    save_file(tensors | whole, path, metadata={name: str(value) for name, value in header.items()})
    return path


def _tucker_tensors(layer, retrieved):
    retrieval, config = layer.retrieval, layer.config
    shape = (1, config.num_heads, 1, config.rank)
    tensors = {
        "buffer.tucker_core_u": retrieval.row_direction.view(shape),
        "buffer.tucker_core_v": retrieval.col_direction.view(shape),
        "out.tucker_aux_loss": retrieval.tucker_penalty(0.15).view(1),
    }
    for core in range(config.num_cores):
        tensors[f"param.tucker_core.{core}"] = retrieval.cores[core]
        tensors[f"grad.tucker_core.{core}"] = retrieval.cores.grad[core]
    if config.key_balance_weight:
        tensors["out.balance_loss"] = retrieval.key_balance(retrieved).view(1)
    return tensors


def _tucker_header(layer, num_memories, affine):
    config = layer.config
    header = {
        "layer": "ultramem_v2", "hidden_size": layer.hidden_size, "knum": config.num_keys, "kdim": config.key_dim,
        "vdim": config.value_dim, "knn": config.top_k, "head": config.num_heads, "tucker_rank": config.rank,
        "tucker_multihead": config.num_cores, "keys_per_axis": layer.retrieval.keys.shape[2], "seed": 0,
    }  # fmt: skip
    if config.type == "ultramem":
        return header | {"layer": "ultramem_v1", "value_expand_time": config.key_expansion**2}
    return header | {
        "pre_vdim": config.pre_value_dim, "mem_key_expand_time": config.key_expansion,
        "value_expand_time": config.key_expansion**2 if config.projection == "project" else 1,
        "share_ratio": config.share_ratio, "mem_layer_num": num_memories, "layer_id": layer.memory_index,
        "mem_use_glu_act": config.pre_value_activation == "gelu", "mem_q_for_each_tucker_rank": config.query_per_rank,
        "mem_key_balance_reg_coef": float(config.key_balance_weight), "attention_layer_norm_with_affine": affine,
        "rows_total": layer.window.num_rows, "rows_window": layer.window.size, "window_offset": layer.window.offset,
        "mem_output_dropout_rate": 0.0,
    }  # fmt: skip


def _additive_header(layer):
    config = layer.config
    return {
        "layer": config.type, "dim": layer.hidden_size, "mem_n_keys": config.num_keys, "mem_k_dim": 2 * config.key_dim,
        "mem_knn": config.top_k, "mem_heads": config.num_heads, "mem_query_bias": config.query_bias,
        "mem_v_dim": getattr(config, "value_dim", None) or -1, "swilu_projection": config.type == "memory_plus",
        "peer_variant": config.type == "peer", "seed": 0,
    }  # fmt: skip
