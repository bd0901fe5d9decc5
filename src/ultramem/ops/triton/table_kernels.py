"""Triton kernels of gather_dot, bag and scatter: rows of a table read or written once, with sums in fp32.

Shapes and names as in the operators' references: N tokens, K slots, C cores, E blocks; a row has ``width`` columns, of
which each core has ``slice_width``. Programs lie in one dimension, tokens slowest, so that no grid limit is met and
programs of one token, which share its operands, run together. Row offsets are int64: tables pass 2³¹ elements.
"""

import triton
import triton.language as tl

from ultramem.ops.triton.launch import configs

# A token has K·C results and reads K rows: programs split its slots. Tiles of few slots and wide rows load whole
# cache lines and leave many programs in flight, which is what hides the latency of scattered rows.
_GATHER_DOT = configs(
    ({"BLOCK_K": 16, "BLOCK_V": 128}, 4),
    ({"BLOCK_K": 8, "BLOCK_V": 128}, 2),
    ({"BLOCK_K": 8, "BLOCK_V": 256}, 4),
    ({"BLOCK_K": 32, "BLOCK_V": 64}, 4),
    ({"BLOCK_K": 32, "BLOCK_V": 128}, 8),
    ({"BLOCK_K": 4, "BLOCK_V": 512}, 4),
)
# A token has E·V results and sums over slots: programs split its columns.
_BAG = configs(
    ({"BLOCK_K": 16, "BLOCK_V": 128}, 4),
    ({"BLOCK_K": 32, "BLOCK_V": 64}, 4),
    ({"BLOCK_K": 32, "BLOCK_V": 128}, 8),
    ({"BLOCK_K": 8, "BLOCK_V": 256}, 4),
    ({"BLOCK_K": 8, "BLOCK_V": 128}, 2),
    ({"BLOCK_K": 64, "BLOCK_V": 32}, 4),
)
# Most runs are short: the rows of several side by side are what is in flight.
_SEGMENT_SUM = configs(
    ({"BLOCK_R": 4, "BLOCK_V": 128}, 2),
    ({"BLOCK_R": 8, "BLOCK_V": 128}, 4),
    ({"BLOCK_R": 4, "BLOCK_V": 256}, 4),
    ({"BLOCK_R": 8, "BLOCK_V": 64}, 2),
    ({"BLOCK_R": 16, "BLOCK_V": 64}, 4),
    ({"BLOCK_R": 2, "BLOCK_V": 512}, 4),
    ({"BLOCK_R": 1, "BLOCK_V": 256}, 1),
    ({"BLOCK_R": 1, "BLOCK_V": 512}, 2),
)
_SHAPE = ["num_selected", "slice_width", "FEW_TOKENS"]


