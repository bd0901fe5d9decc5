"""The C++ kernels against the references: outputs, gradients, bits that do not depend on threads, huge pages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tolerances import assert_bit_equal, assert_close
from ultramem.ops import RowGradients, bag, gather_dot, pooled_read, scatter
from ultramem.ops.cpu import why_unavailable

# tokens, selected, rows, width, cores, blocks: widths around one, two and four vectors, tails, many rows at once.
SIZES = [
    (5, 3, 11, 6, 1, 1),
    (7, 4, 3, 34, 2, 1),
    (4, 5, 13, 99, 3, 4),
    (1, 1, 1, 1, 1, 1),
    (3, 7, 2, 17, 1, 9),
    (9, 33, 50, 192, 2, 1),
    (300, 8, 5000, 129, 1, 1),
    (2, 300, 40, 64, 1, 4),
]
DTYPES = [torch.float32, torch.bfloat16]

sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def _kernels_run():
    assert why_unavailable() is None


def operands_of(sizes, dtype=torch.float32, idx_dtype=torch.int64, idx=None):
    num_tokens, num_selected, num_rows, width, num_cores, num_blocks = sizes
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    shape = (num_tokens, num_selected)
    idx = torch.randint(num_rows, shape, generator=generator) if idx is None else idx
    block = torch.randint(num_blocks, shape, generator=generator).to(idx_dtype) if num_blocks > 1 else None
    return {
        "idx": idx.to(idx_dtype),
        "w": normal(*shape, num_cores),
        "x": normal(num_tokens, num_blocks * width),
        "table": normal(num_rows, width),
        "pre": normal(num_rows, 21),
        "u": normal(num_tokens, 21),
        "blocks": {"block_NK": block, "num_blocks": num_blocks},
        "cores": num_cores,
    }


# What each operator is called with, and which operands get gradients.
CALLS = {
    "bag": (lambda o, **k: bag(o["idx"], o["w"], o["table"], **o["blocks"], **k), ["w", "table"]),
    "gather_dot": (
        lambda o, **k: gather_dot(o["idx"], o["x"], o["table"], num_cores=o["cores"], **o["blocks"], **k),
        ["x", "table"],
    ),
    "scatter": (lambda o, **k: scatter(o["idx"], o["w"], o["x"], o["table"].shape[0], **o["blocks"], **k), ["w", "x"]),
    "pooled_read": (
        lambda o, **k: pooled_read(
            o["idx"], o["w"], o["table"], o["u"], o["pre"], activation="gelu", **o["blocks"], **k
        ),
        ["w", "table", "u", "pre"],
    ),
}
names = pytest.mark.parametrize("name", CALLS)


def run(name, operands, backend):
    """The output, the gradients of a sum of squares, and the output where no gradient is wanted."""
    call, wanted = CALLS[name]
    out = call(operands, backend=backend)
    gradients = torch.autograd.grad(out.float().square().sum(), [operands[key] for key in wanted])
    with torch.no_grad():
        return [out.detach(), *gradients, call(operands, backend=backend)]


def assert_equals_reference(name, operands, dtype):
    expected = run(name, operands, "reference")
    for ours, theirs in zip(run(name, operands, "cpu"), expected, strict=True):
        assert ours.dtype == theirs.dtype
        # Sums over many rows: relative to the largest, since what cancels has no relative accuracy.
        scale = theirs.abs().max().clamp(min=1).item() if theirs.numel() else 1
        assert_close(ours / scale, theirs / scale, dtype)


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
@sizes
@dtypes
@names
def test_outputs_and_gradients_are_the_references(name, dtype, sizes, idx_dtype, poisoned_memory):
    assert_equals_reference(name, operands_of(sizes, dtype, idx_dtype), dtype)


@dtypes
@names
def test_a_row_may_repeat_within_a_token_and_be_everybodys(name, dtype, poisoned_memory):
    idx = torch.full((40, 9), 3)
    assert_equals_reference(name, operands_of((40, 9, 5, 33, 1, 1), dtype, idx=idx), dtype)


@pytest.mark.parametrize("sizes", [(0, 3, 5, 4, 2, 1), (0, 3, 5, 4, 2, 4), (3, 0, 5, 4, 2, 1)], ids=str)
@names
def test_no_tokens_and_no_slots(name, sizes, poisoned_memory):
    assert_equals_reference(name, operands_of(sizes), torch.float32)


@names
def test_operands_need_not_be_contiguous(name):
    operands = operands_of((6, 5, 20, 32, 1, 1))
    operands["idx"] = operands["idx"].T.contiguous().T
    for key in ("w", "x", "u"):
        operands[key] = torch.stack([operands[key].detach()] * 2, -1)[..., 0].requires_grad_()
    for key in ("table", "pre"):
        wide = torch.cat([operands[key].detach()] * 2, 1)
        operands[key] = wide[:, : wide.shape[1] // 2].requires_grad_()
    assert_equals_reference(name, operands, torch.float32)
    operands["table"] = operands["table"].detach().T.contiguous().T.requires_grad_()
    assert_equals_reference(name, operands, torch.float32)


@dtypes
def test_operands_of_another_precision_than_the_table(dtype):
    operands = operands_of((6, 5, 20, 32, 2, 1), dtype)
    for key in ("w", "x"):
        operands[key] = operands[key].detach().to(torch.float32 if dtype == torch.bfloat16 else torch.bfloat16)
        operands[key].requires_grad_()
    for name in ("bag", "gather_dot", "scatter"):
        assert_equals_reference(name, operands, torch.bfloat16)


@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
@pytest.mark.parametrize("num_blocks", [1, 4])
def test_the_fused_read_is_its_composition(activation, num_blocks, poisoned_memory):
    o = operands_of((21, 13, 30, 48, 2, num_blocks))
    with torch.no_grad():
        fused, composed = (
            pooled_read(o["idx"], o["w"], o["table"], o["u"], o["pre"], activation=activation, **o["blocks"], backend=b)
            for b in ("cpu", "reference")
        )
    assert_close(fused, composed)


def test_the_fused_read_compiles_without_a_graph_break(fresh_compiler):
    o = {
        key: value.detach() if isinstance(value, torch.Tensor) else value
        for key, value in operands_of(SIZES[5]).items()
    }
    call = CALLS["pooled_read"][0]
    assert_close(torch.compile(lambda: call(o), backend="aot_eager", fullgraph=True)(), call(o))


def test_the_fused_read_names_tables_that_do_not_fit():
    o = operands_of(SIZES[0])
    with pytest.raises(ValueError, match=r"a row for each of the 11 values; got \(5, 21\) and \(10, 21\)"):
        pooled_read(o["idx"], o["w"], o["table"], o["u"], o["pre"][:10])


def test_the_fused_read_counts_the_flops_of_its_parts():
    o = operands_of(SIZES[1])
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            CALLS["pooled_read"][0](o)
        assert counter.get_total_flops() == 2 * 7 * 4 * (34 + 21)


@names
@dtypes
def test_bits_do_not_depend_on_the_number_of_threads(name, dtype):
    # Large enough to be shared out, with rows that several threads' entries belong to.
    idx = torch.randint(60, (700, 24), generator=torch.Generator().manual_seed(1))
    operands = operands_of((700, 24, 100, 70, 2, 1), dtype, idx=idx)
    results = []
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(run(name, operands, "cpu"))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        for ours, theirs in zip(others, results[0], strict=True):
            assert_bit_equal(ours, theirs)


@pytest.mark.parametrize("num_blocks", [1, 4])
def test_rows_of_gradients_are_summed_over_contributions(num_blocks):
    o = operands_of((50, 6, 90, 40, 2, num_blocks))
    dense = {}
    collectors = {}
    for backend in ("cpu", "reference"):
        collector = RowGradients(90, 40)
        for _ in range(3):
            bag(o["idx"], o["w"], o["table"], **o["blocks"], row_gradients=collector, backend=backend).sum().backward()
            out = gather_dot(o["idx"], o["x"], o["table"], **o["blocks"], row_gradients=collector, backend=backend)
            out.square().sum().backward()
        collectors[backend] = collector
        dense[backend] = collector.coalesce()
    assert_bit_equal(dense["cpu"][0], dense["reference"][0])
    assert_close(dense["cpu"][1] / 100, dense["reference"][1] / 100)
    assert {part.backend for part in collectors["cpu"].contributions} == {"cpu"}


@pytest.mark.parametrize("wrong", [-1, 11, 2**31 - 1])
@names
def test_an_index_outside_the_table_is_refused(name, wrong):
    operands = operands_of(SIZES[0])
    operands["idx"][2, 1] = wrong
    with torch.no_grad(), pytest.raises(IndexError, match=r"an index is out of range; the number of rows is 11"):
        CALLS[name][0](operands, backend="cpu")


@pytest.mark.parametrize("wrong", [-1, 4])
@names
def test_a_block_outside_the_expansion_is_refused(name, wrong):
    operands = operands_of(SIZES[2])
    operands["blocks"]["block_NK"][1, 2] = wrong
    with torch.no_grad(), pytest.raises(IndexError, match=r"a block is out of range; the number of blocks is 4"):
        CALLS[name][0](operands, backend="cpu")


def test_a_large_dense_gradient_is_zero_where_no_token_looked():
    """Past the size at which its pages are mapped on demand."""
    gradient = scatter(torch.tensor([[3, 70_000]]), torch.ones(1, 2), torch.ones(1, 64), 80_000, backend="cpu")
    assert gradient[3].tolist() == gradient[70_000].tolist() == [1.0] * 64
    assert gradient.sum() == 128
    gradient += 1
    assert gradient.sum() == 128 + gradient.numel()


@pytest.mark.parametrize("width", [33, 64])
def test_large_gradients_are_the_references(width):
    """Those are written past the caches, rows that start anywhere among them."""
    generator = torch.Generator().manual_seed(5)
    idx = torch.randint(90_000, (5_000, 16), generator=generator)
    idx[:, 3], idx[7] = 70_000, 0
    w, x = (torch.randn(shape, generator=generator) for shape in ((5_000, 16), (5_000, width)))
    expected = scatter(idx, w, x, 90_000, backend="reference")
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(scatter(idx, w, x, 90_000, backend="cpu"))
            rows, sums = torch.ops.ultramem_cpu.sum_rows([idx], [w[..., None]], [x], [None], [1], 90_000, width)
            assert torch.equal(rows, idx.unique())
            assert_bit_equal(sums, results[0][rows])
    finally:
        torch.set_num_threads(before)
    assert_close(results[0] / 100, expected / 100)
    assert_bit_equal(results[1], results[0])
    assert_bit_equal(results[2], results[0])


def test_large_tables_are_held_in_huge_pages_once():
    keep = torch.ops.ultramem_cpu.keep_in_huge_pages
    table = torch.arange(20_000_000.0)
    expected = table[::4099].clone()
    asked = keep(table)
    assert asked in (0, *range(table.nbytes - 2**22, table.nbytes + 1))
    assert keep(table) == 0
    assert torch.equal(table[::4099], expected)
    assert keep(torch.ones(1000)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_narrower_vectors_pass_the_same_tests(capability):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "not slow", Path(__file__)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_memory_of_freed_gradients_is_zero_again():
    """Large gradients take over the memory of those before them, whatever was left there."""
    idx = torch.tensor([[3, 70_000, 3]])
    for value in (1.0, 2.0):
        gradient = scatter(idx, torch.full((1, 3), value), torch.ones(1, 32), 70_001, backend="cpu")
        expected = torch.zeros(70_001, 32)
        expected[3], expected[70_000] = 2 * value, value
        assert torch.equal(gradient, expected)
        gradient.fill_(torch.nan)
        del gradient


def test_a_gradient_in_use_keeps_its_memory():
    idx, w, x = torch.tensor([[5]]), torch.ones(1, 1), torch.ones(1, 32)
    gradients = [scatter(idx, w * i, x, 70_000, backend="cpu") for i in range(8)]
    for i, gradient in enumerate(gradients):
        assert gradient.sum() == 32 * i
