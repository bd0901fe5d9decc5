"""What the three table operators share: checked operands, and the gathered rows in slices and blocks."""

import torch
from torch import Tensor

from ultramem.ops.precision import accumulation_dtype


def check_operands(
    name: str,
    idx_NK: Tensor,
    token_operand: Tensor,
    width: int,
    num_cores: int,
    block_NK: Tensor | None,
    num_blocks: int,
) -> None:
    """Raise ValueError or TypeError, naming the operator, where shapes or dtypes cannot be meant."""
    if idx_NK.ndim != 2:
        raise ValueError(f"{name}: idx_NK must be [tokens, selected rows], got shape {tuple(idx_NK.shape)}.")
    if idx_NK.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: idx_NK must be int32 or int64, got {idx_NK.dtype}.")
    if token_operand.shape[0] != idx_NK.shape[0]:
        raise ValueError(f"{name}: {idx_NK.shape[0]} tokens in idx_NK but {token_operand.shape[0]} in its operand.")
    if num_cores < 1 or width % num_cores:
        raise ValueError(f"{name}: a width of {width} cannot be cut into {num_cores} equal core slices.")
    # Two comparisons of num_blocks, not one of truth values: under torch.compile it may be a symbol.
    if num_blocks != 1 if block_NK is None else num_blocks == 1:
        raise ValueError(f"{name}: block_NK and num_blocks > 1 go together, got num_blocks = {num_blocks}.")
    if block_NK is not None and block_NK.shape != idx_NK.shape:
        raise ValueError(
            f"{name}: block_NK must have idx_NK's shape {tuple(idx_NK.shape)}, got {tuple(block_NK.shape)}."
        )


def with_cores(w: Tensor, idx_NK: Tensor, name: str) -> Tensor:
    """View weights [N, K] as [N, K, 1]; pass [N, K, C] on. Raises ValueError on any other shape."""
    if w.shape[:2] != idx_NK.shape or w.ndim not in (2, 3):
        raise ValueError(
            f"{name}: weights must be [N, K] or [N, K, cores] for idx_NK {tuple(idx_NK.shape)}, got {tuple(w.shape)}."
        )
    return w.unsqueeze(-1) if w.ndim == 2 else w


def slice_indices(idx_NK: Tensor, num_cores: int) -> Tensor:
    """Rows of the table viewed as [R·C, V/C], [N, C, K] int64: slice c of row i is row i·C + c there."""
    cores = torch.arange(num_cores, device=idx_NK.device)[:, None]
    return idx_NK.long()[:, None] * num_cores + cores


def gather_rows(table_RV: Tensor, idx_NK: Tensor, num_cores: int) -> Tensor:
    """The selected rows, [N, C, K, V/C], in the accumulation dtype: the layout that bmm takes without a copy."""
    slices = table_RV.reshape(table_RV.shape[0] * num_cores, table_RV.shape[1] // num_cores)
    idx_NCK = slice_indices(idx_NK, num_cores)
    # index_select, unlike table[idx], refuses negative indices.
    rows = slices.index_select(0, idx_NCK.reshape(-1)).to(accumulation_dtype(table_RV))
    return rows.view(*idx_NCK.shape, slices.shape[1])


def block_selector(block_NK: Tensor, num_blocks: int, dtype: torch.dtype) -> Tensor:
    """[N, K, E]: one where slot k of token n belongs to block e, else zero."""
    return torch.nn.functional.one_hot(block_NK.long(), num_blocks).to(dtype)
