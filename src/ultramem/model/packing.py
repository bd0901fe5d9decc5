"""Sequences that hold several documents: positions that restart, which keep attention inside each document."""

import torch
from torch import Tensor


def document_positions(input_ids_BT: Tensor, eos_token_id: int) -> Tensor:
    """Position of every token within its document.

    Passed as ``position_ids`` without an attention mask and a cache, they make `transformers` (``create_causal_mask``)
    mask attention block-diagonally: it takes every step other than +1 for the start of another sequence. A row's first
    document starts at the row's start, wherever it was cut.

    Args:
        input_ids_BT: token ids, int64 [B, T].
        eos_token_id: the token that ends a document, itself a part of it.

    Returns:
        int64 [B, T], 0 at the first token of each document.
    """
    indices_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
    starts_BT = torch.zeros_like(input_ids_BT)
    starts_BT[:, 1:] = torch.where(input_ids_BT[:, :-1] == eos_token_id, indices_T[1:], 0)
    return indices_T - starts_BT.cummax(dim=1).values
