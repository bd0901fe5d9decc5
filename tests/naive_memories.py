"""The UltraMemV2 layer written out from its definition (docs/ultramem_v2.md), in loops."""

import math

import torch

from naive_operators import naive_product_topk


def naive_norm(vector, gain):
    return vector / torch.sqrt((vector**2).mean() + 1e-5) * gain


def naive_fine_scores(retrieval, x_ND, rank, per_rank):
    """⟨K[i, :, ρ], q⟩ of both sides: two tensors [N, H, S, r], differentiable."""
    num_heads, _, side, key_dim, _ = retrieval.keys.shape
    sides = []
    for s in (0, 1):
        scores = []
        for x in x_ND:
            query = retrieval.query_proj.weight @ x
            of_side = query[s * len(query) // 2 : (s + 1) * len(query) // 2]
            for h in range(num_heads):
                for i in range(side):
                    for rho in range(rank):
                        part = of_side[rho * key_dim : (rho + 1) * key_dim] if per_rank else of_side
                        key = naive_norm(retrieval.keys[h, s, i, :, rho], retrieval.key_norm)
                        scores.append(naive_norm(part, retrieval.query_norm) @ key)
        sides.append(torch.stack(scores).view(len(x_ND), num_heads, side, rank))
    return sides


def naive_layer(layer, pool, x_ND):
    """(output [N, D], virtual slots per token) of an `UltraMemV2` in evaluation mode."""
    config, retrieval = layer.config, layer.retrieval
    rows, cols = naive_fine_scores(retrieval, x_ND, config.rank, config.query_per_rank)
    side = rows.shape[2]
    coarse_top_k = config.coarse_top_k or min(config.top_k, side)
    u, t = retrieval.row_direction.double(), retrieval.col_direction.double()
    found = naive_product_topk(rows, cols, retrieval.cores, u, t, config.top_k, coarse_top_k, config.search)
    window, num_blocks = layer.window.size, config.key_expansion**2
    part = config.value_dim // config.num_cores
    outputs, slots = [], []
    for n, x in enumerate(x_ND):
        pooled = torch.zeros(num_blocks, config.value_dim, dtype=x.dtype)
        slots.append([])
        for selected in found[n * config.num_heads : (n + 1) * config.num_heads]:
            for slot, scores in selected.items():
                virtual = int(layer.permutation[slot])
                physical = (virtual % window + layer.window.offset) % pool.num_rows
                pre = 1.0
                if config.pre_value_dim:
                    pre = float(layer.pre_proj.weight @ x @ pool.pre_values[physical])
                if config.pre_value_activation == "gelu":
                    pre = pre * 0.5 * (1 + math.erf(pre / math.sqrt(2)))
                for c, score in enumerate(scores):
                    cut = slice(c * part, (c + 1) * part)
                    pooled[virtual // window, cut] += score * pre * pool.values[physical, cut]
                slots[-1].append(virtual)
        if config.projection == "sum":
            outputs.append(layer.out_proj.weight @ pooled.sum(0))
        else:
            outputs.append(layer.out_proj.weight @ pooled.flatten())
    return torch.stack(outputs), slots
