"""gather_dot: the dot product of each token with the table rows that it selected."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ultramem.ops.backends import AUTO, CPU, TRITON, choose, direct_calls, requested, runs_directly
from ultramem.ops.operands import block_selector, check_operands, gather_rows
from ultramem.ops.precision import without_autocast
from ultramem.ops.row_gradients import RowGradients, tap


@without_autocast
def gather_dot_reference(
    idx_NK: Tensor,
    x_NV: Tensor,
    table_RV: Tensor,
    block_NK: Tensor | None = None,
    num_blocks: int = 1,
    num_cores: int = 1,
) -> Tensor:
    """Plain PyTorch definition of `gather_dot`; every backend must agree with it."""
    rows_NCKv = gather_rows(table_RV, idx_NK, num_cores)
    num_tokens, width = idx_NK.shape[0], table_RV.shape[1]
    x_NECv = x_NV.to(rows_NCKv.dtype).reshape(num_tokens, num_blocks, num_cores, width // num_cores)
    if block_NK is None:
        out = torch.einsum("nckv,ncv->nkc", rows_NCKv, x_NECv[:, 0])
    else:
        selector_NKE = block_selector(block_NK, num_blocks, rows_NCKv.dtype)
        out = torch.einsum("nckv,necv,nke->nkc", rows_NCKv, x_NECv, selector_NKE)
    return out.to(x_NV.dtype).contiguous()


def _run(
    idx_NK: Tensor,
    x_NV: Tensor,
    table_RV: Tensor,
    block_NK: Tensor | None,
    num_blocks: int,
    num_cores: int,
    backend: str = AUTO,
) -> Tensor:
    chosen = choose("gather_dot", backend, table_RV, x_NV)
    if chosen == CPU:
        out: Tensor = torch.ops.ultramem_cpu.gather_dot.default(idx_NK, x_NV, table_RV, block_NK, num_blocks, num_cores)
        return out
    if chosen == TRITON:
        from ultramem.ops.triton import tables

        return tables.gather_dot(idx_NK, x_NV, table_RV, block_NK, num_blocks, num_cores)
    return gather_dot_reference(idx_NK, x_NV, table_RV, block_NK, num_blocks, num_cores)


_gather_dot = torch.library.custom_op("ultramem::gather_dot", _run, mutates_args=())


@_gather_dot.register_fake
def _(idx_NK, x_NV, table_RV, block_NK, num_blocks, num_cores, *_):  # type: ignore[no-untyped-def]
    return x_NV.new_empty(*idx_NK.shape, num_cores)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *operands, ctx.num_blocks, _, ctx.backend = inputs
    ctx.save_for_backward(*operands)


def _backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
    idx_NK, x_NV, table_RV, block_NK = ctx.saved_tensors
    ops = torch.ops.ultramem
    grad_x = grad_table = None
    if ctx.needs_input_grad[1]:
        grad_x = ops.bag(idx_NK, grad_out, table_RV, block_NK, ctx.num_blocks, ctx.backend).to(x_NV.dtype)
    if ctx.needs_input_grad[2]:
        grad_table = ops.scatter(idx_NK, grad_out, x_NV, table_RV.shape[0], block_NK, ctx.num_blocks, ctx.backend)
        grad_table = grad_table.to(table_RV.dtype)
    return None, grad_x, grad_table, None, None, None, None


@register_flop_formula(torch.ops.ultramem.gather_dot)
def _(idx_shape, x_shape, table_shape, block_shape, num_blocks, num_cores, backend=AUTO, **_):  # type: ignore[no-untyped-def]
    return 2 * idx_shape[0] * idx_shape[1] * table_shape[1]


_gather_dot.register_autograd(_backward, setup_context=_setup_context)


def gather_dot(
    idx_NK: Tensor,
    x_NV: Tensor,
    table_RV: Tensor,
    *,
    block_NK: Tensor | None = None,
    num_blocks: int = 1,
    num_cores: int = 1,
    row_gradients: RowGradients | None = None,
    backend: str | None = None,
) -> Tensor:
    """Take the dot product of each token with the rows that it selected.

    out[n, k, c] = ⟨x[n, block[n, k], c-th slice], U[idx[n, k], c-th slice]⟩

    With one core and one block this is ⟨x[n], U[idx[n, k]]⟩: UltraMemV2's pre-values (arXiv 2508.18756) and the first
    half of each PEER expert (arXiv 2407.04153). The general form is the gradient of `bag` for its weights.

    Args:
        idx_NK: selected rows per token, int32 or int64, each in [0, R). A row may repeat within a token.
        x_NV: token vectors, [N, E·V], fp32, bf16 or fp64.
        table_RV: the table, same dtype as ``x_NV`` or wider.
        block_NK: the block in [0, E) of ``x_NV`` that each slot reads; None for one block.
        num_blocks: E.
        num_cores: C, the number of column slices with a dot product of their own; must divide V.
        row_gradients: where the table's gradient goes instead of ``table_RV.grad``; None for dense.
        backend: what to run on, gradients included (see `ultramem.ops.use_backend`); None for the surrounding choice.

    Returns:
        [N, K] for one core, else [N, K, C], in the dtype of ``x_NV``, accumulated in fp32 (fp64 for fp64 tables).

    Raises:
        ValueError: shapes that do not fit each other.
        TypeError: indices that are not integers.
        IndexError: an index outside the table (CPU).
        BackendError: a backend that was asked for cannot run.
    """
    if (direct := direct_calls(backend)) is not None and (row_gradients is None or not torch.is_grad_enabled()):
        dots: Tensor | None = direct.gather_dot(idx_NK, x_NV, table_RV, block_NK, num_blocks, num_cores)
        if dots is not None:
            return dots
    width = table_RV.shape[1]
    check_operands("gather_dot", idx_NK, x_NV, width, num_cores, block_NK, num_blocks)
    if x_NV.ndim != 2 or x_NV.shape[1] != num_blocks * width:
        raise ValueError(f"gather_dot: x_NV must be [N, {num_blocks * width}], got {tuple(x_NV.shape)}.")
    table = table_RV if row_gradients is None else table_RV.detach()
    backend = requested(backend)
    lookup = _run if runs_directly(idx_NK, x_NV, table) else _gather_dot
    out: Tensor = lookup(idx_NK, x_NV, table, block_NK, num_blocks, num_cores, backend)
    if row_gradients is not None and torch.is_grad_enabled():
        out = tap(out, row_gradients, idx_NK, block_NK, num_blocks, backend, x_NV=x_NV)
    return out.squeeze(-1) if num_cores == 1 else out
