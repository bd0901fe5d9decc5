"""UltraMemV2 in plain PyTorch, as one would write it down from its definition: what the kernels are compared with."""

import torch
from torch import Tensor

from ultramem.layers import MemoryPool, UltraMemV2
from ultramem.layers.retrieval import NORM_EPSILON


def plain_ultramem_v2(layer: UltraMemV2, pool: MemoryPool, x: Tensor) -> Tensor:
    """The output of a layer with its default settings, of any sizes: fine scores of all keys, and rows by indexing.

    Args:
        layer: whose weights are used: two-stage search, one query and one virtual block.
        pool: the rows, with pre-values.
        x: [..., D].

    Returns:
        Like ``x``.
    """
    retrieval, window = layer.retrieval, layer.window
    side, key_dim = retrieval.keys.shape[2:4]
    x_ND = x.reshape(-1, x.shape[-1])
    num_tokens = x_ND.shape[0]

    query_N2d = _rms_norm(retrieval.query_proj(x_ND).view(-1, 2, key_dim), -1) * retrieval.query_norm
    keys_H2Sdr = _rms_norm(retrieval.keys, 3) * retrieval.key_norm[:, None]
    row_NHSr = torch.einsum("nd,hsdr->nhsr", query_N2d[:, 0], keys_H2Sdr[:, 0])
    col_NHSr = torch.einsum("nd,hsdr->nhsr", query_N2d[:, 1], keys_H2Sdr[:, 1])

    rows_NHM = torch.einsum("nhsr,hr->nhs", row_NHSr, retrieval.row_direction).topk(retrieval.coarse_top_k).indices
    cols_NHM = torch.einsum("nhsr,hr->nhs", col_NHSr, retrieval.col_direction).topk(retrieval.coarse_top_k).indices
    row_NHMr = row_NHSr.take_along_dim(rows_NHM[..., None], 2)
    col_NHMr = col_NHSr.take_along_dim(cols_NHM[..., None], 2)
    grid_NHCMM = torch.einsum("nhip,chpq,nhjq->nhcij", row_NHMr, retrieval.cores, col_NHMr)
    best_NHK = grid_NHCMM.sum(2).flatten(2).topk(retrieval.top_k).indices
    scores_NHCK = grid_NHCMM.flatten(3).take_along_dim(best_NHK[:, :, None], 3)
    kept = retrieval.coarse_top_k
    slots_NHK = rows_NHM.take_along_dim(best_NHK // kept, 2) * side + cols_NHM.take_along_dim(best_NHK % kept, 2)

    virtual_NK = layer.permutation[slots_NHK.flatten(1)].long()
    physical_NK = (virtual_NK % window.size + window.offset) % window.num_rows
    assert layer.pre_proj is not None
    assert pool.pre_values is not None
    pre_NK = (pool.pre_values[physical_NK] * layer.pre_proj(x_ND)[:, None]).sum(-1)
    weights_NKC = scores_NHCK.transpose(2, 3).flatten(1, 2) * pre_NK[..., None]
    num_cores = weights_NKC.shape[2]
    values_NKCv = pool.values[physical_NK].view(num_tokens, -1, num_cores, pool.values.shape[1] // num_cores)
    pooled_NV = (weights_NKC[..., None] * values_NKCv).sum(1).flatten(1)
    output_ND: Tensor = layer.out_proj(pooled_NV)
    return output_ND.view(x.shape)


def _rms_norm(x: Tensor, dim: int) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim, keepdim=True) + NORM_EPSILON)
