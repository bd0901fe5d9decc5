"""Triton kernels of the two-stage product_topk: the best keys of each side, the best pairs, their order and scores.

Nothing is sorted but the K results: the k-th largest score is found bit by bit by counting, 32 counts over scores that
stay in registers, and what reaches it is written in its order of appearance. Ties go to the first.
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
    """int32 that compares as the float does; NaN is the largest, as in torch.topk."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _threshold(key, valid, count):
    """The ``count``-th largest of the valid keys: int64, found from the highest bit down."""
    lowest = tl.full([], -2147483648, dtype=tl.int64)
    bit = tl.full([], 2147483648, dtype=tl.int64)
    for _ in range(32):
        candidate = lowest + bit
        reached = tl.sum((valid & (key >= candidate)).to(tl.int32))
        lowest = tl.where(reached >= count, candidate, lowest)
        bit = bit >> 1
    return lowest


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
    ordered = _ordered(score)
    threshold = _threshold(ordered, valid, coarse_top_k)
    above = (valid & (ordered > threshold)).to(tl.int32)
    ties = (valid & (ordered == threshold)).to(tl.int32)
    kept = (above + ties * (tl.cumsum(ties) <= coarse_top_k - tl.sum(above)).to(tl.int32)) > 0
    position = tl.cumsum(kept.to(tl.int32)) - 1
    tl.store(keys_ptr + program.to(tl.int64) * coarse_top_k + position, key, mask=kept)


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
    """The top_k of the pairs of kept keys of one token and head, unordered.

    Each is written as one int64 that sorts by score and holds, inverted, the pair's place in the m × m grid.
    """
    program = tl.program_id(0)
    place, head = program.to(tl.int64), program % num_heads
    i = tl.arange(0, BLOCK_M)
    in_side = i < coarse_top_k
    row_start = (place * side + tl.load(keys_ptr + 2 * place * coarse_top_k + i, mask=in_side, other=0)) * rank
    col_start = (place * side + tl.load(keys_ptr + (2 * place + 1) * coarse_top_k + i, mask=in_side, other=0)) * rank
    if HAS_CORES:
        score = tl.full([BLOCK_M, BLOCK_M], 0.0, dtype=tl.float32)
        for q in range(rank):
            turned = tl.full([BLOCK_M], 0.0, dtype=tl.float32)
            for p in range(rank):
                weight = tl.load(core_ptr + (head * rank + p) * rank + q)
                turned += tl.load(row_ptr + row_start + p, mask=in_side, other=0.0) * weight
            score += turned[:, None] * tl.load(col_ptr + col_start + q, mask=in_side, other=0.0)[None, :]
    else:
        row = tl.load(row_ptr + row_start, mask=in_side, other=0.0)
        score = row[:, None] + tl.load(col_ptr + col_start, mask=in_side, other=0.0)[None, :]
    ordered = _ordered(score)
    valid = in_side[:, None] & in_side[None, :]
    threshold = _threshold(ordered, valid, top_k)
    above = (valid & (ordered > threshold)).to(tl.int32)
    ties = (valid & (ordered == threshold)).to(tl.int32)
    kept = above + ties * (_order_of_appearance(ties) < top_k - tl.sum(above)).to(tl.int32)
    pair = i[:, None] * coarse_top_k + i[None, :]
    packed = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - pair).to(tl.int64)
    tl.store(found_ptr + place * top_k + _order_of_appearance(kept), packed, mask=kept > 0)


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
    # What pads the block sorts last: no packed score is that small.
    packed = tl.load(found_ptr + place * top_k + k, mask=in_k, other=-9223372036854775808)
    pair = 0x7FFFFFFF - (tl.sort(packed, descending=True) & 0x7FFFFFFF).to(tl.int32)
    pair = tl.where(in_k, pair, 0)
    row_key = tl.load(keys_ptr + 2 * place * coarse_top_k + pair // coarse_top_k)
    col_key = tl.load(keys_ptr + (2 * place + 1) * coarse_top_k + pair % coarse_top_k)
    tl.store(slots_ptr + place * top_k + k, row_key.to(tl.int64) * side + col_key, mask=in_k)
    row_start, col_start = (place * side + row_key) * rank, (place * side + col_key) * rank
    out = scores_ptr + (place * top_k + k) * num_cores
    if HAS_CORES:
        for core in range(num_cores):
            score = tl.full([BLOCK_K], 0.0, dtype=tl.float32)
            for q in range(rank):
                turned = tl.full([BLOCK_K], 0.0, dtype=tl.float32)
                for p in range(rank):
                    weight = tl.load(cores_ptr + ((core * num_heads + head) * rank + p) * rank + q)
                    turned += tl.load(row_ptr + row_start + p) * weight
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
