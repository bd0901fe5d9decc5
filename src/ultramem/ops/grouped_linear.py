"""grouped_linear: each group of rows times the matrix of its group; what a mixture of experts is computed with."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ultramem.ops.precision import without_autocast

# What the fused kernels of PyTorch multiply, given rows that start at multiples of so many bytes.
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FUSED_ALIGNMENT_BYTES = 16


@without_autocast
def grouped_linear_reference(rows_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Plain PyTorch definition of `grouped_linear`; every backend must agree with it."""
    pieces = rows_SI.tensor_split(ends_E[:-1].tolist())
    return torch.cat([piece @ weight.T for piece, weight in zip(pieces, weight_EOI, strict=True)])


def _fused(*matrices: Tensor) -> bool:
    return all(
        matrix.dtype in _FUSED_DTYPES
        and matrix.numel() > 0
        and matrix.shape[-1] * matrix.element_size() % _FUSED_ALIGNMENT_BYTES == 0
        for matrix in matrices
    )


@torch.library.custom_op("ultramem::grouped_linear", mutates_args=())
def _grouped_linear(rows_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    # The kernel also wants aligned rows of its result, of which there are O elements each.
    if _fused(rows_SI, weight_EOI, weight_EOI.transpose(1, 2)):
        return F.grouped_mm(rows_SI, weight_EOI.transpose(1, 2), offs=ends_E)
    return grouped_linear_reference(rows_SI, weight_EOI, ends_E)


@_grouped_linear.register_fake
def _(rows_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return rows_SI.new_empty(rows_SI.shape[0], weight_EOI.shape[1])


@torch.library.custom_op("ultramem::grouped_outer", mutates_args=())
def _grouped_outer(left_SO: Tensor, right_SI: Tensor, ends_E: Tensor) -> Tensor:
    if _fused(left_SO, right_SI):
        return F.grouped_mm(left_SO.T, right_SI, offs=ends_E)
    bounds = ends_E[:-1].tolist()
    pieces = zip(left_SO.tensor_split(bounds), right_SI.tensor_split(bounds), strict=True)
    return torch.stack([left.T @ right for left, right in pieces])


@_grouped_outer.register_fake
def _(left_SO: Tensor, right_SI: Tensor, ends_E: Tensor) -> Tensor:
    return left_SO.new_empty(ends_E.shape[0], left_SO.shape[1], right_SI.shape[1])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_SO: Tensor):  # type: ignore[no-untyped-def]
    rows_SI, weight_EOI, ends_E = ctx.saved_tensors
    ops = torch.ops.ultramem
    grad_SO = grad_SO.contiguous()
    grad_rows = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_rows = ops.grouped_linear(grad_SO, weight_EOI.transpose(1, 2), ends_E)
    if ctx.needs_input_grad[1]:
        grad_weight = ops.grouped_outer(grad_SO, rows_SI, ends_E)
    return grad_rows, grad_weight, None


_grouped_linear.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.ultramem.grouped_linear)
def _(rows_shape, weight_shape, ends_shape, **_):  # type: ignore[no-untyped-def]
    return 2 * rows_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.ultramem.grouped_outer)
def _(left_shape, right_shape, ends_shape, **_):  # type: ignore[no-untyped-def]
    return 2 * left_shape[0] * left_shape[1] * right_shape[1]


def grouped_linear(rows_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply each group of rows by the matrix of its group.

    out[s] = W[e] · rows[s] for ends[e−1] ≤ s < ends[e]. Like a linear layer it computes in autocast's dtype.

    Args:
        rows_SI: rows sorted by group.
        weight_EOI: one matrix per group, in the dtype of the rows (or anything, under autocast).
        ends_E: int32, where each group ends; not decreasing, the last is S. Groups may be empty.

    Returns:
        [S, O] in the dtype of the rows.

    Raises:
        ValueError: shapes that do not fit each other.
        TypeError: dtypes that differ.
    """
    groups, _, width = weight_EOI.shape
    if rows_SI.ndim != 2 or rows_SI.shape[1] != width or ends_E.shape != (groups,):
        raise ValueError(
            f"grouped_linear needs rows [S, I], weights [E, O, I] and ends [E]; got {tuple(rows_SI.shape)}, "
            f"{tuple(weight_EOI.shape)} and {tuple(ends_E.shape)}."
        )
    device = rows_SI.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (rows_SI.dtype, weight_EOI.dtype):
        dtype = torch.get_autocast_dtype(device)
        rows_SI, weight_EOI = rows_SI.to(dtype), weight_EOI.to(dtype)
    if rows_SI.dtype != weight_EOI.dtype or ends_E.dtype != torch.int32:
        raise TypeError(
            f"grouped_linear needs rows and weights of one dtype and int32 ends; got {rows_SI.dtype}, "
            f"{weight_EOI.dtype} and {ends_E.dtype}."
        )
    out: Tensor = _grouped_linear(rows_SI, weight_EOI, ends_E)
    return out
