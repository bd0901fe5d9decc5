"""scatter: weighted token vectors added onto the rows that the tokens selected; the gradient of a table."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ultramem.ops.backends import AUTO, CPU, TRITON, choose, requested, runs_directly
from ultramem.ops.operands import check_operands, with_cores
from ultramem.ops.precision import accumulation_dtype, without_autocast


@without_autocast
def scatter_reference(
    idx_NK: Tensor,
    w_NKC: Tensor,
    x_NV: Tensor,
    num_rows: int,
    block_NK: Tensor | None = None,
    num_blocks: int = 1,
) -> Tensor:
    """Plain PyTorch definition of `scatter`; every backend must agree with it."""
    dtype = accumulation_dtype(w_NKC, x_NV)
    num_tokens, num_cores = idx_NK.shape[0], w_NKC.shape[2]
    width = x_NV.shape[1] // num_blocks
    x_NKCv = x_NV.to(dtype).reshape(num_tokens, num_blocks, num_cores, width // num_cores)
    if block_NK is not None:
        # Indexing alone would take negative blocks from the end.
        if block_NK.numel() and not block_NK.is_cuda and int(block_NK.min()) < 0:
            raise IndexError(f"scatter: a block is negative; blocks lie in [0, {num_blocks}).")
        x_NKCv = x_NKCv[torch.arange(num_tokens, device=idx_NK.device)[:, None], block_NK.long()]
    rows = (w_NKC.to(dtype)[..., None] * x_NKCv).reshape(idx_NK.numel(), width)
    if rows.shape[0] == 0:
        return rows.new_zeros(num_rows, width)
    # ATen's embedding backward is index_add_ over threads, and in one fixed order. It drops indices that are out of
    # range on some builds, so that a wrong index must be caught here.
    idx = idx_NK.reshape(-1).long()
    if not idx.is_cuda and (int(idx.min()) < 0 or int(idx.max()) >= num_rows):
        raise IndexError(f"scatter: an index lies outside the table of {num_rows} rows.")
    summed: Tensor = torch.ops.aten.embedding_dense_backward(rows, idx, num_rows, -1, False)
    return summed


def _run(
    idx_NK: Tensor,
    w_NKC: Tensor,
    x_NV: Tensor,
    num_rows: int,
    block_NK: Tensor | None,
    num_blocks: int,
    backend: str = AUTO,
) -> Tensor:
    chosen = choose("scatter", backend, x_NV, w_NKC)
    if chosen == CPU:
        out: Tensor = torch.ops.ultramem_cpu.scatter.default(idx_NK, w_NKC, x_NV, num_rows, block_NK, num_blocks)
        return out
    if chosen == TRITON:
        from ultramem.ops.triton import tables

        return tables.scatter(idx_NK, w_NKC, x_NV, num_rows, block_NK, num_blocks)
    return scatter_reference(idx_NK, w_NKC, x_NV, num_rows, block_NK, num_blocks)


_scatter = torch.library.custom_op("ultramem::scatter", _run, mutates_args=())


@_scatter.register_fake
def _(idx_NK, w_NKC, x_NV, num_rows, block_NK, num_blocks, *_):  # type: ignore[no-untyped-def]
    return x_NV.new_empty(num_rows, x_NV.shape[1] // num_blocks, dtype=accumulation_dtype(w_NKC, x_NV))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    idx_NK, w_NKC, x_NV, _, block_NK, ctx.num_blocks, ctx.backend = inputs
    ctx.save_for_backward(idx_NK, w_NKC, x_NV, block_NK)


def _backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
    idx_NK, w_NKC, x_NV, block_NK = ctx.saved_tensors
    ops = torch.ops.ultramem
    grad_w = grad_x = None
    if ctx.needs_input_grad[1]:
        wide = x_NV.to(accumulation_dtype(x_NV))
        grad_w = ops.gather_dot(idx_NK, wide, grad_out, block_NK, ctx.num_blocks, w_NKC.shape[2], ctx.backend)
        grad_w = grad_w.to(w_NKC.dtype)
    if ctx.needs_input_grad[2]:
        grad_x = ops.bag(idx_NK, w_NKC, grad_out, block_NK, ctx.num_blocks, ctx.backend).to(x_NV.dtype)
    return None, grad_w, grad_x, None, None, None, None


@register_flop_formula(torch.ops.ultramem.scatter)
def _(idx_shape, w_shape, x_shape, num_rows, block_shape, num_blocks, backend=AUTO, **_):  # type: ignore[no-untyped-def]
    return 2 * idx_shape[0] * idx_shape[1] * x_shape[1] // num_blocks


_scatter.register_autograd(_backward, setup_context=_setup_context)


def scatter(
    idx_NK: Tensor,
    w: Tensor,
    x_NV: Tensor,
    num_rows: int,
    *,
    block_NK: Tensor | None = None,
    num_blocks: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Add weighted token vectors onto the rows that the tokens selected: the table gradient of `bag` and `gather_dot`.

    out[r, c-th slice] = Σ_{n,k: idx[n,k] = r} w[n, k, c] · x[n, block[n, k], c-th slice]

    Args:
        idx_NK: selected rows per token, int32 or int64, each in [0, num_rows). A row may repeat within a token.
        w: weights, [N, K] or, for C cores, [N, K, C]; any floating dtype. C must divide V.
        x_NV: token vectors, [N, E·V].
        num_rows: R, the rows of the result.
        block_NK: the block in [0, E) of ``x_NV`` that each slot takes; None for one block.
        num_blocks: E; must divide the width of ``x_NV``.
        backend: what to run on, gradients included (see `ultramem.ops.use_backend`); None for the surrounding choice.

    Returns:
        [R, V] in fp32 (fp64 if an operand is fp64); rows that no token selected are zero.

    Raises:
        ValueError: shapes that do not fit each other.
        TypeError: indices that are not integers.
        IndexError: an index outside [0, num_rows) (CPU).
        BackendError: a backend that was asked for cannot run.
    """
    w_NKC = with_cores(w, idx_NK, "scatter")
    if num_blocks < 1 or x_NV.shape[1] % num_blocks:
        raise ValueError(f"scatter: a width of {x_NV.shape[1]} cannot be cut into {num_blocks} equal blocks.")
    width = x_NV.shape[1] // num_blocks
    check_operands("scatter", idx_NK, x_NV, width, w_NKC.shape[2], block_NK, num_blocks)
    run = _run if runs_directly(idx_NK, w_NKC, x_NV) else _scatter
    out: Tensor = run(idx_NK, w_NKC, x_NV, num_rows, block_NK, num_blocks, requested(backend))
    return out
