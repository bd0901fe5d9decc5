"""The recall of the searches at random initialisation: the figures of docs/layers/ultramem_v2.md."""

import pytest
import torch

from ultramem.ops import product_topk, search_recall

NUM_KEYS, KEY_DIM, TOP_K, NUM_TOKENS, NUM_DRAWS = 512, 128, 32, 64, 3


def draw_scores(second_singular_value, seed):
    """Fine scores and the core of normal queries and keys, RMS-normalised with gain kd^−0.4."""
    generator = torch.Generator().manual_seed(seed)

    def normed(*shape, dim):
        x = torch.randn(*shape, generator=generator)
        return x * torch.rsqrt(x.square().mean(dim, keepdim=True) + 1e-5) * KEY_DIM**-0.4

    u, values, vh = torch.linalg.svd(torch.rand(2, 2, 2, generator=generator).sum(0))
    core = u @ torch.diag(torch.stack([values[0], torch.tensor(second_singular_value)])) @ vh
    query, keys = normed(NUM_TOKENS, 2, KEY_DIM, dim=-1), normed(2, NUM_KEYS, KEY_DIM, 2, dim=2)
    rows, cols = (torch.einsum("nd,sdr->nsr", query[:, side], keys[side])[:, None] for side in (0, 1))
    return rows, cols, core[None, None], u[None, :, 0], vh[None, 0]


def recall(operands, search, coarse_top_k):
    _, found = product_topk(*operands, top_k=TOP_K, coarse_top_k=coarse_top_k, search=search)
    return search_recall(*operands[:3], found).mean().item()


def test_recall_of_additive_scores_is_one():
    row, col = torch.randn(2, 4, 3, 9, 1, dtype=torch.float64)
    assert search_recall(row, col, None, product_topk(row, col, top_k=5)[1]).tolist() == [1.0] * 4


@pytest.mark.parametrize("second_singular_value", [0.0, 0.15, 0.5])
def test_recall_of_the_exact_slots(second_singular_value):
    published, signed, signed_wide = (
        sum(recall(draw_scores(second_singular_value, seed), search, m) for seed in range(NUM_DRAWS)) / NUM_DRAWS
        for search, m in (("two_stage", TOP_K), ("signed", TOP_K), ("signed", 2 * TOP_K))
    )
    assert 0.4 <= published <= 0.6
    assert signed >= 0.93
    assert signed_wide >= 0.98
    assert published < signed <= signed_wide
