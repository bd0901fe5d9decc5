"""Decoding on CPUs: the next token of every sequence by kernels that read the weights where they are.

A step is a function of the model as it stands. It collects the weights anew each time, so that nothing can be out of
date, and leaves to the model's own forward whatever it does not know: hooks, adapters, quantised or sharded weights,
other devices and dtypes.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, OlmoeExperts, OlmoeRMSNorm, OlmoeTopKRouter

from ultramem.layers import MemoryLayer, MemoryPool
from ultramem.layers.plain import is_plain
from ultramem.model.block import UltraMemDecoderLayer
from ultramem.model.cache import DecodingCache, ReservedLayer
from ultramem.model.ffn import DenseFFN, MoEFFN
from ultramem.ops import decode

if TYPE_CHECKING:
    from ultramem.model.modeling import UltraMemForCausalLM

# Attention of these names computes what the kernel computes.
_ATTENTION = ("sdpa", "eager")

AddOutput = Callable[[Tensor, Tensor], None]


class _UnknownError(Exception):
    """Something that the kernels cannot stand in for."""


class _Attention(NamedTuple):
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    gains: Sequence[Tensor]


class _Block(NamedTuple):
    """The weights of one block, and where its keys and values are kept."""

    input_gain: Tensor
    attention: _Attention
    ffn_gain: Tensor
    add_ffn: AddOutput | None
    memories: list[MemoryLayer]
    memory_ends: list[int]
    cache: ReservedLayer


def decode_step(
    model: "UltraMemForCausalLM",
    input_ids: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    cache: DecodingCache,
) -> Tensor | None:
    """Logits of the token after the given one of each sequence, whose keys and values are added to the cache.

    Args:
        model: in evaluation mode.
        input_ids: [B, 1] int64.
        position_ids: [B, 1] or [1, 1]; None continues the cache.
        attention_mask: [B, past and present tokens], nonzero where a token is real; None where all are.
        cache: holds the tokens so far, at least one.

    Returns:
        [B, 1, vocabulary] in the model's dtype; None, with nothing done, where the model's own forward has to do it.
    """
    num_sequences, position = len(input_ids), cache.get_seq_length()
    if attention_mask is not None and attention_mask.shape != (num_sequences, position + 1):
        return None
    weight = model.lm_head.weight
    if not decode.runs_on_kernels(weight) or nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return None
    try:
        head = _weight(model.lm_head, nn.Linear, weight.dtype)
        final_gain = _weight(model.model.norm, OlmoeRMSNorm, weight.dtype)
        if not is_plain(model.model, type(model.model)) or model.config._attn_implementation not in _ATTENTION:
            raise _UnknownError
        blocks = [
            _collect(cast(UltraMemDecoderLayer, block), layer, num_sequences, weight.dtype)
            for block, layer in zip(model.model.layers, cache.layers, strict=True)
        ]
    except _UnknownError:
        return None
    embedded = model.model.embed_tokens(input_ids)
    if position_ids is None:
        position_ids = torch.full((1, 1), position, device=input_ids.device)
    cosines, sines = model.model.rotary_emb(embedded, position_ids)
    residual_ND = embedded.squeeze(1).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    angles = (cosines.squeeze(1).float().contiguous(), sines.squeeze(1).float().contiguous())
    mask = None if attention_mask is None else attention_mask.bool().contiguous()
    _run_blocks(model, blocks, residual_ND, angles, position, mask)
    for layer in cache.layers:
        layer.set_length(position + 1)
    normed = decode.rms_norm(residual_ND, final_gain, model.config.rms_norm_eps)
    return decode.linear(normed, head, model.lm_head.bias).to(weight.dtype).unsqueeze(1)


def _run_blocks(
    model: "UltraMemForCausalLM",
    blocks: list[_Block],
    residual_ND: Tensor,
    angles: tuple[Tensor, Tensor],
    position: int,
    mask: Tensor | None,
) -> None:
    """Add the outputs of all blocks to the residual stream."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    pool = cast(MemoryPool, model.model.memory_pool)
    carried: list[tuple[int, Tensor]] = []
    for index, block in enumerate(blocks):
        keys, values = block.cache.reserve(1)
        decode.add_attention(
            residual_ND,
            decode.rms_norm(residual_ND, block.input_gain, config.rms_norm_eps),
            *block.attention,
            epsilon=config.rms_norm_eps,
            clip=config.clip_qkv,
            scaling=head_dim**-0.5,
            cosines_Nd=angles[0],
            sines_Nd=angles[1],
            keys_BHTd=keys,
            values_BHTd=values,
            position=position,
            mask_BT=mask,
        )
        normed_ND = decode.rms_norm(residual_ND, block.ffn_gain, config.rms_norm_eps)
        for memory, end in zip(block.memories, block.memory_ends, strict=True):
            if end == index:
                memory.add_output(residual_ND, normed_ND, pool)
            else:
                carried.append((end, torch.zeros_like(residual_ND)))
                memory.add_output(carried[-1][1], normed_ND, pool)
        if block.add_ffn is not None:
            block.add_ffn(residual_ND, normed_ND)
        for end, output_ND in carried:
            if end == index:
                residual_ND += output_ND


