"""Decoding on CPUs: the next token of every sequence by kernels that read the weights where they are.

A step is a function of the model as it stands. Weights are read where they are, and collected anew whenever a module or
a parameter is not what it was in the step before, so that nothing can be out of date. Whatever it does not know is left
to the model's own forward: hooks, adapters, quantised or sharded weights, other devices and dtypes.
"""

from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import TYPE_CHECKING, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, OlmoeExperts, OlmoeRMSNorm, OlmoeTopKRouter

from ultramem.layers import AddOutput, MemoryLayer, MemoryPool
from ultramem.layers.plain import is_plain
from ultramem.layers.retrieval import Retrieval
from ultramem.model.block import UltraMemDecoderLayer
from ultramem.model.cache import DecodingCache
from ultramem.model.ffn import DenseFFN, MoEFFN
from ultramem.ops import decode

if TYPE_CHECKING:
    from ultramem.model.modeling import UltraMemForCausalLM

# Attention of these names computes what the kernel computes.
_ATTENTION = ("sdpa", "eager")
_KIND = attrgetter("dtype", "is_cpu")


class _UnknownError(Exception):
    """Something that the kernels cannot stand in for."""


class _Attention(NamedTuple):
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    gains: Sequence[Tensor]


class _Block(NamedTuple):
    """The weights of one block."""

    input_gain: Tensor
    attention: _Attention
    ffn_gain: Tensor
    add_ffn: AddOutput | None
    memories: list[AddOutput]
    memory_ends: list[int]


class _Weights:
    """What a step reads of a model, for as long as `are_current` says so.

    Args:
        model: which is not kept alive.

    Raises:
        _UnknownError: something in it is not known.
    """

    def __init__(self, model: "UltraMemForCausalLM") -> None:
        decoder, head = model.model, model.lm_head
        self._modules = [*decoder.modules(), *head.modules()]
        # Looking these up in every step would take longer than looking into them.
        attributes = [module.__dict__ for module in self._modules]
        members = [each[name] for each in attributes for name in ("_modules", "_parameters", "_buffers")]
        members.append(model._modules)
        hooks = [each[name] for each in attributes for name in ("_forward_hooks", "_forward_pre_hooks")]
        self._attributes = attributes
        self._empty = hooks + [each for each in members if not each]
        self._filled = [each for each in members if each]
        self._filled += [vars(each) for each in self._modules if isinstance(each, (MemoryLayer, MemoryPool, Retrieval))]
        self._tensors = [*decoder.parameters(), *decoder.buffers(), *head.parameters()]
        self._members, self._facts = list(self._look_at_members()), self._look()
        dtype = head.weight.dtype
        _check(is_plain(decoder, type(decoder)))
        self.head = _weight(head, nn.Linear, dtype)
        self.final_gain = _weight(decoder.norm, OlmoeRMSNorm, dtype)
        pool = cast(MemoryPool | None, decoder.memory_pool)
        self.blocks = [_collect(cast(UltraMemDecoderLayer, block), pool, dtype) for block in decoder.layers]

    def are_current(self) -> bool:
        """Whether modules and parameters are those that were collected; what is in the parameters may have changed."""
        return (
            not any(self._empty)
            and all(map(is_, chain(self._look_at_members(), (self,)), chain(self._members, (self,))))
            and self._look() == self._facts
        )

    # Loops in C, both: they go over a thousand things in every step.

    def _look_at_members(self) -> Iterable[object]:
        """What must stay the very same: submodules, parameters and buffers, and whatever memories are set to."""
        return chain.from_iterable(map(dict.values, self._filled))

    def _look(self) -> tuple[list[object], ...]:
        """What must stay equal: classes, methods that were put in the place of others, the kind of all tensors."""
        return (
            list(map(type, self._modules)),
            list(map(dict.__contains__, self._attributes, repeat("forward"))),
            list(map(_KIND, self._tensors)),
            list(map(Tensor.is_contiguous, self._tensors)),
        )


