"""bag: the weighted sum of the table rows that each token selected."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ultramem.ops.backends import AUTO, CPU, TRITON, choose, direct_calls, requested, runs_directly
from ultramem.ops.operands import block_selector, check_operands, gather_rows, slice_indices, with_cores
from ultramem.ops.precision import accumulation_dtype, without_autocast
from ultramem.ops.row_gradients import RowGradients, tap


@without_autocast
def bag_reference(
    idx_NK: Tensor, w_NKC: Tensor, table_RV: Tensor, block_NK: Tensor | None = None, num_blocks: int = 1
) -> Tensor:
    """Plain PyTorch definition of `bag`; every backend must agree with it."""
    rows_NCKv = gather_rows(table_RV, idx_NK, w_NKC.shape[2])
    w_NKC = w_NKC.to(rows_NCKv.dtype)
    if block_NK is None:
        out = torch.einsum("nckv,nkc->ncv", rows_NCKv, w_NKC)
    else:
        selector_NKE = block_selector(block_NK, num_blocks, rows_NCKv.dtype)
        out = torch.einsum("nckv,nkc,nke->necv", rows_NCKv, w_NKC, selector_NKE)
    return out.reshape(idx_NK.shape[0], num_blocks * table_RV.shape[1]).to(table_RV.dtype)


def _embedding_bag(idx_NK: Tensor, w_NKC: Tensor, table_RV: Tensor) -> Tensor:
    """One block by ATen's fused pooling, which never materialises the gathered rows; slices are bags of their own."""
    num_cores, width = w_NKC.shape[2], table_RV.shape[1]
    idx = slice_indices(idx_NK, num_cores).reshape(-1, idx_NK.shape[1])
    weights = w_NKC.transpose(1, 2).reshape(idx.shape).to(table_RV.dtype)
    slices = table_RV.reshape(table_RV.shape[0] * num_cores, width // num_cores)
    pooled = torch.nn.functional.embedding_bag(idx, slices, per_sample_weights=weights, mode="sum")
    return pooled.reshape(idx_NK.shape[0], width)


def _run(
    idx_NK: Tensor, w_NKC: Tensor, table_RV: Tensor, block_NK: Tensor | None, num_blocks: int, backend: str = AUTO
) -> Tensor:
    chosen = choose("bag", backend, table_RV, w_NKC)
    if chosen == CPU:
        out: Tensor = torch.ops.ultramem_cpu.bag.default(idx_NK, w_NKC, table_RV, block_NK, num_blocks)
        return out
    if chosen == TRITON:
        from ultramem.ops.triton import tables

        return tables.bag(idx_NK, w_NKC, table_RV, block_NK, num_blocks)
    # bf16 tables stay with the reference: ATen rounds their weights to bf16.
    if block_NK is None and table_RV.dtype == torch.float32 and idx_NK.numel():
        return _embedding_bag(idx_NK, w_NKC, table_RV)
    return bag_reference(idx_NK, w_NKC, table_RV, block_NK, num_blocks)


_bag = torch.library.custom_op("ultramem::bag", _run, mutates_args=())


@_bag.register_fake
def _(idx_NK, w_NKC, table_RV, block_NK, num_blocks, *_):  # type: ignore[no-untyped-def]
    return table_RV.new_empty(idx_NK.shape[0], num_blocks * table_RV.shape[1])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *operands, ctx.num_blocks, ctx.backend = inputs
    ctx.save_for_backward(*operands)


def _backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
    idx_NK, w_NKC, table_RV, block_NK = ctx.saved_tensors
    ops = torch.ops.ultramem
    grad_w = grad_table = None
    if ctx.needs_input_grad[1]:
        # gather_dot answers in its operand's dtype: hand it the wide one, so that weights get fp32 gradients.
        wide = grad_out.to(accumulation_dtype(grad_out))
        grad_w = ops.gather_dot(idx_NK, wide, table_RV, block_NK, ctx.num_blocks, w_NKC.shape[2], ctx.backend)
        grad_w = grad_w.to(w_NKC.dtype)
    if ctx.needs_input_grad[2]:
        grad_table = ops.scatter(idx_NK, w_NKC, grad_out, table_RV.shape[0], block_NK, ctx.num_blocks, ctx.backend)
        grad_table = grad_table.to(table_RV.dtype)
    return None, grad_w, grad_table, None, None, None


@register_flop_formula(torch.ops.ultramem.bag)
def _(idx_shape, w_shape, table_shape, block_shape, num_blocks, backend=AUTO, **_):  # type: ignore[no-untyped-def]
    return 2 * idx_shape[0] * idx_shape[1] * table_shape[1]


_bag.register_autograd(_backward, setup_context=_setup_context)


def bag(
    idx_NK: Tensor,
    w: Tensor,
    table_RV: Tensor,
    *,
    block_NK: Tensor | None = None,
    num_blocks: int = 1,
    row_gradients: RowGradients | None = None,
    backend: str | None = None,
) -> Tensor:
    """Pool the selected rows of a table with weights.

    out[n, e, c-th slice] = Σ_{k: block[n,k] = e} w[n, k, c] · T[idx[n, k], c-th slice]

    With one core and one block this is Σ_k w[n, k] · T[idx[n, k]] (PKM, arXiv 1907.05242, eq. 1). The slices are
    UltraMem's multi-core scoring and the blocks its implicit value expansion (arXiv 2411.12364, §3).

    Args:
        idx_NK: selected rows per token, int32 or int64, each in [0, R). A row may repeat within a token.
        w: weights, [N, K] or, for C cores, [N, K, C]; any floating dtype. C must divide V.
        table_RV: the table, fp32, bf16 or fp64.
        block_NK: the block in [0, E) that each slot is pooled into; None for one block.
        num_blocks: E.
        row_gradients: where the table's gradient goes instead of ``table_RV.grad``; None for dense.
        backend: what to run on, gradients included (see `ultramem.ops.use_backend`); None for the surrounding choice.

    Returns:
        [N, E·V] in the table's dtype, accumulated in fp32 (fp64 for fp64 tables).

    Raises:
        ValueError: shapes that do not fit each other.
        TypeError: indices that are not integers.
        IndexError: an index outside the table (CPU).
        BackendError: a backend that was asked for cannot run.
    """
    if (direct := direct_calls(backend)) is not None and (row_gradients is None or not torch.is_grad_enabled()):
        pooled: Tensor | None = direct.bag(idx_NK, w, table_RV, block_NK, num_blocks)
        if pooled is not None:
            return pooled
    w_NKC = with_cores(w, idx_NK, "bag")
    check_operands("bag", idx_NK, w_NKC, table_RV.shape[1], w_NKC.shape[2], block_NK, num_blocks)
    table = table_RV if row_gradients is None else table_RV.detach()
    backend = requested(backend)
    lookup = _run if runs_directly(idx_NK, w_NKC, table) else _bag
    out: Tensor = lookup(idx_NK, w_NKC, table, block_NK, num_blocks, backend)
    if row_gradients is not None and torch.is_grad_enabled():
        out = tap(out, row_gradients, idx_NK, block_NK, num_blocks, backend, w_NKC=w_NKC)
    return out
