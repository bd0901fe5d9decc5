"""Triton's two-stage product_topk against the reference: slots, scores, gradients, ties, what it leaves to others."""

import pytest
import torch

from tolerances import assert_close
from ultramem.ops import key_search, product_topk, use_backend
from ultramem.ops.product_topk import put_keys
from ultramem.ops.triton import search

# tokens, heads, side, rank, cores, top_k, coarse_top_k
SIZES = [
    (2, 2, 7, 2, 3, 4, 4),
    (2, 1, 19, 3, 1, 1, 1),
    (1, 2, 9, 2, 2, 11, 4),
    (1, 1, 5, 1, 1, 25, 5),
    (2, 1, 1, 2, 1, 1, 1),
    (0, 2, 7, 2, 3, 4, 4),
]


def make_scores(num_tokens, num_heads, side, rank, num_cores):
    rows, cols = torch.randn(2, num_tokens, num_heads, side, rank)
    cores = torch.rand(num_cores, num_heads, rank, rank)
    u, _, vh = torch.linalg.svd(cores.sum(0))
    return [rows, cols, cores, u[..., :, 0].contiguous(), vh[..., 0, :].contiguous()]


def run(operands, backend, differentiable, **kwargs):
    """Slots, scores and the gradients of the first operands."""
    operands = [operand.detach().requires_grad_(i < differentiable) for i, operand in enumerate(operands)]
    with use_backend(backend):
        scores, slots = product_topk(*operands, **kwargs)
        weight = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(scores, operands[:differentiable], weight)
    return slots, scores.detach(), *grads


def assert_equals_reference(operands, differentiable, **kwargs):
    ours, theirs = (run(operands, backend, differentiable, **kwargs) for backend in ("triton", "reference"))
    assert torch.equal(ours[0], theirs[0])
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine.dtype == other.dtype
        assert_close(mine, other)


@pytest.mark.parametrize("sizes", SIZES)
def test_tucker_scores_equal_the_reference(sizes, poisoned_memory):
    *shape, top_k, coarse_top_k = sizes
    assert_equals_reference(make_scores(*shape), 3, top_k=top_k, coarse_top_k=coarse_top_k)


@pytest.mark.parametrize("sizes", SIZES)
def test_additive_scores_equal_the_reference(sizes, poisoned_memory):
    num_tokens, num_heads, side, _, _, top_k, coarse_top_k = sizes
    operands = make_scores(num_tokens, num_heads, side, 1, 1)[:2]
    assert_equals_reference(operands, 2, top_k=top_k, coarse_top_k=coarse_top_k)


def test_ties_go_to_the_first_and_no_slot_comes_twice():
    ones = torch.ones(1, 1, 5, 1)
    scores, slots = product_topk(ones, ones, top_k=3, coarse_top_k=2, backend="triton")
    assert slots.flatten().tolist() == [0, 1, 5]
    assert scores.flatten().tolist() == [2, 2, 2]


def test_scores_of_both_signs_and_infinities_keep_their_order():
    line = torch.tensor([-0.5, float("inf"), 2.0, -0.0, -3.0]).view(1, 1, 5, 1)
    one = torch.zeros(1, 1, 5, 1)
    one[..., 1:, :] = -float("inf")
    _, slots = product_topk(line, one, top_k=5, coarse_top_k=5, backend="triton")
    assert (slots // 5).flatten().tolist()[1:] == [2, 3, 0, 4]


@pytest.mark.parametrize("name", ["signed", "exact"])
def test_other_searches_are_the_references(name):
    assert_equals_reference(make_scores(3, 2, 7, 2, 3), 3, top_k=4, coarse_top_k=4, search=name)


@pytest.mark.parametrize(
    ("side", "top_k", "coarse_top_k", "fits"),
    [(360, 768, 128, True), (360, 768, 129, False), (360, 2049, 128, False), (20000, 32, 32, False)],
)
def test_sizes_past_one_program_are_the_references(side, top_k, coarse_top_k, fits):
    scores = torch.empty(0, 1, side, 2)
    assert search.fits(scores, top_k, coarse_top_k, "two_stage") == fits
    assert not search.fits(scores, top_k, coarse_top_k, "signed")
    assert not search.fits(scores.bfloat16(), top_k, coarse_top_k, "two_stage")


@pytest.mark.parametrize("num_queries", [1, 2])
def test_searches_from_keys_equal_the_reference(num_queries):
    query, keys = torch.randn(2, 2, num_queries, 4), torch.randn(2, 2, 7, 2, 4)
    _, _, *cores_and_directions = make_scores(3, 2, 7, 2, 3)
    operands, results = [query, keys, *cores_and_directions], {}
    for backend in ("triton", "reference"):
        values = [operand.detach().requires_grad_(place < 3) for place, operand in enumerate(operands)]
        scores, slots = key_search(*values, top_k=4, coarse_top_k=3, backend=backend)
        results[backend] = [slots, scores.detach(), *torch.autograd.grad(scores.square().sum(), values[:3])]
    assert torch.equal(results["triton"][0], results["reference"][0])
    for ours, theirs in zip(results["triton"][1:], results["reference"][1:], strict=True):
        assert_close(ours, theirs)


def test_sums_over_keys_are_differentiable():
    gradient = torch.randn(2, 1, 5, 2, requires_grad=True)
    keys = torch.randint(3, (2, 1, 5))
    weight = torch.randn(2, 1, 3, 2)
    (ours,) = torch.autograd.grad(put_keys(gradient, keys, 3, "triton"), gradient, weight)
    (theirs,) = torch.autograd.grad(put_keys(gradient, keys, 3), gradient, weight)
    assert torch.equal(ours, theirs)
