"""gather_dot, bag and scatter by Triton kernels; signatures and results are those of the references."""

import torch
import triton
from torch import Tensor

from ultramem.ops.triton import interpreted
from ultramem.ops.triton.launch import FEW_TOKENS, check_range, contiguous, launch, stored_dtype
from ultramem.ops.triton.table_kernels import (
    add_partials_kernel,
    bag_kernel,
    gather_dot_kernel,
    segment_sum_kernel,
)

# A run of equal rows longer than this is summed by several programs.
_CHUNK_ENTRIES = 4 if interpreted() else 256
# Never tuned: their sizes decide the order of a sum that must repeat.
_PARTIAL_BLOCKS = {"BLOCK_P": 2, "BLOCK_V": 4} if interpreted() else {"BLOCK_P": 16, "BLOCK_V": 128}


def gather_dot(
    idx_NK: Tensor,
    x_NV: Tensor,
    table_RV: Tensor,
    block_NK: Tensor | None = None,
    num_blocks: int = 1,
    num_cores: int = 1,
) -> Tensor:
    """`ultramem.ops.gather_dot` on a device: [N, K, C] in the dtype of ``x_NV``. A wrong index is not caught there."""
    (num_tokens, num_selected), (num_rows, width) = idx_NK.shape, table_RV.shape
    _check_indices("gather_dot", idx_NK, num_rows, block_NK, num_blocks)
    idx, x, table, block = contiguous([idx_NK, x_NV, table_RV, block_NK])
    out = x_NV.new_empty(num_tokens, num_selected, num_cores, dtype=stored_dtype(x_NV.dtype))
    launch(
        gather_dot_kernel,
        lambda blocks: num_tokens * triton.cdiv(num_selected, blocks["BLOCK_K"]),
        out,
        *(idx, x, table, block, out, num_selected, num_rows, width // num_cores, num_cores, num_blocks),
        HAS_BLOCKS=block is not None,
        FEW_TOKENS=num_tokens < FEW_TOKENS,
    )
    return out.to(x_NV.dtype)


def bag(idx_NK: Tensor, w_NKC: Tensor, table_RV: Tensor, block_NK: Tensor | None = None, num_blocks: int = 1) -> Tensor:
    """`ultramem.ops.bag` on a device: [N, E·V] in the table's dtype. A wrong index is not caught there."""
    num_tokens, num_selected, num_cores = w_NKC.shape
    num_rows, width = table_RV.shape
    _check_indices("bag", idx_NK, num_rows, block_NK, num_blocks)
    idx, w, table, block = contiguous([idx_NK, w_NKC, table_RV, block_NK])
    out = table_RV.new_empty(num_tokens, num_blocks * width, dtype=stored_dtype(table_RV.dtype))
    slice_width = width // num_cores
    launch(
        bag_kernel,
        lambda blocks: num_tokens * num_blocks * num_cores * triton.cdiv(slice_width, blocks["BLOCK_V"]),
        out,
        *(idx, w, table, block, out, num_selected, num_rows, slice_width, num_cores, num_blocks),
        HAS_BLOCKS=block is not None,
        FEW_TOKENS=num_tokens < FEW_TOKENS,
    )
    return out.to(table_RV.dtype)


def scatter(
    idx_NK: Tensor,
    w_NKC: Tensor,
    x_NV: Tensor,
    num_rows: int,
    block_NK: Tensor | None = None,
    num_blocks: int = 1,
) -> Tensor:
    """`ultramem.ops.scatter` on a device: [R, V] in fp32. A wrong index is not caught there.

    Entries are sorted by row, and each row is summed in the order of its tokens and slots: the same bits every time.
    """
    _check_indices("scatter", idx_NK, num_rows, block_NK, num_blocks)
    rows, entries = _sort_entries(idx_NK, num_rows)
    out = torch.zeros(num_rows, x_NV.shape[1] // num_blocks, dtype=torch.float32, device=x_NV.device)
    _segment_sum(rows, entries, w_NKC, x_NV, block_NK, num_blocks, out)
    return out


def scatter_rows(
    idx_NK: Tensor,
    w_NKC: Tensor,
    x_NV: Tensor,
    num_rows: int,
    block_NK: Tensor | None = None,
    num_blocks: int = 1,
) -> tuple[Tensor, Tensor]:
    """`scatter` onto the touched rows alone, for tables whose gradient must not become dense.

    Returns:
        rows [M] int64, sorted and distinct, and what they receive, [M, V] in fp32.
    """
    _check_indices("scatter", idx_NK, num_rows, block_NK, num_blocks)
    rows, entries = _sort_entries(idx_NK, num_rows)
    touched, position = torch.unique_consecutive(rows, return_inverse=True)
    width = x_NV.shape[1] // num_blocks
    # Each row is some run's, which writes it.
    out = torch.empty(touched.numel(), width, dtype=torch.float32, device=x_NV.device)
    _segment_sum(position, entries, w_NKC, x_NV, block_NK, num_blocks, out)
    return touched.long(), out


def _sort_entries(idx_NK: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The selected rows in ascending order, and the flat (token, slot) entry of each; equal rows keep their order."""
    rows = idx_NK.reshape(-1)
    if num_rows <= torch.iinfo(torch.int32).max:
        # Half as many digits to sort by.
        rows = rows.int()
    rows, entries = rows.sort(stable=True)
    return rows, entries


def _segment_sum(
    rows: Tensor,
    entries: Tensor,
    w_NKC: Tensor,
    x_NV: Tensor,
    block_NK: Tensor | None,
    num_blocks: int,
    out: Tensor,
) -> None:
    """Write the sums of equal rows' entries into these rows of ``out`` [R, V]; other rows stay as they are."""
    num_tokens, num_selected, num_cores = w_NKC.shape
    (num_rows, width), num_entries = out.shape, rows.numel()
    slice_width = width // num_cores
    w, x, block = contiguous([w_NKC, x_NV, block_NK])
    num_chunks = triton.cdiv(num_entries, _CHUNK_ENTRIES)
    partial = torch.empty(num_chunks, width, dtype=torch.float32, device=x_NV.device)
    sizes = (num_entries, num_rows, num_selected, slice_width, num_cores, num_blocks)
    launch(
        segment_sum_kernel,
        lambda blocks: (
            triton.cdiv(num_entries, blocks["BLOCK_R"]) * num_cores * triton.cdiv(slice_width, blocks["BLOCK_V"])
        ),
        out,
        *(rows, entries, w, x, block, out, partial, *sizes),
        one_order=True,
        HAS_BLOCKS=block is not None,
        FEW_TOKENS=num_tokens < FEW_TOKENS,
        CHUNK=_CHUNK_ENTRIES,
    )
    if num_chunks > 1 and width:
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
            add_partials_kernel[((num_chunks - 1) * triton.cdiv(width, _PARTIAL_BLOCKS["BLOCK_V"]),)](
                *(rows, out, partial, num_entries, width), CHUNK=_CHUNK_ENTRIES, **_PARTIAL_BLOCKS, num_warps=4
            )


def _check_indices(name: str, idx_NK: Tensor, num_rows: int, block_NK: Tensor | None, num_blocks: int) -> None:
    check_range(name, "rows", idx_NK, num_rows)
    if block_NK is not None:
        check_range(name, "blocks", block_NK, num_blocks)
