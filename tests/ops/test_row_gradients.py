"""The `rows` mode of table gradients: the same numbers as the dense mode, kept as (rows, row gradients)."""

import copy
import pickle

import pytest
import torch

from tolerances import assert_close
from ultramem.ops import RowGradients, bag, gather_dot

pytestmark = pytest.mark.usefixtures("backend")

# tokens, selected, rows, width, cores, blocks
SIZES = [(5, 3, 11, 6, 1, 1), (7, 4, 3, 6, 2, 1), (4, 5, 13, 6, 3, 4)]


def lookup(name, table, seed, sizes, collector=None, idx_dtype=torch.int64):
    """One lookup into ``table`` with its own operands; returns (loss, the operand that is not the table)."""
    num_tokens, num_selected, num_rows, width, num_cores, num_blocks = sizes
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(num_rows, (num_tokens, num_selected), generator=generator).to(idx_dtype)
    block = torch.randint(num_blocks, idx.shape, generator=generator) if num_blocks > 1 else None
    common = {"block_NK": block, "num_blocks": num_blocks, "row_gradients": collector}
    shape = (*idx.shape, num_cores) if name == "bag" else (num_tokens, num_blocks * width)
    operand = torch.randn(shape, generator=generator, dtype=torch.float64).to(table.dtype).requires_grad_()
    if name == "bag":
        out = bag(idx, operand, table, **common)
    else:
        out = gather_dot(idx, operand, table, num_cores=num_cores, **common)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(table.dtype)
    return (out * weight).sum(), operand


def densify(collector):
    rows, gradients = collector.coalesce()
    assert rows.dtype == torch.int64
    assert (rows[1:] > rows[:-1]).all()
    return torch.zeros(collector.num_rows, collector.width, dtype=gradients.dtype).index_copy(0, rows, gradients)


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", ["bag", "gather_dot"])
def test_rows_equal_the_dense_gradient(name, sizes, idx_dtype):
    dense = torch.randn(sizes[2:4], dtype=torch.float64, requires_grad=True)
    rows = dense.detach().clone().requires_grad_()
    collector = RowGradients(*rows.shape)
    losses, operands = zip(
        lookup(name, dense, 1, sizes, None, idx_dtype), lookup(name, rows, 1, sizes, collector, idx_dtype), strict=True
    )
    assert torch.equal(losses[0], losses[1])
    sum(losses).backward()
    assert rows.grad is None
    assert torch.equal(operands[0].grad, operands[1].grad)
    assert_close(densify(collector), dense.grad)


def test_contributions_add_up_over_operators_layers_and_micro_batches():
    sizes = (7, 4, 9, 6, 2, 1)
    dense = torch.randn(sizes[2:4], dtype=torch.float64, requires_grad=True)
    collector = RowGradients(*dense.shape)
    for micro_batch in range(2):
        for name in ("bag", "gather_dot"):
            for layer, blocks in enumerate((1, 4)):
                seed, shape = 10 * micro_batch + layer, (7 - micro_batch, 4, 9, 6, 2, blocks)
                lookup(name, dense, seed, shape)[0].backward()
                lookup(name, dense.detach(), seed, shape, collector)[0].backward()
    assert len(collector.contributions) == 8
    assert_close(densify(collector), dense.grad)


def test_coalescing_does_not_consume_and_clearing_forgets():
    table = torch.randn(5, 4)
    collector = RowGradients(5, 4)
    lookup("bag", table, 0, (3, 2, 5, 4, 1, 1), collector)[0].backward()
    first, second = collector.coalesce(), collector.coalesce()
    assert torch.equal(first[1], second[1])
    collector.clear()
    rows, gradients = collector.coalesce()
    assert (rows.shape, rows.dtype, gradients.shape) == ((0,), torch.int64, (0, 4))
    lookup("bag", table, 0, (3, 2, 5, 4, 1, 1), collector)[0].backward()
    assert torch.equal(collector.coalesce()[1], first[1])


@pytest.mark.parametrize("name", ["bag", "gather_dot"])
def test_the_table_learns_where_nothing_else_does(name):
    """The operand is frozen: only the collector keeps the lookup on the tape."""
    collector = RowGradients(5, 4)
    idx, table = torch.tensor([[1, 4], [4, 4]]), torch.zeros(5, 4, requires_grad=True)
    if name == "bag":
        out = bag(idx, torch.ones(2, 2), table, row_gradients=collector)
    else:
        out = gather_dot(idx, torch.ones(2, 4), table, row_gradients=collector)
    out.sum().backward()
    assert densify(collector).tolist() == [[0] * 4, [1] * 4, [0] * 4, [0] * 4, [3] * 4]
    assert table.grad is None


def test_nothing_is_collected_without_grad():
    collector = RowGradients(5, 4)
    with torch.no_grad():
        loss, _ = lookup("bag", torch.zeros(5, 4), 0, (3, 2, 5, 4, 1, 1), collector)
    assert not loss.requires_grad
    assert collector.contributions == []


def test_an_empty_batch_contributes_no_rows():
    collector = RowGradients(5, 4)
    lookup("bag", torch.randn(5, 4), 0, (0, 2, 5, 4, 1, 1), collector)[0].backward()
    assert collector.coalesce()[0].shape == (0,)


def test_a_bf16_table_collects_fp32_rows():
    """257 ones on one row: a bf16 sum stops at 256."""
    collector = RowGradients(2, 4)
    out = bag(
        torch.ones(257, 1, dtype=torch.int64),
        torch.ones(257, 1, requires_grad=True),
        torch.zeros(2, 4, dtype=torch.bfloat16),
        row_gradients=collector,
    )
    out.sum().backward()
    rows, gradients = collector.coalesce()
    assert gradients.dtype == torch.float32
    assert (rows.tolist(), gradients.tolist()) == ([1], [[257.0] * 4])


def test_the_collector_does_not_keep_the_graph():
    collector = RowGradients(5, 4)
    loss, operand = lookup("bag", torch.randn(5, 4), 0, (3, 2, 5, 4, 1, 1), collector)
    torch.autograd.grad(loss, operand, create_graph=True)
    (part,) = collector.contributions
    assert not part.w_NKC.requires_grad
    assert not part.x_NV.requires_grad


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_collectors_can_be_copied(duplicate):
    collector = RowGradients(5, 4)
    lookup("bag", torch.randn(5, 4), 0, (3, 2, 5, 4, 1, 1), collector)[0].backward()
    copied = duplicate(collector)
    assert torch.equal(copied.coalesce()[1], collector.coalesce()[1])
    copied.clear()
    assert len(collector.contributions) == 1
    lookup("bag", torch.randn(5, 4), 0, (3, 2, 5, 4, 1, 1), copied)[0].backward()
    assert len(copied.contributions) == 1


def test_compiling_breaks_the_graph_around_the_lookup_and_collects_all_the_same():
    sizes = (5, 3, 11, 6, 2, 1)
    table = torch.randn(11, 6)
    eager, compiled = RowGradients(11, 6), RowGradients(11, 6)

    def loss(collector):
        return lookup("bag", table, 3, sizes, collector)[0] * 2

    loss(eager).backward()
    torch.compile(loss, backend="aot_eager")(compiled).backward()
    assert_close(densify(compiled), densify(eager))


def test_compiling_the_whole_graph_is_refused():
    idx, w, table = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3), torch.zeros(5, 4)
    collector = RowGradients(5, 4)
    compiled = torch.compile(lambda: bag(idx, w, table, row_gradients=collector), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="tap"):
        compiled()
