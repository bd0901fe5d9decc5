"""The search from queries and keys against the search of all fine scores, on every backend, and its derivatives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from naive_operators import naive_product_topk
from tolerances import assert_bit_equal, assert_close
from ultramem.errors import BackendError
from ultramem.ops import contract_sides, fine_scores, key_search, key_search_reference, product_topk, use_backend
from ultramem.ops.product_topk import num_candidates

KERNELS = ["reference", "cpu"]


def make_operands(
    num_tokens=5, num_heads=2, side=11, rank=2, num_cores=3, width=6, num_queries=1, seed=0, dtype=torch.float32
):
    """Queries, keys, cores and the leading singular pair of the cores' sum."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_tokens, 2, num_queries, width, generator=generator, dtype=torch.float64)
    keys = torch.randn(num_heads, 2, side, rank, width, generator=generator, dtype=torch.float64)
    cores = torch.rand(num_cores, num_heads, rank, rank, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(cores.sum(0))
    return tuple(part.to(dtype).contiguous() for part in (query, keys, cores, u[..., :, 0], vh[..., 0, :]))


def both_fine_scores(query, keys):
    return tuple(fine_scores(query[:, side], keys[:, side]) for side in (0, 1))


def assert_equals_definition(operands, top_k, coarse_top_k, search, backend):
    """Slots and scores in descending order as loops find them in fp64."""
    query, keys, cores, u, t = (operand.double() for operand in operands)
    expected = naive_product_topk(*both_fine_scores(query, keys), cores, u, t, top_k, coarse_top_k, search)
    scores, slots = key_search(*operands, top_k=top_k, coarse_top_k=coarse_top_k, search=search, backend=backend)
    num_tokens, num_heads = query.shape[0], keys.shape[0]
    assert scores.shape == (num_tokens, num_heads, top_k, cores.shape[0])
    assert (slots.shape, slots.dtype) == ((num_tokens, num_heads, top_k), torch.int64)
    for found, score, best in zip(slots.flatten(0, 1).tolist(), scores.flatten(0, 1), expected, strict=True):
        assert found == list(best), "other slots, or not in descending order"
        assert_close(score, torch.tensor(list(best.values()), dtype=torch.float64), dtype=torch.float32)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("num_queries", [1, 2])
@pytest.mark.parametrize(
    ("search", "top_k", "coarse_top_k"),
    [
        ("two_stage", 1, 1),
        ("two_stage", 4, 4),
        ("two_stage", 9, 3),
        ("two_stage", 121, 11),
        ("signed", 8, 4),
        ("signed", 5, 3),
        ("signed", 1, 1),
        ("exact", 5, 3),
    ],
)
def test_equals_the_definition(search, top_k, coarse_top_k, num_queries, backend):
    assert_equals_definition(make_operands(num_queries=num_queries), top_k, coarse_top_k, search, backend)


@pytest.mark.parametrize(
    ("sizes", "top_k", "coarse_top_k", "search"),
    [
        # More than one block of candidates, widths and sides that no vector divides, many heads, wide grids.
        ({"side": 133, "width": 37, "rank": 3, "num_queries": 3}, 61, 40, "two_stage"),
        ({"side": 512, "width": 128, "num_heads": 1, "num_tokens": 9}, 32, 32, "two_stage"),
        ({"side": 257, "width": 16, "num_heads": 5, "num_tokens": 2}, 300, 130, "two_stage"),
        ({"side": 200, "width": 24, "rank": 4, "num_cores": 1}, 100, 45, "signed"),
        ({"side": 1, "width": 1, "rank": 1}, 1, 1, "two_stage"),
    ],
)
def test_the_kernel_at_odd_sizes(sizes, top_k, coarse_top_k, search):
    operands = make_operands(**sizes)
    ours, theirs = (
        key_search(*operands, top_k=top_k, coarse_top_k=coarse_top_k, search=search, backend=backend)
        for backend in ("cpu", "reference")
    )
    # Scores of two computations that differ in rounding may change places; the sets are the same.
    (ours_slots, ours_order), (their_slots, their_order) = (slots.sort(-1) for _, slots in (ours, theirs))
    assert (ours_slots == their_slots).double().mean() > 0.999
    same = (ours_slots == their_slots).all(-1)
    pairs = [
        scores.gather(2, order[..., None].expand_as(scores))
        for (scores, _), order in ((ours, ours_order), (theirs, their_order))
    ]
    torch.testing.assert_close(pairs[0][same], pairs[1][same], rtol=1e-4, atol=1e-3)


@given(
    sizes=st.tuples(*[st.integers(0, 3)], *[st.integers(1, 3)], st.integers(1, 20), *[st.integers(1, 3)] * 2),
    search=st.sampled_from(["two_stage", "signed"]),
    data=st.data(),
)
def test_the_kernel_for_any_shape(sizes, search, data):
    coarse_top_k = data.draw(st.integers(1, sizes[2]))
    top_k = data.draw(st.integers(1, num_candidates(search, sizes[2], coarse_top_k)))
    operands = make_operands(*sizes, seed=data.draw(st.integers(0, 99)))
    ours, theirs = (
        key_search(*operands, top_k=top_k, coarse_top_k=coarse_top_k, search=search, backend=backend)
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(ours[0].sum(-1), theirs[0].sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("search", ["two_stage", "signed"])
def test_gradients_are_those_of_the_fine_scores(search, num_queries, backend):
    operands = make_operands(rank=3, num_queries=num_queries, num_tokens=150, side=19, width=21)
    sizes = {"top_k": 12, "coarse_top_k": 6, "search": search}
    ours = [operand.clone().requires_grad_() for operand in operands[:3]]
    theirs = [operand.double().requires_grad_() for operand in operands[:3]]
    scores, slots = key_search(*ours, *operands[3:], **sizes, backend=backend)
    directions = [operand.double() for operand in operands[3:]]
    expected, expected_slots = product_topk(*both_fine_scores(*theirs[:2]), theirs[2], *directions, **sizes)
    assert torch.equal(slots, expected_slots)
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad((scores * weights).sum(), ours)
    for gradient, definition in zip(gradients, torch.autograd.grad((expected * weights).sum(), theirs), strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), definition, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_queries", [1, 2])
@pytest.mark.parametrize("search", ["two_stage", "signed", "exact"])
def test_first_and_second_derivatives(search, num_queries):
    *differentiable, u, t = make_operands(2, 2, 5, 2, 2, 3, num_queries, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in differentiable]

    def scores(*values):
        return key_search(*values, u, t, top_k=4, coarse_top_k=4, search=search)[0]

    assert torch.autograd.gradcheck(scores, inputs)
    assert torch.autograd.gradgradcheck(scores, inputs)


@pytest.mark.parametrize("search", ["two_stage", "exact"])
def test_registration_is_sound(search):
    operands = [tensor.requires_grad_() for tensor in make_operands()]
    torch.library.opcheck(torch.ops.ultramem.key_search.default, (*operands, None, 4, 4, search))


@pytest.mark.parametrize("backend", KERNELS)
def test_compiles_without_a_graph_break(backend, fresh_compiler):
    operands = [tensor.requires_grad_() for tensor in make_operands()]

    def loss(*values):
        scores, slots = key_search(*values, top_k=4, coarse_top_k=4, backend=backend)
        return (scores.sum(-1) * slots).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, result = loss(*operands), compiled(*operands)
    assert_close(result, expected)
    grads = zip(*(torch.autograd.grad(value, operands[:3]) for value in (result, expected)), strict=True)
    for ours, theirs in grads:
        assert_close(ours, theirs)


def run_with_gradients(operands):
    values = [operand.clone().requires_grad_() for operand in operands[:3]]
    scores, slots = key_search(*values, *operands[3:], top_k=20, coarse_top_k=16, backend="cpu")
    return scores, slots, *torch.autograd.grad(scores.square().sum(), values)


def test_the_same_bits_whatever_the_number_of_threads():
    operands = make_operands(num_tokens=300, side=64, width=32)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(run_with_gradients(operands))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert_bit_equal(ours, theirs)


def test_no_result_is_left_unwritten(poisoned_memory):
    for tensor in run_with_gradients(make_operands(num_tokens=70, side=40)):
        assert tensor.double().isfinite().all()


@pytest.mark.parametrize("backend", KERNELS)
def test_no_tokens(backend):
    operands = make_operands(num_tokens=0)
    values = [operand.requires_grad_() for operand in operands[:3]]
    scores, slots = key_search(*values, *operands[3:], top_k=3, coarse_top_k=3, backend=backend)
    assert (scores.shape, slots.shape) == ((0, 2, 3, 3), (0, 2, 3))
    for gradient in torch.autograd.grad(scores.sum(), values):
        assert (gradient == 0).all()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("search", ["two_stage", "signed"])
def test_not_a_number_ranks_highest(search, backend):
    """As `torch.topk` has it: a diverging model shows in its scores."""
    query, keys, *others = make_operands(num_tokens=3, num_heads=1, side=40)
    query[1] = float("nan")
    scores, slots = key_search(query, keys, *others, top_k=6, coarse_top_k=6, search=search, backend=backend)
    assert scores[1].isnan().all()
    assert scores[[0, 2]].isfinite().all()
    assert ((slots >= 0) & (slots < 1600)).all()
    keys[0, 0, 7] = float("nan")
    scores, slots = key_search(query, keys, *others, top_k=6, coarse_top_k=6, search="two_stage", backend=backend)
    assert scores[0].isnan().any()
    assert (slots[0, 0] // 40 == 7).any()


@pytest.mark.parametrize("backend", KERNELS)
def test_equal_scores_give_different_slots(backend):
    operands = [torch.ones_like(operand) for operand in make_operands(num_heads=1, side=50)]
    _, slots = key_search(*operands, top_k=30, coarse_top_k=9, backend=backend)
    for line in slots[:, 0].tolist():
        assert len(set(line)) == 30


def test_contracted_keys_at_hand_change_nothing():
    operands = make_operands(num_queries=2)
    contracted = contract_sides(operands[1], *operands[3:], 2)
    sizes = {"top_k": 4, "coarse_top_k": 4, "backend": "cpu"}
    for ours, theirs in zip(
        key_search(*operands, **sizes, contracted_2HSe=contracted), key_search(*operands, **sizes), strict=True
    ):
        assert_bit_equal(ours, theirs)


def test_the_reference_backend_is_the_reference():
    operands = make_operands()
    with use_backend("reference"):
        ours = key_search(*operands, top_k=4, coarse_top_k=4)
    for found, expected in zip(ours, key_search_reference(*operands, 4, 4), strict=True):
        assert_bit_equal(found, expected)


def test_fp64_has_no_kernel():
    operands = make_operands(dtype=torch.float64)
    with pytest.raises(BackendError, match=r"key_search: backend 'cpu' .* float64"):
        key_search(*operands, top_k=4, coarse_top_k=4, backend="cpu")


def test_shapes_that_do_not_fit_are_refused():
    query, *others = make_operands(num_queries=3)
    with pytest.raises(ValueError, match=r"queries \[N, 2, 1 or r, d\].*\(5, 2, 3, 6\) and \(2, 2, 11, 2, 6\)"):
        key_search(query, *others, top_k=4, coarse_top_k=4)
    with pytest.raises(ValueError, match="top_k must lie between 1 and 16"):
        key_search(*make_operands(), top_k=17, coarse_top_k=4)


@pytest.mark.parametrize("search", ["two_stage", "signed"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_product_topk_kernel_of_all_fine_scores(rank, search):
    query, keys, *others = make_operands(rank=rank, side=60, num_tokens=20)
    rows, cols = (scores.contiguous() for scores in both_fine_scores(query, keys))
    ours, theirs = (
        product_topk(rows, cols, *others, top_k=25, coarse_top_k=18, search=search, backend=backend)
        for backend in ("cpu", "reference")
    )
    assert torch.equal(ours[1].sort(-1).values, theirs[1].sort(-1).values)
    torch.testing.assert_close(ours[0].sum(-1), theirs[0].sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("side", "top_k"), [(7, 3), (100, 32), (300, 200)])
def test_additive_kernel_gives_the_bits_of_the_reference(side, top_k):
    sides = torch.randn(2, 9, 3, side, 1, generator=torch.Generator().manual_seed(0))
    ours, theirs = (product_topk(*sides, top_k=top_k, backend=backend) for backend in ("cpu", "reference"))
    for found, expected in zip(ours, theirs, strict=True):
        assert_bit_equal(found, expected)
