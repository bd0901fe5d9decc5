"""bag, gather_dot and scatter against their definitions, in every dtype, shape and mode that they promise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from naive_operators import naive_bag, naive_gather_dot, naive_scatter
from tolerances import assert_close
from ultramem.ops import bag, gather_dot, scatter

pytestmark = pytest.mark.usefixtures("backend")

OPERATORS = ["bag", "gather_dot", "scatter"]
# tokens, selected, rows, width, cores, blocks
SIZES = [(5, 3, 11, 6, 1, 1), (7, 4, 3, 6, 2, 1), (4, 5, 13, 9, 3, 4), (1, 1, 1, 1, 1, 1), (3, 7, 2, 5, 1, 9)]


def make_operands(sizes, dtype=torch.float64, idx_dtype=torch.int64, seed=0):
    """Random operands of all three operators; every floating one wants a gradient."""
    num_tokens, num_selected, num_rows, width, num_cores, num_blocks = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    block = torch.randint(num_blocks, (num_tokens, num_selected), generator=generator)
    return {
        "idx": torch.randint(num_rows, (num_tokens, num_selected), generator=generator).to(idx_dtype),
        "w": normal(num_tokens, num_selected, num_cores),
        "x": normal(num_tokens, num_blocks * width),
        "table": normal(num_rows, width),
        "block": block if num_blocks > 1 else None,
        "sizes": sizes,
    }


def apply(name, operands, **kwargs):
    """Run an operator on the operands that it takes."""
    blocks = {"block_NK": operands["block"], "num_blocks": operands["sizes"][5], **kwargs}
    if name == "bag":
        return bag(operands["idx"], operands["w"], operands["table"], **blocks)
    if name == "gather_dot":
        return gather_dot(operands["idx"], operands["x"], operands["table"], num_cores=operands["sizes"][4], **blocks)
    return scatter(operands["idx"], operands["w"], operands["x"], operands["sizes"][2], **blocks)


def apply_naive(name, operands):
    blocks = (operands["block"], operands["sizes"][5])
    with torch.no_grad():
        if name == "bag":
            return naive_bag(operands["idx"], operands["w"], operands["table"], *blocks)
        if name == "gather_dot":
            return naive_gather_dot(operands["idx"], operands["x"], operands["table"], *blocks, operands["sizes"][4])
        return naive_scatter(operands["idx"], operands["w"], operands["x"], operands["sizes"][2], *blocks)


def differentiable(name, operands):
    return [operands[key] for key in {"bag": "w table", "gather_dot": "x table", "scatter": "w x"}[name].split()]


def as_function(name, operands):
    """The operator as a function of its differentiable operands alone."""
    keys = {"bag": "w table", "gather_dot": "x table", "scatter": "w x"}[name].split()
    return lambda *values: apply(name, {**operands, **dict(zip(keys, values, strict=True))})


def as_custom_op(name, operands):
    """The registered operator and its positional arguments."""
    idx, w, x, table, block = (operands[key] for key in ("idx", "w", "x", "table", "block"))
    num_rows, _, num_cores, num_blocks = operands["sizes"][2:]
    arguments = {
        "bag": (idx, w, table, block, num_blocks),
        "gather_dot": (idx, x, table, block, num_blocks, num_cores),
        "scatter": (idx, w, x, num_rows, block, num_blocks),
    }[name]
    return getattr(torch.ops.ultramem, name).default, arguments


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", OPERATORS)
def test_equals_its_definition(name, sizes, dtype, idx_dtype):
    operands = make_operands(sizes, dtype, idx_dtype)
    out = apply(name, operands)
    # scatter makes a gradient, which stays in the accumulation dtype.
    assert out.dtype == (torch.float32 if name == "scatter" and dtype == torch.bfloat16 else dtype)
    assert_close(out, apply_naive(name, operands), dtype)


@pytest.mark.parametrize("name", OPERATORS)
@given(
    sizes=st.tuples(*[st.integers(1, 7)] * 3, st.integers(1, 4), st.integers(1, 3), st.integers(1, 5)),
    seed=st.integers(0, 1000),
)
def test_equals_its_definition_for_any_shape(name, sizes, seed):
    num_tokens, num_selected, num_rows, part, num_cores, num_blocks = sizes
    operands = make_operands((num_tokens, num_selected, num_rows, part * num_cores, num_cores, num_blocks), seed=seed)
    assert_close(apply(name, operands), apply_naive(name, operands))


@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[1], (3, 4, 5, 4, 2, 4)])
@pytest.mark.parametrize("name", OPERATORS)
def test_first_and_second_derivatives_are_those_of_the_definition(name, sizes):
    operands = make_operands(sizes)
    function, inputs = as_function(name, operands), differentiable(name, operands)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("sizes", [SIZES[0], (3, 4, 5, 4, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_registration_is_sound(name, dtype, sizes):
    operator, arguments = as_custom_op(name, make_operands(sizes, dtype))
    torch.library.opcheck(operator, arguments)


def test_gradients_keep_the_dtype_of_what_they_belong_to():
    operands = make_operands(SIZES[2], torch.bfloat16)
    operands["w"] = operands["w"].detach().float().requires_grad_()
    apply("bag", operands).float().sum().backward()
    assert operands["w"].grad.dtype == torch.float32
    assert operands["table"].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", OPERATORS)
def test_sums_are_accumulated_in_fp32(name):
    """1,024 ones add up to 256 where the running sum is bf16: 256 + 1 rounds back to 256."""
    many = 1024
    sizes = {"bag": (1, many, 3, 1, 1, 1), "gather_dot": (1, 1, 3, many, 1, 1), "scatter": (many, 1, 3, 1, 1, 1)}[name]
    operands = make_operands(sizes, torch.bfloat16)
    for key in ("w", "x", "table"):
        operands[key] = torch.ones_like(operands[key])
    operands["idx"] = torch.full_like(operands["idx"], 2)
    assert apply(name, operands).max() == many


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_fp32_weights_are_not_rounded_to_a_bf16_table(num_blocks):
    """1 + 2⁻⁹ and −1 on a row of ones: rounded first, they cancel."""
    w = torch.tensor([[1 + 2**-9, -1.0]])
    idx = torch.zeros(1, 2, dtype=torch.int64)
    block = torch.zeros_like(idx) if num_blocks > 1 else None
    out = bag(idx, w, torch.ones(1, 1, dtype=torch.bfloat16), block_NK=block, num_blocks=num_blocks)
    assert out[0, 0].item() == 2**-9
    x = torch.ones(1, num_blocks, dtype=torch.bfloat16)
    assert scatter(idx, w, x, 1, block_NK=block, num_blocks=num_blocks).item() == 2**-9


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_products_of_bf16_are_not_rounded(num_blocks):
    """(1 + 2⁻⁷)² − (1 + 2⁻⁶) = 2⁻¹⁴, of which bf16 products keep nothing."""
    x = torch.tensor([[1 + 2**-7, 1.0]]).repeat(1, num_blocks).bfloat16()
    table = torch.tensor([[1 + 2**-7, -1 - 2**-6]]).bfloat16()
    idx = torch.zeros(1, 1, dtype=torch.int64)
    block = torch.ones_like(idx) if num_blocks > 1 else None
    assert gather_dot(idx, x, table, block_NK=block, num_blocks=num_blocks).item() == 2**-14


@pytest.mark.parametrize("name", ["bag", "gather_dot"])
def test_bf16_gradients_are_accumulated_in_fp32(name):
    many = 1024
    operands = make_operands((many, 1, 2, 1, 1, 1), torch.bfloat16)
    operands["idx"] = torch.ones_like(operands["idx"])
    for key in ("w", "x", "table"):
        operands[key] = torch.ones_like(operands[key]).requires_grad_()
    apply(name, operands).sum().backward()
    assert operands["table"].grad.tolist() == [[0], [many]]


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_does_not_round_fp32(name):
    operands = make_operands(SIZES[2], torch.float32)
    inputs = differentiable(name, operands)
    expected = apply(name, operands)
    expected_grads = torch.autograd.grad(expected.square().sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = apply(name, operands)
        grads = torch.autograd.grad(out.square().sum(), inputs)
    assert out.dtype == torch.float32
    for ours, theirs in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_row_may_repeat_within_a_token_and_be_everybodys(name):
    operands = make_operands((6, 5, 4, 6, 2, 1))
    operands["idx"] = torch.full_like(operands["idx"], 3)
    assert_close(apply(name, operands), apply_naive(name, operands))
    assert torch.autograd.gradcheck(as_function(name, operands), differentiable(name, operands))


@pytest.mark.parametrize("sizes", [(0, 3, 5, 4, 2, 1), (0, 3, 5, 4, 2, 4), (3, 0, 5, 4, 2, 1)])
@pytest.mark.parametrize("name", OPERATORS)
def test_no_tokens_or_no_slots_give_empty_or_zero_results(name, sizes, poisoned_memory):
    operands = make_operands(sizes)
    out = apply(name, operands)
    assert out.shape == apply_naive(name, operands).shape
    assert (out == 0).all()
    out.sum().backward()
    for operand in differentiable(name, operands):
        assert operand.grad.shape == operand.shape
        assert (operand.grad == 0).all()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", OPERATORS)
def test_no_result_is_left_unwritten(name, sizes, poisoned_memory):
    operands = make_operands(sizes)
    out = apply(name, operands)
    assert_close(out, apply_naive(name, operands))
    out.square().sum().backward()
    for operand in differentiable(name, operands):
        assert operand.grad.isfinite().all()


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", [-1, 11, 2**31 - 1])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_index_outside_the_table_is_refused(name, wrong, idx_dtype):
    operands = make_operands(SIZES[0], idx_dtype=idx_dtype)
    operands["idx"][2, 1] = wrong
    with pytest.raises(IndexError, match=r"out of range|lies outside the table of 11 rows"):
        apply(name, operands)


@pytest.mark.parametrize("wrong", [-1, 4])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_block_outside_the_expansion_is_refused(name, wrong):
    operands = make_operands(SIZES[2])
    operands["block"][1, 2] = wrong
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|Class values|out of range|block"):
        apply(name, operands)


@pytest.mark.parametrize("sizes", [SIZES[1], (3, 4, 5, 4, 2, 4)])
@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_without_a_graph_break(name, sizes, fresh_compiler):
    operands = make_operands(sizes, torch.float32)
    inputs = differentiable(name, operands)
    compiled = torch.compile(as_function(name, operands), fullgraph=True, backend="aot_eager")
    expected, out = as_function(name, operands)(*inputs), compiled(*inputs)
    assert_close(out, expected)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    for ours, theirs in zip(grads, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("sizes", [(5, 3, 11, 6, 1, 1), (3, 4, 5, 4, 2, 4)])
@pytest.mark.parametrize("name", OPERATORS)
def test_counts_two_flops_per_table_element_read(name, sizes):
    num_tokens, num_selected, _, width = sizes[:4]
    operands = make_operands(sizes)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        out = apply(name, operands)
    assert counter.get_total_flops() == 2 * num_tokens * num_selected * width
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # One lookup's work per operand that gets a gradient.
    assert counter.get_total_flops() == 2 * 2 * num_tokens * num_selected * width


@pytest.mark.parametrize(
    ("cores", "blocks", "change", "error", "text"),
    [
        (1, 1, {"idx": torch.zeros(5).long()}, ValueError, r"must be \[tokens, selected rows\].*\(5,\)|idx_NK \(5,\)"),
        (1, 1, {"idx": torch.zeros(5, 3)}, TypeError, r"int32 or int64, got torch.float32"),
        (1, 1, {"idx": torch.zeros(4, 3).long()}, ValueError, r"4 tokens in idx_NK but 5|\(4, 3\).*\(5, 3, 1\)"),
        (4, 1, {}, ValueError, r"width of 6 cannot be cut into 4 equal core slices"),
        (1, 1, {"block": torch.zeros(5, 3).long()}, ValueError, r"block_NK and num_blocks > 1 go together.*= 1"),
        (1, 3, {"block": None}, ValueError, r"block_NK and num_blocks > 1 go together.*= 3"),
        (1, 3, {"block": torch.zeros(5, 2).long()}, ValueError, r"idx_NK's shape \(5, 3\), got \(5, 2\)"),
    ],
)
@pytest.mark.parametrize("name", OPERATORS)
def test_operands_that_do_not_fit_are_named(name, cores, blocks, change, error, text):
    operands = {**make_operands((5, 3, 11, 6, cores, blocks)), **change}
    with pytest.raises(error, match=text) as caught:
        apply(name, operands)
    assert str(caught.value).startswith(f"{name}: ")


def test_gather_dot_names_the_width_that_it_expects():
    with pytest.raises(ValueError, match=r"gather_dot: x_NV must be \[N, 12\], got \(2, 6\)"):
        gather_dot(
            torch.zeros(2, 1, dtype=torch.int64),
            torch.zeros(2, 6),
            torch.zeros(4, 6),
            block_NK=torch.zeros(2, 1, dtype=torch.int64),
            num_blocks=2,
        )


@pytest.mark.parametrize("num_blocks", [0, 4])
def test_scatter_names_the_width_that_it_cannot_cut(num_blocks):
    with pytest.raises(ValueError, match=rf"scatter: a width of 6 cannot be cut into {num_blocks} equal blocks"):
        scatter(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1), torch.zeros(2, 6), 4, num_blocks=num_blocks)


@pytest.mark.parametrize("function", [bag, lambda idx, w, table: scatter(idx, w, table[:2], 4)])
def test_weights_of_another_shape_are_named(function):
    with pytest.raises(
        ValueError, match=r"weights must be \[N, K\] or \[N, K, cores\] for idx_NK \(2, 3\), got \(2, 4\)"
    ):
        function(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4), torch.zeros(5, 6))


def test_two_dimensional_weights_are_one_core():
    operands = make_operands(SIZES[0])
    flat = {**operands, "w": operands["w"][..., 0]}
    for name in ("bag", "scatter"):
        assert torch.equal(apply(name, flat), apply(name, operands))
