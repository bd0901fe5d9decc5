"""Triton's gather_dot, bag and scatter against the references: results, gradients, accumulation, order of sums."""

import pytest
import torch

from tolerances import assert_bit_equal, assert_close
from ultramem.ops import RowGradients, bag, gather_dot, scatter, use_backend
from ultramem.ops.triton import tables

OPERATORS = ["bag", "gather_dot", "scatter"]
# tokens, selected, rows, width, cores, blocks; the interpreter's tiles are eight slots high and eight columns wide
SIZES = [(3, 11, 11, 18, 1, 1), (3, 5, 3, 22, 2, 1), (2, 9, 13, 9, 3, 4), (1, 1, 1, 1, 1, 1), (2, 6, 2, 5, 1, 9)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_operands(sizes, dtype=torch.float32, idx_dtype=torch.int64):
    num_tokens, num_selected, num_rows, width, num_cores, num_blocks = sizes
    return {
        "idx": torch.randint(num_rows, (num_tokens, num_selected)).to(idx_dtype),
        "w": torch.randn(num_tokens, num_selected, num_cores).to(dtype),
        "x": torch.randn(num_tokens, num_blocks * width).to(dtype),
        "table": torch.randn(num_rows, width).to(dtype),
        "block": torch.randint(num_blocks, (num_tokens, num_selected)) if num_blocks > 1 else None,
        "sizes": sizes,
    }


def apply(name, operands, backend, **kwargs):
    """The result of an operator and the gradients of its operands."""
    idx, num_blocks = operands["idx"], operands["sizes"][5]
    blocks = {"block_NK": operands["block"], "num_blocks": num_blocks, **kwargs}
    keys = {"bag": "w table", "gather_dot": "x table", "scatter": "w x"}[name].split()
    values = [operands[key].detach().requires_grad_() for key in keys]
    with use_backend(backend):
        if name == "bag":
            out = bag(idx, *values, **blocks)
        elif name == "gather_dot":
            out = gather_dot(idx, *values, num_cores=operands["sizes"][4], **blocks)
        else:
            out = scatter(idx, *values, operands["sizes"][2], **blocks)
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(out.shape, generator=generator).to(out.dtype)
        grads = torch.autograd.grad(out, values, weight, allow_unused=True)
    return [out.detach(), *grads]


def assert_equals_reference(name, operands, dtype, **kwargs):
    for ours, theirs in zip(
        apply(name, operands, "triton", **kwargs), apply(name, operands, "reference", **kwargs), strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", OPERATORS)
def test_results_and_gradients_equal_the_reference(name, sizes, dtype):
    assert_equals_reference(name, make_operands(sizes, dtype), dtype)


@pytest.mark.parametrize("name", OPERATORS)
def test_int32_indices_and_operands_with_strides(name):
    operands = make_operands(SIZES[2], idx_dtype=torch.int32)
    strided = {
        key: value.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(value, torch.Tensor) else value
        for key, value in operands.items()
    }
    assert not strided["table"].is_contiguous()
    for ours, theirs in zip(apply(name, strided, "triton"), apply(name, operands, "triton"), strict=True):
        assert_bit_equal(ours, theirs)


@pytest.mark.parametrize("sizes", [(0, 3, 5, 4, 2, 1), (0, 3, 5, 4, 2, 4), (3, 0, 5, 4, 2, 1)])
@pytest.mark.parametrize("name", OPERATORS)
def test_no_tokens_or_no_slots(name, sizes, poisoned_memory):
    assert_equals_reference(name, make_operands(sizes), torch.float32)


@pytest.mark.parametrize("name", OPERATORS)
def test_one_row_is_everybodys(name):
    """3 tokens × 17 slots on one row: its run spans chunks of the sorted entries, the last one not full."""
    operands = make_operands((3, 17, 3, 6, 2, 1))
    operands["idx"] = torch.full_like(operands["idx"], 1)
    assert_equals_reference(name, operands, torch.float32)


@pytest.mark.parametrize("sizes", [(3, 11, 4, 6, 2, 1), (3, 11, 9, 5, 1, 3), (4, 1, 2, 1, 1, 1)])
def test_sums_are_always_in_one_order(sizes, poisoned_memory):
    """Runs of equal rows begin, end and lie anywhere in the chunks of the sorted entries."""
    operands = make_operands(sizes)
    first, second = (apply("scatter", operands, "triton") for _ in range(2))
    for ours, again, theirs in zip(first, second, apply("scatter", operands, "reference"), strict=True):
        assert_bit_equal(ours, again)
        assert_close(ours, theirs)


@pytest.mark.parametrize("sizes", [(7, 5, 4, 6, 2, 1), (7, 5, 50, 5, 1, 3), (0, 3, 5, 4, 2, 1)])
def test_row_sparse_scatter_returns_the_touched_rows(sizes):
    operands = make_operands(sizes)
    idx, w, x, block = (operands[key] for key in ("idx", "w", "x", "block"))
    rows, gradients = tables.scatter_rows(idx, w, x, sizes[2], block, sizes[5])
    assert torch.equal(rows, idx.unique())
    dense = torch.zeros(sizes[2], sizes[3]).index_copy(0, rows, gradients)
    assert_close(dense, apply("scatter", operands, "reference")[0])


@pytest.mark.parametrize("name", ["bag", "gather_dot"])
def test_row_gradients_collect_what_the_dense_gradient_holds(name):
    operands = make_operands((3, 11, 20, 6, 2, 1))
    collector = RowGradients(20, 6)
    with use_backend("triton"):
        apply(name, operands, "triton", row_gradients=collector)
        rows, gradients = collector.coalesce()
    dense = torch.zeros(20, 6).index_copy(0, rows, gradients)
    assert_close(dense, apply(name, operands, "reference")[2])


@pytest.mark.parametrize("name", OPERATORS)
def test_sums_are_accumulated_in_fp32(name):
    """300 ones add up to 256 where the running sum is bf16: 256 + 1 rounds back to 256."""
    many = 300
    sizes = {
        "bag": (1, many, 3, 1, 1, 1),
        "gather_dot": (1, 1, 3, many, 1, 1),
        "scatter": (10, many // 10, 3, 1, 1, 1),
    }[name]
    operands = make_operands(sizes, torch.bfloat16)
    for key in ("w", "x", "table"):
        operands[key] = torch.ones_like(operands[key])
    operands["idx"] = torch.full_like(operands["idx"], 2)
    assert apply(name, operands, "triton")[0].max() == many


def test_weights_are_not_rounded_to_the_table():
    """1 + 2⁻⁹ and −1 on a row of ones: rounded to bf16 first, they cancel."""
    w, idx = torch.tensor([[1 + 2**-9, -1.0]]), torch.zeros(1, 2, dtype=torch.int64)
    assert bag(idx, w, torch.ones(1, 1, dtype=torch.bfloat16), backend="triton").item() == 2**-9
    assert scatter(idx, w, torch.ones(1, 1, dtype=torch.bfloat16), 1, backend="triton").item() == 2**-9


def test_bf16_results_are_rounded_to_the_nearest():
    idx, w = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), 1 + 2**-8 + 2**-9)
    assert bag(idx, w, torch.ones(1, 1, dtype=torch.bfloat16), backend="triton").item() == 1 + 2**-7


@pytest.mark.parametrize("wrong", [-1, 11])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_row_outside_the_table_is_refused(name, wrong):
    operands = make_operands(SIZES[0])
    operands["idx"][2, 1] = wrong
    with pytest.raises(IndexError, match=rf"{name}: rows in .*{wrong}.* out of range \[0, 11\)"):
        apply(name, operands, "triton")


@pytest.mark.parametrize("wrong", [-1, 4])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_block_outside_the_expansion_is_refused(name, wrong):
    operands = make_operands(SIZES[2])
    operands["block"][1, 2] = wrong
    with pytest.raises(IndexError, match=rf"{name}: blocks in .*{wrong}.* out of range \[0, 4\)"):
        apply(name, operands, "triton")
