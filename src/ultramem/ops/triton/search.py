"""The two-stage product_topk and the sums that its gradient needs, by Triton kernels; results are the reference's."""

import torch
import triton
from torch import Tensor

from ultramem.ops.triton.launch import contiguous, launch
from ultramem.ops.triton.search_kernels import coarse_kernel, pairs_kernel, put_keys_kernel, rank_kernel

# The pairs of one token and head live in the registers of one program, its results in one sort.
MAXIMUM_COARSE_TOP_K = 128
MAXIMUM_TOP_K = 2048
MAXIMUM_SIDE = 16384


def fits(row_scores_NHSr: Tensor, top_k: int, coarse_top_k: int, search: str) -> bool:
    """Whether the kernels do a search: the two-stage one in fp32, up to 128 keys kept a side and 2,048 slots."""
    return (
        search == "two_stage"
        and row_scores_NHSr.dtype == torch.float32
        and coarse_top_k <= MAXIMUM_COARSE_TOP_K
        and top_k <= MAXIMUM_TOP_K
        and row_scores_NHSr.shape[2] <= MAXIMUM_SIDE
    )


def product_topk(
    row_scores_NHSr: Tensor,
    col_scores_NHSr: Tensor,
    cores_CHrr: Tensor | None,
    row_direction_Hr: Tensor | None,
    col_direction_Hr: Tensor | None,
    top_k: int,
    coarse_top_k: int,
) -> tuple[Tensor, Tensor]:
    """`ultramem.ops.product_topk` with the two-stage search in fp32, for sizes that `fits` allows.

    Returns:
        scores [N, H, K, C] in fp32, in descending order of their sum over cores; slots [N, H, K] int64.
    """
    num_tokens, num_heads, side, rank = row_scores_NHSr.shape
    num_cores = 1 if cores_CHrr is None else cores_CHrr.shape[0]
    core_Hrr = None if cores_CHrr is None else cores_CHrr.sum(0)
    row, col, cores, core, row_direction, col_direction = contiguous(
        [row_scores_NHSr, col_scores_NHSr, cores_CHrr, core_Hrr, row_direction_Hr, col_direction_Hr]
    )
    places = num_tokens * num_heads
    keys = row_scores_NHSr.new_empty(places, 2, coarse_top_k, dtype=torch.int32)
    found = row_scores_NHSr.new_empty(places, top_k, dtype=torch.int32)
    scores = row_scores_NHSr.new_empty(num_tokens, num_heads, top_k, num_cores)
    slots = row_scores_NHSr.new_empty(num_tokens, num_heads, top_k, dtype=torch.int64)
    launch(
        coarse_kernel,
        lambda _: 2 * places,
        scores,
        *(row, col, row_direction, col_direction, keys, num_heads, side, rank, coarse_top_k),
        HAS_DIRECTIONS=row_direction is not None,
        BLOCK_S=triton.next_power_of_2(side),
    )
    launch(
        pairs_kernel,
        lambda _: places,
        scores,
        *(row, col, core, keys, found, num_heads, side, rank, coarse_top_k, top_k),
        HAS_CORES=core is not None,
        BLOCK_M=triton.next_power_of_2(coarse_top_k),
    )
    launch(
        rank_kernel,
        lambda _: places,
        scores,
        *(row, col, core, cores, keys, found, scores, slots, num_heads, side, rank, coarse_top_k, top_k, num_cores),
        HAS_CORES=cores is not None,
        BLOCK_K=triton.next_power_of_2(top_k),
    )
    return scores, slots


def put_keys(gradient_NHKr: Tensor, keys_NHK: Tensor, side: int) -> Tensor:
    """Sums of the slots' gradients over equal keys, [N, H, S, r], without atomic additions."""
    num_tokens, num_heads, top_k, rank = gradient_NHKr.shape
    gradient, keys = contiguous([gradient_NHKr.float(), keys_NHK])
    out = gradient_NHKr.new_empty(num_tokens, num_heads, side, rank)
    launch(
        put_keys_kernel,
        lambda blocks: num_tokens * num_heads * triton.cdiv(side, blocks["BLOCK_S"]),
        out,
        *(gradient, keys, out, side, rank, top_k),
    )
    return out
