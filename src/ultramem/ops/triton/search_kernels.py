"""Triton kernels of the two-stage product_topk: the best keys of each side, the best pairs, their order and scores.

Nothing is sorted but the K results: the k-th largest score is found bit by bit by counting, at most 32 counts over
scores that stay in registers, and what reaches it is written in its order of appearance. Ties go to the first.
"""

import triton
import triton.language as tl

from ultramem.ops.triton.launch import configs

_WARPS = configs(({}, 4), ({}, 1), ({}, 2), ({}, 8), ({}, 16), ({}, 32))


def _fitting(tuned, _, **constants):
    """The configurations with at least one element a thread, and few enough that they stay in its registers."""
    elements = constants["BLOCK_M"] ** 2 if "BLOCK_M" in constants else constants.get("BLOCK_S", 0)
    elements = max(elements, constants.get("BLOCK_K", 0))
    return [config for config in tuned if 1 <= elements / (32 * config.num_warps) <= 32] or tuned[:1]


_PRUNED = {"early_config_prune": _fitting}


@triton.jit
def _ordered(score):
    """uint32 that compares as the float does; NaN is the largest, as in torch.topk."""
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _largest(key, valid, count):
    """1 for the ``count`` largest of the valid keys, for equal ones as far as there is room; and the room for those.

    Returns:
        above: 1 where a key is certainly among them; ties: 1 where it equals the smallest of them; room: how many of
        the ties are.
    """
    # Below every candidate.
    key = tl.where(valid, key, 0)
    threshold = tl.full([], 0, dtype=tl.uint32)
    bit = tl.full([], 2147483648, dtype=tl.uint32)
    reached = count + 1
    # As soon as as many as are wanted reach the candidate, the remaining bits say nothing.
    while (bit != 0) & (reached != count):
        candidate = threshold | bit
        number = tl.sum((key >= candidate).to(tl.int32))
        if number >= count:
            threshold = candidate
            reached = number
        bit = bit >> 1
    above = (valid & (key > threshold)).to(tl.int32)
    ties = (valid & (key == threshold)).to(tl.int32)
    return above, ties, count - tl.sum(above)


