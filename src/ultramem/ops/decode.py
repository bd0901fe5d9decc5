"""The kernels of a decode step: few tokens, fp32 activations, weights read where they are in fp32 or bf16.

They exist for CPUs alone, carry no gradient and work in place; what they compute is what the modules of a decoder
compute, which is what they are tested against and what runs where they cannot. Activations are contiguous, and weights
and caches contiguous and of one dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ultramem.ops.backends import AUTO, CPU, REFERENCE, choose, requested

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
# Nobody can ask for kernels of fp64: it is for checking others.
_DTYPES = (torch.float32, torch.bfloat16)


def runs_on_kernels(*weights: Tensor) -> bool:
    """Whether the kernels can stand in for modules with these weights, here and now; the first one's backend decides.

    Raises:
        BackendError: the C++ kernels were asked for by name and cannot be built.
    """
    # A loop and no generator: this is asked for every memory of every step.
    for weight in weights:
        if (
            type(weight) not in _PLAIN_TYPES
            or not weight.is_cpu
            or weight.dtype not in _DTYPES
            or not weight.is_contiguous()
        ):
            return False
    if (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
    ):
        return False
    backend = requested(None)
    return backend in (AUTO, CPU) and choose("decoding", backend, weights[0], available=(CPU,)) != REFERENCE


def rms_norm(x_ND: Tensor, gain_D: Tensor, epsilon: float) -> Tensor:
    """X / rms(x) · gain, [N, D] fp32."""
    out: Tensor = torch.ops.ultramem_cpu.rms_norm(x_ND, gain_D, epsilon)
    return out


def linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """W x + b, [N, O] fp32."""
    out: Tensor = torch.ops.ultramem_cpu.linear(x_NI, weight_OI, bias_O)
    return out


def add_attention(
    residual_ND: Tensor,
    x_ND: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gains: Sequence[Tensor],
    *,
    epsilon: float,
    clip: float | None,
    scaling: float,
    cosines_Nd: Tensor,
    sines_Nd: Tensor,
    keys_BHTd: Tensor,
    values_BHTd: Tensor,
    position: int,
    mask_BT: Tensor | None,
) -> None:
    """Add the attention of one new token of each sequence, whose key and value are written into the cache.

    Args:
        residual_ND: what is added to, fp32; N sequences.
        x_ND: normed hidden states.
        weights: of the query, key, value and output projections.
        biases: of the same; empty for none.
        gains: of the RMS norms of queries and keys, over all heads.
        epsilon: of both norms.
        clip: bound of normed queries, normed keys and values; None for none.
        scaling: what the products of queries and keys are multiplied by.
        cosines_Nd: of the rotary angles, fp32, for each sequence or one for all ([1, d]).
        sines_Nd: the same.
        keys_BHTd: the cache of keys, room for T tokens.
        values_BHTd: the cache of values.
        position: where in the cache the token goes; what stands before it is attended to, with itself.
        mask_BT: bool [N, position + 1], True where a token is real; None where all are.

    Raises:
        IndexError: the cache is full.
    """
    torch.ops.ultramem_cpu.add_attention(
        residual_ND,
        x_ND,
        weights,
        biases,
        gains,
        epsilon,
        clip,
        scaling,
        cosines_Nd,
        sines_Nd,
        keys_BHTd,
        values_BHTd,
        position,
        mask_BT,
    )


def add_gated_ffn(residual_ND: Tensor, x_ND: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> None:
    """Add W_down (silu(W_gate x) ⊙ W_up x)."""
    torch.ops.ultramem_cpu.add_gated_ffn(residual_ND, x_ND, gate_FD, up_FD, down_DF)


def add_tucker_memory(
    residual_ND: Tensor,
    x_ND: Tensor,
    *,
    query_OD: Tensor,
    query_gain_d: Tensor,
    epsilon: float,
    keys_H2Srd: Tensor,
    contracted_2HSe: Tensor,
    cores_CHrr: Tensor,
    top_k: int,
    coarse_top_k: int,
    signed: bool,
    permutation: Tensor,
    window_offset: int,
    window_size: int,
    values_RV: Tensor,
    pre_values_RU: Tensor | None,
    pre_UD: Tensor | None,
    activation: str | None,
    num_blocks: int,
    out_DV: Tensor,
) -> None:
    """Add the output of a memory with Tucker retrieval: query, `key_search`, `pooled_read` or `bag`, W_out.

    Args:
        residual_ND: what is added to, fp32.
        x_ND: normed hidden states.
        query_OD: query projection, O = 2·Q·d.
        query_gain_d: of the queries' RMS norm.
        epsilon: of that norm.
        keys_H2Srd: normalised keys, fp32.
        contracted_2HSe: their contraction (see `key_search`), fp32.
        cores_CHrr: the Tucker cores.
        top_k: slots per token and head.
        coarse_top_k: keys that each side keeps.
        signed: the search (see `product_topk`): signed, or two-stage.
        permutation: int32, the virtual slot of each slot of the grid.
        window_offset: first row of the layer's window of the pool, which is a ring.
        window_size: rows of the window.
        values_RV: the pool's values.
        pre_values_RU: its pre-values; None for none.
        pre_UD: what makes the inputs of the pre-values; None for none.
        activation: of the pre-value products; None for none.
        num_blocks: virtual blocks that are pooled apart; 1 adds them.
        out_DV: output projection.
    """
    torch.ops.ultramem_cpu.add_tucker_memory(
        residual_ND,
        x_ND,
        query_OD,
        query_gain_d,
        epsilon,
        keys_H2Srd,
        contracted_2HSe,
        cores_CHrr,
        top_k,
        coarse_top_k,
        signed,
        permutation,
        window_offset,
        window_size,
        values_RV,
        pre_values_RU,
        pre_UD,
        activation or "",
        num_blocks,
        out_DV,
    )


def add_experts(
    residual_ND: Tensor, x_ND: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, index_NA: Tensor, weights_NA: Tensor
) -> None:
    """Add the weighted outputs of each token's experts.

    Args:
        residual_ND: what is added to, fp32.
        x_ND: normed hidden states.
        gate_up_EFD: the gates' weights above the up projections' of each expert, [E, 2·inner, D].
        down_EDF: [E, D, inner].
        index_NA: int64, each token's experts.
        weights_NA: fp32, their weights.

    Raises:
        IndexError: an expert that does not exist.
    """
    torch.ops.ultramem_cpu.add_experts(residual_ND, x_ND, gate_up_EFD, down_EDF, index_NA, weights_NA)
