"""pooled_read: a memory's whole lookup, from the scores of the selected slots to the pooled values."""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ultramem.ops.backends import AUTO, CPU, choose, direct_calls, requested, runs_directly
from ultramem.ops.bag import bag
from ultramem.ops.gather_dot import gather_dot
from ultramem.ops.operands import check_operands, with_cores
from ultramem.ops.row_gradients import RowGradients

Activation = Literal["gelu", "relu"]

_ACTIVATIONS = {None: lambda pre_NK: pre_NK, "gelu": torch.nn.functional.gelu, "relu": torch.nn.functional.relu}


def _composed(
    idx_NK: Tensor,
    scores_NKC: Tensor,
    values_RV: Tensor,
    x_NU: Tensor,
    pre_values_RU: Tensor,
    activation: str | None,
    block_NK: Tensor | None,
    num_blocks: int,
    backend: str,
    value_gradients: RowGradients | None = None,
    pre_value_gradients: RowGradients | None = None,
) -> Tensor:
    """The definition: `gather_dot`, the activation, `bag`."""
    pre_NK = gather_dot(idx_NK, x_NU, pre_values_RU, row_gradients=pre_value_gradients, backend=backend)
    weights_NKC = scores_NKC * _ACTIVATIONS[activation](pre_NK)[..., None]
    return bag(
        idx_NK,
        weights_NKC,
        values_RV,
        block_NK=block_NK,
        num_blocks=num_blocks,
        row_gradients=value_gradients,
        backend=backend,
    )


def _run(
    idx_NK: Tensor,
    scores_NKC: Tensor,
    values_RV: Tensor,
    x_NU: Tensor,
    pre_values_RU: Tensor,
    activation: str | None,
    block_NK: Tensor | None,
    num_blocks: int,
    backend: str = AUTO,
) -> Tensor:
    operands = (values_RV, scores_NKC, x_NU, pre_values_RU)
    same_dtype = values_RV.dtype == pre_values_RU.dtype
    if same_dtype and choose("pooled_read", backend, *operands) == CPU:
        out: Tensor = torch.ops.ultramem_cpu.pooled_read.default(
            idx_NK, scores_NKC, values_RV, x_NU, pre_values_RU, activation or "", block_NK, num_blocks
        )
        return out
    return _composed(idx_NK, scores_NKC, values_RV, x_NU, pre_values_RU, activation, block_NK, num_blocks, backend)


_pooled_read = torch.library.custom_op("ultramem::pooled_read", _run, mutates_args=())


@_pooled_read.register_fake
def _(idx_NK, scores_NKC, values_RV, x_NU, pre_values_RU, activation, block_NK, num_blocks, backend=AUTO):  # type: ignore[no-untyped-def]
    return values_RV.new_empty(idx_NK.shape[0], num_blocks * values_RV.shape[1])


@register_flop_formula(torch.ops.ultramem.pooled_read)
def _(idx_shape, scores_shape, values_shape, x_shape, pre_shape, *_, **__):  # type: ignore[no-untyped-def]
    return 2 * idx_shape[0] * idx_shape[1] * (values_shape[1] + pre_shape[1])


def pooled_read(
    idx_NK: Tensor,
    scores: Tensor,
    values_RV: Tensor,
    x_NU: Tensor,
    pre_values_RU: Tensor,
    *,
    activation: Activation | None = None,
    block_NK: Tensor | None = None,
    num_blocks: int = 1,
    value_gradients: RowGradients | None = None,
    pre_value_gradients: RowGradients | None = None,
    backend: str | None = None,
) -> Tensor:
    """Pool the values of the selected rows, weighed by their scores and the activations of their pre-values.

    out[n, e, c-th slice] = Σ_{k: block[n,k] = e} s[n, k, c] · act(⟨x[n], U[idx[n, k]]⟩) · T[idx[n, k], c-th slice]

    UltraMemV2's read (arXiv 2508.18756) and, with gelu and softmax scores, PEER's (arXiv 2407.04153). Where no gradient
    is wanted it is one pass over the tokens, in which both rows of a slot are under way at once; otherwise it is
    `gather_dot` and `bag`.

    Args:
        idx_NK: selected rows per token, int32 or int64, each in [0, R). A row may repeat within a token.
        scores: [N, K] or, for C cores, [N, K, C]; any floating dtype. C must divide V.
        values_RV: the values, fp32, bf16 or fp64.
        x_NU: what the pre-values are multiplied with.
        pre_values_RU: the pre-values, same dtype as ``x_NU`` or wider.
        activation: of the products; None for none. GELU is the exact one.
        block_NK: the block in [0, E) that each slot is pooled into; None for one block.
        num_blocks: E.
        value_gradients: where the values' gradient goes instead of ``.grad``; None for dense.
        pre_value_gradients: the same for the pre-values.
        backend: what to run on, gradients included (see `ultramem.ops.use_backend`); None for the surrounding choice.

    Returns:
        [N, E·V] in the values' dtype, accumulated in fp32 (fp64 for fp64 tables).

    Raises:
        ValueError: shapes that do not fit each other.
        TypeError: indices that are not integers.
        IndexError: an index outside the tables (CPU).
        BackendError: a backend that was asked for cannot run.
    """
    if (direct := direct_calls(backend)) is not None:
        read: Tensor | None = direct.pooled_read(
            idx_NK, scores, values_RV, x_NU, pre_values_RU, activation, block_NK, num_blocks
        )
        if read is not None:
            return read
    scores_NKC = with_cores(scores, idx_NK, "pooled_read")
    check_operands("pooled_read", idx_NK, x_NU, values_RV.shape[1], scores_NKC.shape[2], block_NK, num_blocks)
    if x_NU.ndim != 2 or pre_values_RU.shape != (values_RV.shape[0], x_NU.shape[1]):
        raise ValueError(
            f"pooled_read: x_NU and pre_values_RU must have one width, and pre_values_RU a row for each of the "
            f"{len(values_RV)} values; got {tuple(x_NU.shape)} and {tuple(pre_values_RU.shape)}."
        )
    backend = requested(backend)
    arguments = (idx_NK, scores_NKC, values_RV, x_NU, pre_values_RU, activation, block_NK, num_blocks, backend)
    if runs_directly(idx_NK, scores_NKC, values_RV, x_NU, pre_values_RU):
        return _run(*arguments)
    if torch.is_grad_enabled() and any(
        operand.requires_grad for operand in (scores_NKC, values_RV, x_NU, pre_values_RU)
    ):
        return _composed(*arguments, value_gradients, pre_value_gradients)
    out: Tensor = _pooled_read(*arguments)
    return out