@triton.autotune(_WARPS, key=["side", "rank", "coarse_top_k"], prune_configs_by=_PRUNED, cache_results=True)
@triton.jit
def coarse_kernel(
    row_ptr,
    col_ptr,
    row_direction_ptr,
    col_direction_ptr,
    keys_ptr,
    num_heads,
    side,
    rank,
    coarse_top_k,
    HAS_DIRECTIONS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The coarse_top_k keys with the largest coarse scores of one side of one token and head, in ascending order."""
    program = tl.program_id(0)
    head, is_col = (program // 2) % num_heads, program % 2
    place = (program // 2).to(tl.int64)
    scores_ptr, direction_ptr = row_ptr, row_direction_ptr
    if is_col == 1:
        scores_ptr, direction_ptr = col_ptr, col_direction_ptr
    key = tl.arange(0, BLOCK_S)
    valid = key < side
    score = tl.full([BLOCK_S], 0.0, dtype=tl.float32)
    for axis in range(rank):
        part = tl.load(scores_ptr + (place * side + key) * rank + axis, mask=valid, other=0.0)
        if HAS_DIRECTIONS:
            part = part * tl.load(direction_ptr + head * rank + axis)
        score += part
    above, ties, room = _largest(_ordered(score), valid, coarse_top_k)
    kept = (above + ties * (tl.cumsum(ties) <= room).to(tl.int32)) > 0
    position = tl.cumsum(kept.to(tl.int32)) - 1
    tl.store(keys_ptr + program.to(tl.int64) * coarse_top_k + position, key, mask=kept)


@triton.jit
def _turned(row_ptr, core_ptr, row_start, in_side, rank, q):
    """Entry q of rᵀ A for the row keys whose scores begin at ``row_start``; A is the core at ``core_ptr``."""
    turned = row_start.to(tl.float32) * 0.0
    for p in range(rank):
        turned += tl.load(row_ptr + row_start + p, mask=in_side, other=0.0) * tl.load(core_ptr + p * rank + q)
    return turned


@triton.autotune(_WARPS, key=["rank", "coarse_top_k", "top_k"], prune_configs_by=_PRUNED, cache_results=True)
@triton.jit
def pairs_kernel(
    row_ptr,
    col_ptr,
    core_ptr,
    keys_ptr,
    found_ptr,
    num_heads,
    side,
    rank,
    coarse_top_k,
    top_k,
    HAS_CORES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The top_k of the pairs of kept keys of one token and head: their places in the m × m grid, unordered."""
    program = tl.program_id(0)
    place, head = program.to(tl.int64), program % num_heads
    i = tl.arange(0, BLOCK_M)
    in_side = i < coarse_top_k
    row_start = (place * side + tl.load(keys_ptr + 2 * place * coarse_top_k + i, mask=in_side, other=0)) * rank
    col_start = (place * side + tl.load(keys_ptr + (2 * place + 1) * coarse_top_k + i, mask=in_side, other=0)) * rank
    if HAS_CORES:
        score = tl.full([BLOCK_M, BLOCK_M], 0.0, dtype=tl.float32)
        for q in range(rank):
            turned = _turned(row_ptr, core_ptr + head * rank * rank, row_start, in_side, rank, q)
            score += turned[:, None] * tl.load(col_ptr + col_start + q, mask=in_side, other=0.0)[None, :]
    else:
        row = tl.load(row_ptr + row_start, mask=in_side, other=0.0)
        score = row[:, None] + tl.load(col_ptr + col_start, mask=in_side, other=0.0)[None, :]
    above, ties, room = _largest(_ordered(score), in_side[:, None] & in_side[None, :], top_k)
    if tl.sum(ties) > room:
        ties = ties * (_order_of_appearance(ties) < room).to(tl.int32)
    kept = above + ties
    pair = i[:, None] * coarse_top_k + i[None, :]
    tl.store(found_ptr + place * top_k + _order_of_appearance(kept), pair, mask=kept > 0)


@triton.jit
def _order_of_appearance(marked):
    """For each marked element of a matrix how many marked ones come before it, row by row."""
    in_row = tl.sum(marked, axis=1)
    before = tl.cumsum(in_row) - in_row
    return before[:, None] + tl.cumsum(marked, axis=1) - marked


@triton.autotune(_WARPS, key=["rank", "num_cores", "top_k"], prune_configs_by=_PRUNED, cache_results=True)
@triton.jit
def rank_kernel(
    row_ptr,
    col_ptr,
    core_ptr,
    cores_ptr,
    keys_ptr,
    found_ptr,
    scores_ptr,
    slots_ptr,
    num_heads,
    side,
    rank,
    coarse_top_k,
    top_k,
    num_cores,
    HAS_CORES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Bring the found pairs of one token and head into descending order; write their slots and each core's scores."""
    program = tl.program_id(0)
    place, head = program.to(tl.int64), program % num_heads
    k = tl.arange(0, BLOCK_K)
    in_k = k < top_k
    rows_ptr, cols_ptr = keys_ptr + 2 * place * coarse_top_k, keys_ptr + (2 * place + 1) * coarse_top_k
    pair = tl.load(found_ptr + place * top_k + k, mask=in_k, other=0)
    row_start = (place * side + tl.load(rows_ptr + pair // coarse_top_k)) * rank
    col_start = (place * side + tl.load(cols_ptr + pair % coarse_top_k)) * rank
    if HAS_CORES:
        score = tl.full([BLOCK_K], 0.0, dtype=tl.float32)
        for q in range(rank):
            turned = _turned(row_ptr, core_ptr + head * rank * rank, row_start, in_k, rank, q)
            score += turned * tl.load(col_ptr + col_start + q)
    else:
        score = tl.load(row_ptr + row_start) + tl.load(col_ptr + col_start)
    # As signed numbers, which is how they are sorted, in the order of the unsigned ones; of equal scores the first.
    packed = ((_ordered(score).to(tl.int64) - 2147483648) << 32) | (0x7FFFFFFF - pair).to(tl.int64)
    # What pads the block sorts last: no packed score is that small.
    packed = tl.where(in_k, packed, -9223372036854775808)
    pair = tl.where(in_k, 0x7FFFFFFF - (tl.sort(packed, descending=True) & 0x7FFFFFFF).to(tl.int32), 0)
    row_key, col_key = tl.load(rows_ptr + pair // coarse_top_k), tl.load(cols_ptr + pair % coarse_top_k)
    tl.store(slots_ptr + place * top_k + k, row_key.to(tl.int64) * side + col_key, mask=in_k)
    row_start, col_start = (place * side + row_key) * rank, (place * side + col_key) * rank
    out = scores_ptr + (place * top_k + k) * num_cores
    if HAS_CORES:
        for core in range(num_cores):
            score = tl.full([BLOCK_K], 0.0, dtype=tl.float32)
            for q in range(rank):
                turned = _turned(row_ptr, cores_ptr + (core * num_heads + head) * rank * rank, row_start, in_k, rank, q)
                score += turned * tl.load(col_ptr + col_start + q)
            tl.store(out + core, score, mask=in_k)
    else:
        tl.store(out, tl.load(row_ptr + row_start) + tl.load(col_ptr + col_start), mask=in_k)


@triton.autotune(
    configs(
        ({"BLOCK_S": 32, "BLOCK_K": 32}, 4), ({"BLOCK_S": 64, "BLOCK_K": 32}, 4), ({"BLOCK_S": 128, "BLOCK_K": 16}, 4)
    ),
    key=["side", "rank", "top_k"],
    cache_results=True,
)
@triton.jit
def put_keys_kernel(
    grad_ptr,
    keys_ptr,
    out_ptr,
    side,
    rank,
    top_k,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over the slots of BLOCK_S keys of one token and head: each key looks for itself, so that none collide."""
    num_tiles = (side + BLOCK_S - 1) // BLOCK_S
    program = tl.program_id(0)
    place = (program // num_tiles).to(tl.int64)
    key = program % num_tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    for axis in range(rank):
        total = tl.full([BLOCK_S], 0.0, dtype=tl.float32)
        for start in range(0, top_k, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            slot = place * top_k + k
            selected = tl.load(keys_ptr + slot, mask=k < top_k, other=-1)
            part = tl.load(grad_ptr + slot * rank + axis, mask=k < top_k, other=0.0)
            total += tl.sum(tl.where(key[:, None] == selected[None, :], part[None, :], 0.0), axis=1)
        tl.store(out_ptr + (place * side + key) * rank + axis, total, mask=key < side)