@triton.autotune(_GATHER_DOT, key=_SHAPE, cache_results=True)
@triton.jit
def gather_dot_kernel(
    idx_ptr,
    x_ptr,
    table_ptr,
    block_ptr,
    out_ptr,
    num_selected,
    num_rows,
    slice_width,
    num_cores,
    num_blocks,
    HAS_BLOCKS: tl.constexpr,
    FEW_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Dot products of one token with BLOCK_K of its rows, slice by slice."""
    num_tiles = (num_selected + BLOCK_K - 1) // BLOCK_K
    token = (tl.program_id(0) // num_tiles).to(tl.int64)
    k = (tl.program_id(0) % num_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < num_selected
    slot = token * num_selected + k
    width = slice_width * num_cores
    row = tl.load(idx_ptr + slot, mask=in_k, other=0).to(tl.int64)
    tl.device_assert((row >= 0) & (row < num_rows), "gather_dot: an index lies outside the table")
    x_start = token * num_blocks * width
    if HAS_BLOCKS:
        x_starts = x_start + tl.load(block_ptr + slot, mask=in_k, other=0).to(tl.int64) * width
    for core in range(num_cores):
        total = tl.full([BLOCK_K, BLOCK_V], 0.0, dtype=tl.float32)
        for start in range(0, slice_width, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            in_v = column < slice_width
            column += core * slice_width
            in_tile = in_k[:, None] & in_v[None, :]
            rows = tl.load(table_ptr + row[:, None] * width + column[None, :], mask=in_tile, other=0.0)
            if HAS_BLOCKS:
                x = tl.load(x_ptr + x_starts[:, None] + column[None, :], mask=in_tile, other=0.0)
                total += rows.to(tl.float32) * x.to(tl.float32)
            else:
                x = tl.load(x_ptr + x_start + column, mask=in_v, other=0.0)
                total += rows.to(tl.float32) * x.to(tl.float32)[None, :]
        dots = tl.sum(total, axis=1)
        tl.store(out_ptr + slot * num_cores + core, dots.to(out_ptr.dtype.element_ty), mask=in_k)


@triton.autotune(_BAG, key=_SHAPE, cache_results=True)
@triton.jit
def bag_kernel(
    idx_ptr,
    w_ptr,
    table_ptr,
    block_ptr,
    out_ptr,
    num_selected,
    num_rows,
    slice_width,
    num_cores,
    num_blocks,
    HAS_BLOCKS: tl.constexpr,
    FEW_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """BLOCK_V columns of one core's slice of one block of one token: the weighted sum of the token's rows there.

    Rows of other blocks are masked and so never read: E blocks read each row once between them.
    """
    num_tiles = (slice_width + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    column = (program % num_tiles) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = column < slice_width
    core = program // num_tiles % num_cores
    block = program // (num_tiles * num_cores) % num_blocks
    token = (program // (num_tiles * num_cores * num_blocks)).to(tl.int64)
    column += core * slice_width
    width = slice_width * num_cores
    total = tl.full([BLOCK_K, BLOCK_V], 0.0, dtype=tl.float32)
    for start in range(0, num_selected, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mine = k < num_selected
        slot = token * num_selected + k
        if HAS_BLOCKS:
            mine = mine & (tl.load(block_ptr + slot, mask=mine, other=-1) == block)
        row = tl.load(idx_ptr + slot, mask=mine, other=0).to(tl.int64)
        tl.device_assert((row >= 0) & (row < num_rows), "bag: an index lies outside the table")
        w = tl.load(w_ptr + slot * num_cores + core, mask=mine, other=0.0).to(tl.float32)
        in_tile = mine[:, None] & in_v[None, :]
        rows = tl.load(table_ptr + row[:, None] * width + column[None, :], mask=in_tile, other=0.0)
        total += w[:, None] * rows.to(tl.float32)
    pooled = tl.sum(total, axis=0)
    out = out_ptr + (token * num_blocks + block) * width + column
    tl.store(out, pooled.to(out_ptr.dtype.element_ty), mask=in_v)


@triton.autotune(_SEGMENT_SUM, key=_SHAPE, cache_results=True)
@triton.jit
def segment_sum_kernel(
    row_ptr,
    entry_ptr,
    w_ptr,
    x_ptr,
    block_ptr,
    out_ptr,
    partial_ptr,
    num_entries,
    num_rows,
    num_selected,
    slice_width,
    num_cores,
    num_blocks,
    HAS_BLOCKS: tl.constexpr,
    FEW_TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sum pieces of rows' entries, in their order, each into its row or into the piece's partial sum.

    ``row_ptr`` holds the rows of all (token, slot) entries in ascending order, ``entry_ptr`` which entry each one is. A
    row's entries are one run; a piece ends with its run or with its CHUNK of the list, so that a row that every token
    selected does not wait for one program. The run's first piece writes the row, a later one, which begins with its
    chunk, writes the chunk's partial sum. A program takes the pieces that begin at BLOCK_R places side by side.
    """
    num_tiles = (slice_width + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    column = (program % num_tiles) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = column < slice_width
    core = program // num_tiles % num_cores
    first = program // (num_tiles * num_cores) * BLOCK_R + tl.arange(0, BLOCK_R)
    column += core * slice_width
    width = slice_width * num_cores
    row = tl.load(row_ptr + first, mask=first < num_entries, other=-1)
    tl.device_assert((row < num_rows) & ((row >= 0) | (first >= num_entries)), "scatter: a row lies outside the table")
    starts_run = row != tl.load(row_ptr + first - 1, mask=(first > 0) & (first < num_entries), other=-1)
    goes_on = (first < num_entries) & (starts_run | (first % CHUNK == 0))
    out_mask, partial_mask = goes_on & starts_run, goes_on & (starts_run == 0)
    total = tl.full([BLOCK_R, BLOCK_V], 0.0, dtype=tl.float32)
    place = first
    # One entry after the other: the order of the sums depends on no block size.
    while tl.max(goes_on.to(tl.int32)) > 0:
        entry = tl.load(entry_ptr + place, mask=goes_on, other=0).to(tl.int64)
        x_start = entry // num_selected * num_blocks
        if HAS_BLOCKS:
            x_start += tl.load(block_ptr + entry, mask=goes_on, other=0).to(tl.int64)
        w = tl.load(w_ptr + entry * num_cores + core, mask=goes_on, other=0.0).to(tl.float32)
        x = tl.load(
            x_ptr + x_start[:, None] * width + column[None, :], mask=goes_on[:, None] & in_v[None, :], other=0.0
        )
        total += w[:, None] * x.to(tl.float32)
        place += 1
        goes_on = goes_on & (place < num_entries) & (place % CHUNK != 0)
        goes_on = goes_on & (tl.load(row_ptr + place, mask=goes_on, other=-1) == row)
    out = out_ptr + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out, total, mask=out_mask[:, None] & in_v[None, :])
    partial = partial_ptr + (first // CHUNK).to(tl.int64)[:, None] * width + column[None, :]
    tl.store(partial, total, mask=partial_mask[:, None] & in_v[None, :])


@triton.jit
def add_partials_kernel(
    row_ptr,
    out_ptr,
    partial_ptr,
    num_entries,
    width,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Add the partial sums of one row that spans several chunks; the program of its first later chunk does it."""
    num_tiles = (width + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    column = (program % num_tiles) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = column < width
    # Chunk 0 begins with the first run of all.
    first = (program // num_tiles + 1) * CHUNK
    row = tl.load(row_ptr + first)
    is_later = row == tl.load(row_ptr + first - 1)
    previous = first - CHUNK
    previous_is_later = (tl.load(row_ptr + previous) == row) & (
        tl.load(row_ptr + previous - 1, mask=previous > 0, other=-1) == row
    )
    if is_later & (previous_is_later == 0):
        out = out_ptr + row.to(tl.int64) * width + column
        total = tl.load(out, mask=in_v, other=0.0)
        unfinished = 1
        while unfinished > 0:
            begins = first + tl.arange(0, BLOCK_P) * CHUNK
            is_mine = begins < num_entries
            is_mine = is_mine & (tl.load(row_ptr + begins, mask=is_mine, other=-1) == row)
            partial = partial_ptr + (begins // CHUNK).to(tl.int64)[:, None] * width + column[None, :]
            total += tl.sum(tl.load(partial, mask=is_mine[:, None] & in_v[None, :], other=0.0), axis=0)
            first += BLOCK_P * CHUNK
            unfinished = tl.min(is_mine.to(tl.int32))
        tl.store(out, total, mask=in_v)
