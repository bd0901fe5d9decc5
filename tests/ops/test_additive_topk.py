"""product_topk with additive scores against the best of the whole grid, its derivatives and registration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from naive_operators import naive_additive_topk
from tolerances import assert_close
from ultramem.ops import product_topk, product_topk_flops, product_topk_reference
from ultramem.ops.product_topk import num_candidates

# The search of the layers keeps the top_k keys of a side, at most all; more or the whole grid finds the same.
SEARCHES = {"layers": {}, "all_keys": {"coarse_top_k": 7}, "exact": {"search": "exact"}}
searches = pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)


def make_scores(num_tokens=4, num_heads=2, side=7, seed=0, dtype=torch.float64):
    """Random scores of both sides: no two slots tie."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.randn(2, num_tokens, num_heads, side, 1, generator=generator, dtype=torch.float64)
    return tuple(side.to(dtype).contiguous() for side in sides)


def assert_equals_naive(sides, top_k, **search):
    num_tokens, num_heads = sides[0].shape[:2]
    scores, slots = product_topk(*sides, top_k=top_k, **search)
    assert (scores.shape, scores.dtype) == ((num_tokens, num_heads, top_k, 1), torch.float64)
    assert (slots.shape, slots.dtype) == ((num_tokens, num_heads, top_k), torch.int64)
    for n in range(num_tokens):
        for h in range(num_heads):
            expected = naive_additive_topk(sides[0][n, h, :, 0], sides[1][n, h, :, 0], top_k)
            assert slots[n, h].tolist() == list(expected), "other slots, or not in descending order"
            assert_close(scores[n, h, :, 0], torch.tensor(list(expected.values()), dtype=torch.float64))


@searches
@pytest.mark.parametrize("top_k", [1, 4, 7, 9, 49])
def test_finds_the_best_of_the_whole_grid(top_k, search):
    """Also where more slots are asked for than a side has keys."""
    assert_equals_naive(make_scores(), top_k, **search)


@given(st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 8)), st.integers(0, 99), st.data())
def test_finds_the_best_for_any_shape(sizes, seed, data):
    side = sizes[2]
    top_k = data.draw(st.integers(1, side**2))
    coarse_top_k = data.draw(st.integers(min(top_k, side), side))
    assert_equals_naive(make_scores(*sizes, seed), top_k, coarse_top_k=coarse_top_k)


def test_fewer_keys_than_slots_may_miss():
    """What the layers never ask for: the best row with every column."""
    line = torch.tensor([1.0, 0.9, 0.0]).view(1, 1, 3, 1)
    _, slots = product_topk(100 * line, line, top_k=3, coarse_top_k=2)
    assert slots.flatten().tolist() == [0, 1, 3]
    _, slots = product_topk(100 * line, line, top_k=3)
    assert slots.flatten().tolist() == [0, 1, 2]


@searches
def test_first_and_second_derivatives(search):
    sides = [side.requires_grad_() for side in make_scores(num_tokens=2)]

    def squares(*sides):
        return product_topk(*sides, top_k=9, **search)[0] ** 2

    assert torch.autograd.gradcheck(squares, sides)
    assert torch.autograd.gradgradcheck(squares, sides)


@searches
def test_a_keys_gradient_is_the_sum_over_the_slots_that_it_is_part_of(search):
    sides = [side.requires_grad_() for side in make_scores()]
    scores, slots = product_topk(*sides, top_k=9, **search)
    assert not slots.requires_grad
    weight = torch.randn_like(scores)
    (scores * weight).sum().backward()
    for side, keys in zip(sides, (slots // 7, slots % 7), strict=True):
        expected = torch.zeros(4, 2, 7, dtype=torch.float64)
        for n in range(4):
            for h in range(2):
                for k in range(9):
                    expected[n, h, keys[n, h, k]] += weight[n, h, k, 0]
        assert_close(side.grad[..., 0], expected)


@pytest.mark.parametrize("search", ["two_stage", "exact"])
def test_registration_is_sound(search):
    sides = [side.requires_grad_() for side in make_scores(dtype=torch.float32)]
    torch.library.opcheck(torch.ops.ultramem.product_topk.default, (*sides, None, None, None, 4, 4, search))


@searches
def test_compiles_without_a_graph_break(search, fresh_compiler):
    sides = [side.requires_grad_() for side in make_scores(dtype=torch.float32)]

    def loss(*sides):
        scores, slots = product_topk(*sides, top_k=9, **search)
        return (scores[..., 0] * slots).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, result = loss(*sides), compiled(*sides)
    assert_close(result, expected)
    for ours, theirs in zip(*(torch.autograd.grad(value, sides) for value in (result, expected)), strict=True):
        assert_close(ours, theirs)


@searches
def test_no_result_is_left_unwritten(search, poisoned_memory):
    sides = [side.requires_grad_() for side in make_scores()]
    scores, slots = product_topk(*sides, top_k=9, **search)
    scores.square().sum().backward()
    assert 0 <= slots.min() <= slots.max() < 49
    for tensor in (scores, *(side.grad for side in sides)):
        assert tensor.isfinite().all()


@searches
def test_no_tokens(search):
    sides = [side.requires_grad_() for side in make_scores(num_tokens=0)]
    scores, slots = product_topk(*sides, top_k=4, **search)
    assert (scores.shape, slots.shape, slots.dtype) == ((0, 2, 4, 1), (0, 2, 4), torch.int64)
    scores.sum().backward()
    assert sides[0].grad.shape == sides[0].shape


@searches
def test_autocast_does_not_round(search):
    sides = [side.requires_grad_() for side in make_scores(dtype=torch.float32)]
    expected, expected_slots = product_topk(*sides, top_k=9, **search)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, slots = product_topk(*sides, top_k=9, **search)
        assert torch.equal(product_topk_reference(*sides, None, None, None, 9, 7)[0], expected)
    assert torch.equal(slots, expected_slots)
    assert torch.equal(scores, expected)


@pytest.mark.parametrize(
    ("search", "top_k", "coarse_top_k"), [("two_stage", 4, 4), ("two_stage", 20, 7), ("exact", 4, 4)]
)
def test_counts_an_addition_per_candidate_and_per_slot(search, top_k, coarse_top_k):
    sides = make_scores()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        product_topk(*sides, top_k=top_k, coarse_top_k=coarse_top_k, search=search)
    candidates = 49 if search == "exact" else coarse_top_k**2
    assert num_candidates(search, 7, coarse_top_k) == candidates
    assert counter.get_total_flops() == 4 * 2 * (candidates + top_k)
    assert product_topk_flops(7, 1, 2, None, top_k, coarse_top_k, search) == 2 * (candidates + top_k)


def test_what_additive_scores_cannot_be_is_refused():
    row, col = make_scores()
    cores, u = torch.rand(1, 2, 1, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    for operands in ((row, col, cores), (row, col, None, u, u), (row, col, cores, u), (row, col, None, u)):
        with pytest.raises(ValueError, match="takes cores with both directions, or none of the three for additive"):
            product_topk(*operands, top_k=2)
    with pytest.raises(ValueError, match="additive scores have one rank and need no signed search; got 2 ranks"):
        product_topk(row.expand(-1, -1, -1, 2), col.expand(-1, -1, -1, 2), top_k=2)
    with pytest.raises(ValueError, match="got 1 ranks and search 'signed'"):
        product_topk(row, col, top_k=2, search="signed")
    with pytest.raises(ValueError, match=r"top_k must lie between 1 and 49, .*; got 50"):
        product_topk(row, col, top_k=50)
