"""The three searches of product_topk against loops over the grid, their derivatives, and what they refuse."""

import importlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from naive_operators import naive_product_topk
from tolerances import assert_close
from ultramem.ops import check_search, product_topk, product_topk_flops, product_topk_reference
from ultramem.ops.product_topk import num_candidates


def make_scores(num_tokens=4, num_heads=2, side=7, rank=2, num_cores=3, seed=0, dtype=torch.float64):
    """Fine scores, cores and the leading singular pair of their sum."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = torch.randn(2, num_tokens, num_heads, side, rank, generator=generator, dtype=torch.float64)
    cores = torch.rand(num_cores, num_heads, rank, rank, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(cores.sum(0))
    return tuple(part.to(dtype).contiguous() for part in (rows, cols, cores, u[..., :, 0], vh[..., 0, :]))


def assert_equals_naive(operands, top_k, coarse_top_k, search):
    num_tokens, num_heads = operands[0].shape[:2]
    scores, slots = product_topk(*operands, top_k=top_k, coarse_top_k=coarse_top_k, search=search)
    num_cores = operands[2].shape[0]
    assert scores.shape == (num_tokens, num_heads, top_k, num_cores)
    assert (slots.shape, slots.dtype) == ((num_tokens, num_heads, top_k), torch.int64)
    expected = naive_product_topk(*operands, top_k, coarse_top_k, search)
    for found, score, best in zip(slots.flatten(0, 1).tolist(), scores.flatten(0, 1), expected, strict=True):
        assert found == list(best), "other slots, or not in descending order"
        assert_close(score, torch.tensor(list(best.values()), dtype=torch.float64))


@pytest.mark.parametrize(
    ("search", "top_k", "coarse_top_k"),
    [
        ("exact", 5, 3),
        ("exact", 49, 1),
        ("two_stage", 1, 1),
        ("two_stage", 4, 4),
        ("two_stage", 9, 3),
        ("two_stage", 7, 3),
        ("two_stage", 49, 7),
        ("signed", 4, 4),
        ("signed", 8, 4),
        ("signed", 5, 3),
        ("signed", 1, 1),
        ("signed", 25, 7),
    ],
)
def test_equals_a_loop_over_the_candidates(search, top_k, coarse_top_k):
    assert_equals_naive(make_scores(), top_k, coarse_top_k, search)


@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 6), *[st.integers(1, 3)] * 2),
    search=st.sampled_from(["exact", "two_stage", "signed"]),
    data=st.data(),
)
def test_equals_a_loop_for_any_shape(sizes, search, data):
    side = sizes[2]
    coarse_top_k = data.draw(st.integers(1, side))
    top_k = data.draw(st.integers(1, num_candidates(search, side, coarse_top_k)))
    assert_equals_naive(make_scores(*sizes, seed=data.draw(st.integers(0, 99))), top_k, coarse_top_k, search)


def test_exact_search_is_the_best_of_the_whole_grid_in_chunks_too(monkeypatch):
    rows, cols, cores, *pair = make_scores(num_tokens=9)
    grid = torch.einsum("nhir,chrq,nhjq->nhij", rows, cores, cols).flatten(2)
    expected = grid.topk(6).indices
    # The function of the same name hides the module from attribute access.
    module = importlib.import_module("ultramem.ops.product_topk")
    monkeypatch.setattr(module, "_EXACT_CHUNK_ELEMENTS", 2 * 2 * 49)
    _, slots = product_topk(rows, cols, cores, *pair, top_k=6, search="exact")
    assert torch.equal(slots, expected)


def test_searches_that_keep_every_key_are_exact():
    operands = make_scores()
    exact = product_topk(*operands, top_k=6, search="exact")[1]
    assert torch.equal(product_topk(*operands, top_k=6, coarse_top_k=7)[1], exact)


def test_two_stage_misses_products_of_negatives_and_signed_finds_them():
    """Row and column −10: the best slot by far, and no candidate of the published search."""
    line = torch.tensor([1.0, 0.5, 0.2, 0.1, -10.0]).view(1, 1, 5, 1)
    one = torch.ones(1, 1, 1, 1)
    operands = (line, line, one, one[0, 0], one[0, 0])
    for search, best in (("exact", 24), ("signed", 24), ("two_stage", 0)):
        assert product_topk(*operands, top_k=1, coarse_top_k=2, search=search)[1].item() == best


def test_the_default_coarse_top_k_is_top_k_or_every_key():
    operands = make_scores()
    for top_k, coarse_top_k in ((3, 3), (20, 7)):
        default, explicit = (product_topk(*operands, top_k=top_k, coarse_top_k=m) for m in (None, coarse_top_k))
        assert torch.equal(default[1], explicit[1])


@pytest.mark.parametrize("search", ["two_stage", "signed", "exact"])
def test_first_and_second_derivatives(search):
    *differentiable, u, t = make_scores(num_tokens=2, side=5, num_cores=2)
    inputs = [tensor.requires_grad_() for tensor in differentiable]

    def scores(*values):
        return product_topk(*values, u, t, top_k=4, coarse_top_k=4, search=search)[0]

    assert torch.autograd.gradcheck(scores, inputs)
    assert torch.autograd.gradgradcheck(scores, inputs)


def test_the_directions_carry_no_gradient():
    operands = [tensor.requires_grad_() for tensor in make_scores()]
    scores, slots = product_topk(*operands, top_k=4)
    assert not slots.requires_grad
    scores.sum().backward()
    assert [operand.grad is None for operand in operands] == [False, False, False, True, True]


@pytest.mark.parametrize("search", ["two_stage", "signed", "exact"])
def test_registration_is_sound(search):
    operands = [tensor.requires_grad_() for tensor in make_scores(dtype=torch.float32)]
    torch.library.opcheck(torch.ops.ultramem.product_topk.default, (*operands, 4, 4, search))


@pytest.mark.parametrize("search", ["two_stage", "signed", "exact"])
def test_autocast_does_not_round(search):
    operands = [tensor.requires_grad_() for tensor in make_scores(dtype=torch.float32)]
    expected = product_topk(*operands, top_k=5, coarse_top_k=5, search=search)
    expected_grads = torch.autograd.grad(expected[0].square().sum(), operands[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, slots = product_topk(*operands, top_k=5, coarse_top_k=5, search=search)
        grads = torch.autograd.grad(scores.square().sum(), operands[:3])
        reference = product_topk(*operands, top_k=5, coarse_top_k=5, search=search, backend="reference")
        assert torch.equal(product_topk_reference(*operands, 5, 5, search)[0], reference[0])
    assert torch.equal(slots, expected[1])
    for ours, theirs in zip((scores, *grads), (expected[0], *expected_grads), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("search", ["two_stage", "signed", "exact"])
def test_no_tokens(search):
    operands = [tensor.requires_grad_() for tensor in make_scores(num_tokens=0)]
    scores, slots = product_topk(*operands, top_k=4, coarse_top_k=4, search=search)
    assert (scores.shape, slots.shape, slots.dtype) == ((0, 2, 4, 3), (0, 2, 4), torch.int64)
    scores.sum().backward()
    assert operands[0].grad.shape == operands[0].shape
    assert (operands[2].grad == 0).all()


@pytest.mark.parametrize("search", ["two_stage", "signed", "exact"])
def test_no_result_is_left_unwritten(search, poisoned_memory):
    operands = [tensor.requires_grad_() for tensor in make_scores()]
    scores, _ = product_topk(*operands, top_k=4, coarse_top_k=4, search=search)
    scores.square().sum().backward()
    for tensor in (scores, *(operand.grad for operand in operands[:3])):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("search", ["two_stage", "signed", "exact"])
def test_compiles_without_a_graph_break(search, fresh_compiler):
    operands = [tensor.requires_grad_() for tensor in make_scores(dtype=torch.float32)]

    def loss(*values):
        scores, slots = product_topk(*values, top_k=4, coarse_top_k=4, search=search)
        return (scores.sum(-1) * slots).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, result = loss(*operands), compiled(*operands)
    assert_close(result, expected)
    grads = zip(*(torch.autograd.grad(value, operands[:3]) for value in (result, expected)), strict=True)
    for ours, theirs in grads:
        assert_close(ours, theirs)


@pytest.mark.parametrize(("search", "top_k", "coarse_top_k"), [("two_stage", 6, 3), ("signed", 6, 5), ("exact", 6, 3)])
def test_counts_the_flops_of_the_definition(search, top_k, coarse_top_k):
    """The registered operator reports what the reference's matrix products take."""
    operands = make_scores()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as registered:
        product_topk(*operands, top_k=top_k, coarse_top_k=coarse_top_k, search=search)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as reference:
        product_topk_reference(*operands, top_k, coarse_top_k, search)
    assert registered.get_total_flops() == reference.get_total_flops()
    flops = product_topk_flops(7, 2, 2, 3, top_k, coarse_top_k, search)
    assert registered.get_total_flops() == 4 * flops


