"""The operators' definitions as loops over slots, in fp64: what every implementation must agree with."""

import torch


def naive_bag(idx, w, table, block=None, num_blocks=1):
    """out[n, e, c-th slice] = Σ_{k: block = e} w[n, k, c] · T[idx[n, k], c-th slice]."""
    w = w if w.ndim == 3 else w[..., None]
    (num_tokens, num_selected, num_cores), width = w.shape, table.shape[1]
    part = width // num_cores
    out = torch.zeros(num_tokens, num_blocks, width, dtype=torch.float64)
    for n in range(num_tokens):
        for k in range(num_selected):
            e = 0 if block is None else int(block[n, k])
            for c in range(num_cores):
                cut = slice(c * part, (c + 1) * part)
                out[n, e, cut] += w[n, k, c].double() * table[int(idx[n, k]), cut].double()
    return out.reshape(num_tokens, num_blocks * width)


def naive_gather_dot(idx, x, table, block=None, num_blocks=1, num_cores=1):
    """out[n, k, c] = ⟨x[n, block, c-th slice], U[idx[n, k], c-th slice]⟩."""
    (num_tokens, num_selected), width = idx.shape, table.shape[1]
    part = width // num_cores
    out = torch.zeros(num_tokens, num_selected, num_cores, dtype=torch.float64)
    for n in range(num_tokens):
        for k in range(num_selected):
            start = 0 if block is None else int(block[n, k]) * width
            for c in range(num_cores):
                row = table[int(idx[n, k]), c * part : (c + 1) * part]
                out[n, k, c] = x[n, start + c * part : start + (c + 1) * part].double() @ row.double()
    return out[..., 0] if num_cores == 1 else out


def naive_scatter(idx, w, x, num_rows, block=None, num_blocks=1):
    """out[idx[n, k], c-th slice] += w[n, k, c] · x[n, block, c-th slice]."""
    w = w if w.ndim == 3 else w[..., None]
    num_tokens, num_selected, num_cores = w.shape
    width = x.shape[1] // num_blocks
    part = width // num_cores
    out = torch.zeros(num_rows, width, dtype=torch.float64)
    for n in range(num_tokens):
        for k in range(num_selected):
            start = 0 if block is None else int(block[n, k]) * width
            for c in range(num_cores):
                x_slice = x[n, start + c * part : start + (c + 1) * part].double()
                out[int(idx[n, k]), c * part : (c + 1) * part] += w[n, k, c].double() * x_slice
    return out


def naive_product_topk(rows, cols, cores, u, t, top_k, coarse_top_k, search):
    """Scores {slot: [score per core]} of each token and head, by looping over the candidates of the search."""
    num_tokens, num_heads, side, _ = rows.shape
    results = []
    for n in range(num_tokens):
        for h in range(num_heads):
            coarse_row, coarse_col = rows[n, h] @ u[h], cols[n, h] @ t[h]

            def keep(coarse, count, largest):
                return sorted(range(side), key=lambda key: float(coarse[key]), reverse=largest)[:count]

            if search == "exact":
                quadrants = [(range(side), range(side))]
            elif search == "two_stage":
                quadrants = [(keep(coarse_row, coarse_top_k, True), keep(coarse_col, coarse_top_k, True))]
            else:
                halves = ((coarse_top_k - coarse_top_k // 2, True), (coarse_top_k // 2, False))
                quadrants = [(keep(coarse_row, *half), keep(coarse_col, *half)) for half in halves]
            scores = {
                i * side + j: [float(rows[n, h, i] @ core[h] @ cols[n, h, j]) for core in cores]
                for row_keys, col_keys in quadrants
                for i in row_keys
                for j in col_keys
            }
            best = sorted(scores, key=lambda slot: sum(scores[slot]), reverse=True)[:top_k]
            results.append({slot: scores[slot] for slot in best})
    return results


def naive_additive_topk(row, col, top_k):
    """{slot: score} of the best of the whole grid, for one token and head: row[i] + col[j]."""
    side = len(row)
    scores = {i * side + j: float(row[i] + col[j]) for i in range(side) for j in range(side)}
    return {slot: scores[slot] for slot in sorted(scores, key=lambda slot: scores[slot], reverse=True)[:top_k]}