def _collect(block: UltraMemDecoderLayer, layer: ReservedLayer, num_sequences: int, dtype: torch.dtype) -> _Block:
    """The weights of a block. Raises _UnknownError."""
    _check(is_plain(block, UltraMemDecoderLayer))
    _check(layer.keys is not None and layer.keys.dtype == dtype and len(layer.keys) == num_sequences)
    attention = block.self_attn
    _check(is_plain(attention, OlmoeAttention))
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    weights = [_weight(linear, nn.Linear, dtype) for linear in linears]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    gains = [_weight(norm, OlmoeRMSNorm, dtype) for norm in (attention.q_norm, attention.k_norm)]
    return _Block(
        _weight(block.input_layernorm, OlmoeRMSNorm, dtype),
        _Attention(weights, biases, gains),
        _weight(block.post_attention_layernorm, OlmoeRMSNorm, dtype),
        None if block.mlp is None else _ffn(block.mlp, dtype),
        cast(list[MemoryLayer], list(block.memories)),
        block.memory_ends,
        layer,
    )


def _ffn(ffn: nn.Module, dtype: torch.dtype) -> AddOutput:
    """What adds the output of an FFN. Raises _UnknownError."""
    if is_plain(ffn, DenseFFN):
        _check(isinstance(ffn.act_fn, (nn.SiLU, SiLUActivation)))
        gate, up, down = (
            _weight(getattr(ffn, name), nn.Linear, dtype) for name in ("gate_proj", "up_proj", "down_proj")
        )
        return lambda residual_ND, x_ND: decode.add_gated_ffn(residual_ND, x_ND, gate, up, down)
    _check(is_plain(ffn, MoEFFN))
    router, experts = cast(OlmoeTopKRouter, ffn.gate), cast(OlmoeExperts, ffn.experts)
    _check(is_plain(experts, OlmoeExperts) and isinstance(experts.act_fn, (nn.SiLU, SiLUActivation)))
    router_weight = _weight(router, OlmoeTopKRouter, dtype)
    gate_up, down = (_checked(weight, dtype) for weight in (experts.gate_up_proj, experts.down_proj))

    def add(residual_ND: Tensor, x_ND: Tensor) -> None:
        weights_NA, index_NA = decode.linear(x_ND, router_weight).softmax(-1).topk(router.top_k)
        if router.norm_topk_prob:
            weights_NA = weights_NA / weights_NA.sum(-1, keepdim=True)
        decode.add_experts(residual_ND, x_ND, gate_up, down, index_NA, weights_NA)

    return add


def _weight(module: nn.Module, kind: type[nn.Module], dtype: torch.dtype) -> Tensor:
    """The weight of a plain module. Raises _UnknownError."""
    _check(is_plain(module, kind))
    return _checked(cast(Tensor, module.weight), dtype)


def _checked(weight: Tensor, dtype: torch.dtype) -> Tensor:
    _check(type(weight) in (Tensor, nn.Parameter) and weight.dtype == dtype and weight.is_contiguous())
    return weight


def _check(known: bool) -> None:
    if not known:
        raise _UnknownError