def test_flops_by_hand():
    # coarse 2·8·2, grid 3·2² + 3²·2, selected 4·3·(2² + 2); two heads
    assert product_topk_flops(8, 2, 2, 3, 4, 3, "two_stage") == 2 * 2 * (32 + 30 + 72)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("fast", 8, 2, 2), r"search must be one of two_stage, signed, exact; got 'fast'"),
        (("two_stage", 8, 2, 9), r"coarse_top_k must lie between 1 and the 8 keys of a side; got 9"),
        (("two_stage", 8, 2, 0), r"coarse_top_k must lie between 1 and the 8 keys of a side; got 0"),
        (("exact", 8, 2, 9), r"coarse_top_k must lie between 1 and the 8 keys of a side; got 9"),
        (("two_stage", 8, 10, 3), r"top_k must lie between 1 and 9, the candidates of search 'two_stage'.*3; got 10"),
        (("signed", 8, 6, 3), r"top_k must lie between 1 and 5, .*'signed' with 8 keys.*coarse_top_k 3; got 6"),
        (("exact", 8, 65, 3), r"top_k must lie between 1 and 64, .*; got 65"),
        (("exact", 8, 0, 1), r"top_k must lie between 1 and 64, .*; got 0"),
    ],
)
def test_what_a_search_cannot_do_is_refused(arguments, text):
    search, side, top_k, coarse_top_k = arguments
    with pytest.raises(ValueError, match=text):
        check_search(search, side, top_k, coarse_top_k)
    with pytest.raises(ValueError, match=text):
        product_topk(*make_scores(side=side), top_k=top_k, coarse_top_k=coarse_top_k, search=search)


def test_every_allowed_size_runs():
    operands = make_scores(num_tokens=1, num_heads=1, side=4)
    for search, coarse_top_k in itertools.product(["two_stage", "signed", "exact"], range(1, 5)):
        for top_k in range(1, num_candidates(search, 4, coarse_top_k) + 1):
            _, slots = product_topk(*operands, top_k=top_k, coarse_top_k=coarse_top_k, search=search)
            assert len(set(slots.flatten().tolist())) == top_k