_collected: WeakKeyDictionary[nn.Module, _Weights] = WeakKeyDictionary()


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
        for layer in cache.layers:
            _check(layer.keys is not None and layer.keys.dtype == weight.dtype and len(layer.keys) == num_sequences)
        _check(model.config._attn_implementation in _ATTENTION)
        weights = _weights_of(model)
    except _UnknownError:
        return None
    embedded = model.model.embed_tokens(input_ids)
    if position_ids is None:
        position_ids = torch.full((1, 1), position, device=input_ids.device)
    cosines, sines = model.model.rotary_emb(embedded, position_ids)
    residual_ND = embedded.squeeze(1).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    angles = (cosines.squeeze(1).float().contiguous(), sines.squeeze(1).float().contiguous())
    mask = None if attention_mask is None else attention_mask.bool().contiguous()
    _run_blocks(model, weights.blocks, cache, residual_ND, angles, position, mask)
    for layer in cache.layers:
        layer.set_length(position + 1)
    normed = decode.rms_norm(residual_ND, weights.final_gain, model.config.rms_norm_eps)
    return decode.linear(normed, weights.head, model.lm_head.bias).to(weight.dtype).unsqueeze(1)


def _run_blocks(
    model: "UltraMemForCausalLM",
    blocks: list[_Block],
    cache: DecodingCache,
    residual_ND: Tensor,
    angles: tuple[Tensor, Tensor],
    position: int,
    mask: Tensor | None,
) -> None:
    """Add the outputs of all blocks to the residual stream."""
    config = model.config
    # Each look into a configuration of transformers takes as long as a small kernel.
    epsilon, clip, scaling = (
        config.rms_norm_eps,
        config.clip_qkv,
        (config.hidden_size // config.num_attention_heads) ** -0.5,
    )
    carried: list[tuple[int, Tensor]] = []
    for index, block in enumerate(blocks):
        keys, values = cache.layers[index].reserve(1)
        decode.add_attention(
            residual_ND,
            decode.rms_norm(residual_ND, block.input_gain, epsilon),
            *block.attention,
            epsilon=epsilon,
            clip=clip,
            scaling=scaling,
            cosines_Nd=angles[0],
            sines_Nd=angles[1],
            keys_BHTd=keys,
            values_BHTd=values,
            position=position,
            mask_BT=mask,
        )
        normed_ND = decode.rms_norm(residual_ND, block.ffn_gain, epsilon)
        for add_memory, end in zip(block.memories, block.memory_ends, strict=True):
            if end == index:
                add_memory(residual_ND, normed_ND)
            else:
                carried.append((end, torch.zeros_like(residual_ND)))
                add_memory(carried[-1][1], normed_ND)
        if block.add_ffn is not None:
            block.add_ffn(residual_ND, normed_ND)
        for end, output_ND in carried:
            if end == index:
                residual_ND += output_ND


def _weights_of(model: "UltraMemForCausalLM") -> _Weights:
    """What a step reads of a model as it stands. Raises _UnknownError."""
    weights = _collected.get(model)
    if weights is None or not weights.are_current():
        weights = _collected[model] = _Weights(model)
    return weights


def _collect(block: UltraMemDecoderLayer, pool: MemoryPool | None, dtype: torch.dtype) -> _Block:
    """The weights of a block. Raises _UnknownError."""
    _check(is_plain(block, UltraMemDecoderLayer))
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
        [_memory(cast(MemoryLayer, memory), cast(MemoryPool, pool)) for memory in block.memories],
        block.memory_ends,
    )


def _memory(memory: MemoryLayer, pool: MemoryPool) -> AddOutput:
    """What adds the output of a memory, whatever it is."""
    return memory.output_kernel(pool) or (lambda residual_ND, x_ND: memory.add_output(residual_ND, x_ND, pool))


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
