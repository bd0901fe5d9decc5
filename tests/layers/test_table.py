"""Ring windows and the pool of rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tolerances import assert_close
from ultramem.errors import ConfigError
from ultramem.layers import MemoryPool, RingWindow
from ultramem.layers.table import window_side
from ultramem.ops import bag, gather_dot


def test_a_window_wraps_around_the_ring():
    window = RingWindow(offset=7, size=5, num_rows=9)
    virtual = torch.tensor([[0, 1, 2, 3, 4, 5, 9, 14]], dtype=torch.int32)
    rows = window.physical_rows(virtual, num_blocks=3)
    assert rows.tolist() == [[7, 8, 0, 1, 2, 7, 2, 2]]
    assert rows.dtype == torch.int64


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.data())
def test_a_windows_rows_are_distinct_and_each_is_read_by_every_block(num_keys, num_memories, expansion, data):
    num_rows = num_memories * num_keys**2
    side = data.draw(st.integers(num_keys, int(num_rows**0.5)))
    offset = data.draw(st.integers(0, num_memories - 1)) * num_keys**2
    window = RingWindow(offset, side**2, num_rows)
    rows = window.physical_rows(torch.arange(expansion**2 * side**2), expansion**2)
    blocks = rows.view(expansion**2, side**2)
    assert (blocks == blocks[0]).all()
    assert blocks[0].tolist() == [(offset + row) % num_rows for row in range(side**2)]
    assert len(set(blocks[0].tolist())) == side**2


@pytest.mark.parametrize(
    ("num_keys", "num_memories", "share_ratio", "side"),
    [
        (12, 3, 1.0, 20),  # the published fixtures
        (12, 4, 0.5, 16),
        (360, 20, 0.5, 1138),  # the published 227M run
        (528, 16, 1 / 16, 528),
        (12, 3, None, 12),
        (12, 3, 1, 20),
        (1, 1, 1.0, 1),
    ],
)
def test_the_side_of_a_window(num_keys, num_memories, share_ratio, side):
    assert window_side(num_keys, num_memories, share_ratio) == side


@given(st.integers(1, 2000), st.integers(1, 128))
def test_a_share_of_one_over_the_layers_is_a_private_window(num_keys, num_memories):
    """1/3 of 3·n² is a little less than n² in floating point."""
    assert window_side(num_keys, num_memories, 1 / num_memories) == num_keys


@given(st.integers(1, 300), st.integers(1, 40), st.floats(0, 1, exclude_min=True))
def test_a_window_never_exceeds_its_share(num_keys, num_memories, share_ratio):
    side, share = window_side(num_keys, num_memories, share_ratio), share_ratio * num_memories * num_keys**2
    assert side**2 <= share + 1e-6
    assert (side + 1) ** 2 > share - 1e-6
    assert side**2 <= num_memories * num_keys**2


def test_a_pool_draws_its_rows_with_the_given_standard_deviation():
    pool = MemoryPool(400, 24, 12, std=0.3)
    for table in (pool.values, pool.pre_values):
        assert table.mean().item() == pytest.approx(0, abs=0.02)
        assert table.std().item() == pytest.approx(0.3, rel=0.05)
    assert not torch.equal(pool.values[:, :12], pool.pre_values)
    assert MemoryPool(4, 3).pre_values is None


def test_a_pool_reads_with_the_operators():
    pool = MemoryPool(9, 6, 4, std=1.0).double()
    rows, scores = torch.randint(9, (5, 3)), torch.randn(5, 3, 2, dtype=torch.float64)
    block, x = torch.randint(4, (5, 3)), torch.randn(5, 4, dtype=torch.float64)
    weights = scores * gather_dot(rows, x, pool.pre_values).relu()[..., None]
    read = pool.read(rows, scores, x, "relu", block, 4)
    assert_close(read, bag(rows, weights, pool.values, block_NK=block, num_blocks=4))
    pool.pre_values = None
    assert_close(pool.read(rows, scores), bag(rows, scores, pool.values))


def test_the_mode_of_table_gradients_can_be_switched():
    pool = MemoryPool(9, 6, 4, std=1.0, table_gradients="rows")
    assert pool.pre_value_gradients.width == 4
    pool = MemoryPool(9, 6, std=1.0, table_gradients="rows")
    rows, w = torch.tensor([[2, 2, 5]]), torch.ones(1, 3)
    pool.read(rows, w).sum().backward()
    assert pool.values.grad is None
    assert pool.value_gradients.coalesce()[0].tolist() == [2, 5]
    assert (pool.value_gradients.num_rows, pool.value_gradients.width) == (9, 6)
    pool.set_table_gradients("dense")
    assert pool.value_gradients is pool.pre_value_gradients is None
    pool.read(rows, w).sum().backward()
    assert pool.values.grad[2].tolist() == [2.0] * 6


def test_an_unknown_mode_of_table_gradients_is_refused():
    with pytest.raises(ConfigError, match="table_gradients must be one of dense, rows; got 'sparse'"):
        MemoryPool(9, 6, table_gradients="sparse")


def test_casting_or_moving_a_pool_keeps_its_collectors():
    pool = MemoryPool(9, 6, std=1.0, table_gradients="rows").bfloat16()
    pool.read(torch.tensor([[2]]), torch.ones(1, 1)).sum().backward()
    assert pool.value_gradients.coalesce()[0].tolist() == [2]
