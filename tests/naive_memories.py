"""The memory layers written out from their definitions (docs/layers), in loops."""

import math

import torch

from naive_operators import naive_additive_topk, naive_product_topk


def naive_norm(vector, gain):
    return vector / torch.sqrt((vector**2).mean() + 1e-5) * gain


def naive_linear(linear, x):
    return linear.weight @ x + (0 if linear.bias is None else linear.bias)


def naive_window(config, num_memories, index):
    """(size, offset, number of rows of the pool) of the window of memory ``index``."""
    share = config.num_keys**2
    if config.tables == "shared":
        return share, 0, share
    if config.tables == "private":
        return share, index * share, num_memories * share
    side = math.floor(math.sqrt(config.share_ratio * num_memories * share))
    return side**2, index * share, num_memories * share


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


def naive_tucker_slots(layer, x_ND, per_rank=False):
    """Per token, the selected (slot of the grid, scores per core) of all heads."""
    config, retrieval = layer.config, layer.retrieval
    rows, cols = naive_fine_scores(retrieval, x_ND, config.rank, per_rank)
    coarse_top_k = config.coarse_top_k or min(config.top_k, rows.shape[2])
    u, t = retrieval.row_direction.double(), retrieval.col_direction.double()
    found = naive_product_topk(rows, cols, retrieval.cores, u, t, config.top_k, coarse_top_k, config.search)
    heads = config.num_heads
    return [[pair for head in found[n * heads : (n + 1) * heads] for pair in head.items()] for n in range(len(x_ND))]


def naive_tucker_layer(layer, pool, x_ND, found, pre_value, project):
    """Pool the found slots through the permutation, each core its own slice, blocks apart."""
    config = layer.config
    window, offset, num_rows = naive_window(config, 3, layer.memory_index)
    part, blocks = config.value_dim // config.num_cores, config.key_expansion**2
    outputs, slots = [], []
    for x, selected in zip(x_ND, found, strict=True):
        pooled = torch.zeros(blocks, config.value_dim, dtype=x.dtype)
        slots.append([])
        for slot, scores in selected:
            virtual = int(layer.permutation[slot])
            row = (virtual % window + offset) % num_rows
            for c, score in enumerate(scores):
                cut = slice(c * part, (c + 1) * part)
                pooled[virtual // window, cut] += score * pre_value(x, row) * pool.values[row, cut]
            slots[-1].append(virtual)
        outputs.append(layer.out_proj.weight @ (pooled.flatten() if project else pooled.sum(0)))
    return torch.stack(outputs), slots


def naive_ultramem_v2(layer, pool, x_ND):
    config = layer.config

    def pre_value(x, row):
        if not config.pre_value_dim:
            return 1.0
        pre = float(layer.pre_proj.weight @ x @ pool.pre_values[row])
        gelu = config.pre_value_activation == "gelu"
        return naive_gelu(pre) if gelu else pre

    found = naive_tucker_slots(layer, x_ND, config.query_per_rank)
    return naive_tucker_layer(layer, pool, x_ND, found, pre_value, config.projection == "project")


def naive_ultramem(layer, pool, x_ND):
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


def naive_gelu(number):
    return number * 0.5 * (1 + math.erf(number / math.sqrt(2)))


def naive_queries(retrieval, x_ND, training):
    """Queries [N, H, 2, kd] after the norm that is switched on."""
    num_heads, _, _, key_dim = retrieval.keys.shape
    queries = torch.stack([naive_linear(retrieval.query_proj, x) for x in x_ND])
    if retrieval.query_mean is not None:
        for feature in range(queries.shape[1]):
            column = queries[:, feature].clone()
            mean, variance = (float(buffer[feature]) for buffer in (retrieval.query_mean, retrieval.query_variance))
            if training:
                mean = column.mean()
                variance = ((column - mean) ** 2).mean()
            normed = (column - mean) / math.sqrt(variance + 1e-5)
            queries[:, feature] = normed * retrieval.query_norm[feature] + retrieval.query_shift[feature]
    queries = queries.view(len(x_ND), num_heads, 2, key_dim)
    if retrieval.query_norm is not None and retrieval.query_mean is None:
        for half in queries.view(-1, key_dim):
            half.copy_(naive_norm(half.clone(), retrieval.query_norm))
    return queries


def naive_product_key_slots(layer, x_ND):
    """Per token and head, {slot: score} of the best of the whole grid."""
    retrieval, config = layer.retrieval, layer.config
    num_heads, _, side, _ = retrieval.keys.shape
    found = []
    for query in naive_queries(retrieval, x_ND, layer.training):
        found.append([])
        for h in range(num_heads):
            sides = torch.zeros(2, side, dtype=query.dtype)
            for s in (0, 1):
                for i in range(side):
                    key = retrieval.keys[h, s, i]
                    key = key if retrieval.key_norm is None else naive_norm(key, retrieval.key_norm)
                    sides[s, i] = key @ query[h, s]
            found[-1].append(naive_additive_topk(*sides, config.top_k))
    return found


def naive_product_key_layer(layer, pool, x_ND, expert=lambda x, row: 1.0, softmax=True):
    """Σ over heads and slots of weight · expert · value."""
    config = layer.config
    window, offset, num_rows = naive_window(config, 3, layer.memory_index)
    pooled, slots = [], []
    for x, heads in zip(x_ND, naive_product_key_slots(layer, x_ND), strict=True):
        total = torch.zeros(pool.values.shape[1], dtype=x.dtype)
        slots.append([])
        for scores in heads:
            normalizer = sum(math.exp(score) for score in scores.values())
            for slot, score in scores.items():
                row = (slot % window + offset) % num_rows
                weight = math.exp(score) / normalizer if softmax else score
                total += weight * expert(x, row) * pool.values[row]
                slots[-1].append(slot)
        pooled.append(total)
    return pooled, slots


def naive_pkm(layer, pool, x_ND):
    pooled, slots = naive_product_key_layer(layer, pool, x_ND)
    project = layer.config.output_proj or layer.config.value_dim not in (None, len(x_ND[0]))
    return torch.stack([naive_linear(layer.out_proj, total) for total in pooled] if project else pooled), slots


def naive_memory_plus(layer, pool, x_ND):
    pooled, slots = naive_product_key_layer(layer, pool, x_ND)
    outputs = []
    for x, total in zip(x_ND, pooled, strict=True):
        gate = naive_linear(layer.gate_proj, x)
        outputs.append(naive_linear(layer.out_proj, total * gate / (1 + torch.exp(-gate))))
    return torch.stack(outputs), slots


def naive_peer(layer, pool, x_ND):
    def expert(x, row):
        inner = float(pool.pre_values[row] @ x)
        return naive_gelu(inner) if layer.config.activation == "gelu" else max(inner, 0.0)

    softmax = layer.config.score_activation == "softmax"
    pooled, slots = naive_product_key_layer(layer, pool, x_ND, expert, softmax)
    return torch.stack(pooled), slots


_NAIVE = {
    "ultramem_v2": naive_ultramem_v2,
    "ultramem": naive_ultramem,
    "pkm": naive_pkm,
    "memory_plus": naive_memory_plus,
    "peer": naive_peer,
}


@torch.no_grad()
def naive_layer(layer, pool, x_ND):
    """(output [N, D], virtual slots per token) of one sequence of tokens; for one of three memories."""
    return _NAIVE[layer.config.type](layer, pool, x_ND)
