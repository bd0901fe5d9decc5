"""grouped_linear against a loop over the rows, in every dtype, alignment and mode that it promises."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tolerances import assert_close
from ultramem.ops import grouped_linear

# Rows of each group, inputs, outputs. The kernels of PyTorch take the first and third alone.
SIZES = [((3, 0, 4, 1), 16, 8), ((2, 5, 0), 7, 6), ((0, 0, 6), 8, 16), ((4,), 16, 5), ((0, 0), 8, 8)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make_operands(size, dtype=torch.float64):
    counts, num_inputs, num_outputs = size
    rows = torch.randn(sum(counts), num_inputs, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), num_outputs, num_inputs, dtype=torch.float64).to(dtype).requires_grad_()
    return rows, weight, torch.tensor(counts).cumsum(0).int()


def naive(rows, weight, ends):
    """Every row by itself."""
    groups = [group for group, count in enumerate(ends.diff(prepend=ends.new_zeros(1)).tolist()) for _ in range(count)]
    # Zero, but a function of both operands even without rows.
    out = torch.zeros(len(rows), weight.shape[1], dtype=rows.dtype) + 0 * (rows.sum() + weight.sum())
    for row, group in enumerate(groups):
        out[row] = weight[group] @ rows[row]
    return out


@sizes
@dtypes
@pytest.mark.usefixtures("poisoned_memory")
def test_values_and_gradients_are_those_of_the_loop(size, dtype):
    rows, weight, ends = make_operands(size, dtype)
    out = grouped_linear(rows, weight, ends)
    assert out.dtype == dtype
    wide = [operand.detach().double().requires_grad_() for operand in (rows, weight)]
    expected = naive(*wide, ends)
    assert_close(out, expected)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, (rows, weight), grad)
    exact = torch.autograd.grad(expected, wide, grad.double())
    for ours, theirs in zip(actual, exact, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs)
    unvisited = ends.diff(prepend=ends.new_zeros(1)) == 0
    assert not actual[1][unvisited].any()


@sizes
def test_registration_is_complete(size):
    torch.library.opcheck(torch.ops.ultramem.grouped_linear, make_operands(size))
    rows, weight, ends = make_operands(size)
    left = torch.randn(len(rows), weight.shape[1], dtype=torch.float64)
    torch.library.opcheck(torch.ops.ultramem.grouped_outer, (left, rows.detach(), ends))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_of_rows_in_strided_memory(dtype):
    rows, weight, ends = make_operands(SIZES[0], dtype)
    strided = rows.detach().T.contiguous().T.requires_grad_()
    assert_close(grouped_linear(strided, weight, ends), naive(rows, weight, ends))
    # The gradient of a sum is an expanded scalar, which has no strides.
    (actual,) = torch.autograd.grad(grouped_linear(strided, weight, ends).sum(), strided)
    (expected,) = torch.autograd.grad(naive(rows, weight, ends).sum(), rows)
    assert_close(actual, expected)


@dtypes
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_its_gradients_in_one_graph(dtype):
    operands = make_operands(SIZES[0], dtype)
    compiled = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*operands), grouped_linear(*operands)
    assert torch.equal(actual, expected)
    grads = [torch.autograd.grad(out.square().sum(), operands[:2]) for out in (actual, expected)]
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


def test_autocast_chooses_the_dtype_and_gradients_keep_that_of_the_weights():
    rows, weight, ends = make_operands(SIZES[0], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = grouped_linear(rows, weight, ends)
    assert torch.equal(out, grouped_linear(rows.bfloat16(), weight.bfloat16(), ends))
    grads = torch.autograd.grad(out.sum(), (rows, weight))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]


@sizes
def test_the_flop_counter_sees_it(size):
    rows, weight, ends = make_operands(size)
    forward = 2 * len(rows) * weight.shape[1] * weight.shape[2]
    with FlopCounterMode(display=False) as counter:
        out = grouped_linear(rows, weight, ends)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * forward


def test_operands_that_do_not_fit_are_refused():
    rows, weight, ends = make_operands(SIZES[0])
    with pytest.raises(ValueError, match=r"rows \[S, I\].*got \(8, 15\), \(4, 8, 16\) and \(4,\)"):
        grouped_linear(rows[:, :15], weight, ends)
    with pytest.raises(ValueError, match=r"and \(3,\)"):
        grouped_linear(rows, weight, ends[:3])
    with pytest.raises(TypeError, match=r"one dtype and int32 ends; got torch\.float64, torch\.float32"):
        grouped_linear(rows, weight.float(), ends)
    with pytest.raises(TypeError, match=r"and torch\.int64"):
        grouped_linear(rows, weight, ends.long())
