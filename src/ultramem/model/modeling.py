"""The decoder and the language model: blocks, the pool of rows that their memories read, initialisation, loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.olmoe.modeling_olmoe import (
    OlmoeAttention,
    OlmoeExperts,
    OlmoeRMSNorm,
    OlmoeRotaryEmbedding,
    OlmoeTopKRouter,
)
from transformers.utils.generic import ModelOutput, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ultramem.errors import ConfigError
from ultramem.layers import MEMORY_TYPES, MemoryLayer, MemoryPool, Statistics, add_losses, draw_pool
from ultramem.layers.retrieval import is_loaded
from ultramem.layers.table import TableGradients
from ultramem.model.block import UltraMemDecoderLayer
from ultramem.model.cache import DecodingCache, ReservingGenerationMixin
from ultramem.model.configuration import UltraMemConfig
from ultramem.model.decoding import decode_step
from ultramem.model.ffn import MoEFFNConfig, router_losses


@dataclass
class UltraMemModelOutput(ModelOutput):
    """What the decoder returns.

    Attributes:
        last_hidden_state: [B, T, D] after the final norm.
        past_key_values: the KV cache, if one is used.
        hidden_states: one [B, T, D] per block and the last, if asked for.
        attentions: attention weights per block, if asked for (eager attention).
        auxiliary_losses: weighted auxiliary losses of memories and routers, summed over them, scalars by name.
        memory_statistics: one mapping per memory, if asked for by ``output_memory_statistics``.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    auxiliary_losses: dict[str, Tensor] | None = None
    memory_statistics: tuple[dict[str, Tensor], ...] | None = None


@dataclass
class UltraMemCausalLMOutput(ModelOutput):
    """What the language model returns; fields as in `UltraMemModelOutput`.

    Attributes:
        loss: mean next-token cross-entropy plus the auxiliary losses, if labels were given.
        logits: [B, T, vocabulary].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    auxiliary_losses: dict[str, Tensor] | None = None
    memory_statistics: tuple[dict[str, Tensor], ...] | None = None


class UltraMemPreTrainedModel(PreTrainedModel):
    """What both models share: configuration, initialisation, what they support."""

    config: UltraMemConfig
    config_class = UltraMemConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["UltraMemDecoderLayer"]  # noqa: RUF012 - transformers' own declaration
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - transformers' own declaration
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The buffers of the retrievals, as in every other cast.
    _keep_in_fp32_modules_strict = [  # noqa: RUF012 - transformers' own declaration
        "row_direction",
        "col_direction",
        "query_mean",
        "query_variance",
    ]
    _can_record_outputs = {  # noqa: RUF012 - transformers' own declaration
        "hidden_states": UltraMemDecoderLayer,
        "attentions": OutputRecorder(OlmoeAttention, index=1),
    }

    def gradient_checkpointing_enable(  # type: ignore[override]
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As in transformers, but refuses reentrant checkpointing.

        Raises:
            ConfigError: ``use_reentrant=True``; it would silently lose the gradients of spans and auxiliary losses,
                which leave a block beside its hidden states.
        """
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ConfigError(
                "gradient checkpointing with use_reentrant=True loses gradients of the memories; "
                "leave it out or set it to False."
            )
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers then calls ``_init_weights`` for every module.

        For code from elsewhere it skips modules without parameters of their own, because it cannot know that their
        initialisers leave loaded tensors alone; ours do, and blocks and the decoder have to be visited.
        """
        return False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for experts in the source of this file; ours come from OLMoE's.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Children come before their parents: a block rescales its output projections and a memory draws its own linears
        # after the generic rule; tensors that came from a checkpoint are skipped by the initialisers of transformers.
        std = self.config.linear_std
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, UltraMemDecoderLayer):
            scaled = std / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.self_attn.o_proj.weight, std=scaled)
            if module.mlp is not None:
                init.normal_(module.mlp.output_weight, std=scaled)
        elif isinstance(module, OlmoeTopKRouter):
            init.normal_(module.weight, std=std)
        elif isinstance(module, OlmoeExperts):
            init.normal_(module.gate_up_proj, std=std)
        elif isinstance(module, nn.Conv1d):
            # The memory that owns it draws it.
            pass
        elif isinstance(module, MemoryLayer):
            module.reset_parameters()
        elif isinstance(module, UltraMemModel):
            module.reset_pool()
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]


class UltraMemModel(UltraMemPreTrainedModel):
    """The decoder without its output layer; owns the pool of rows that its memories read."""

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([UltraMemDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = OlmoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = OlmoeRotaryEmbedding(config)  # type: ignore[no-untyped-call,arg-type]
        self.ffn_config = config.ffn_config
        self.memory_pool: MemoryPool | None = None
        if (memory := config.memory_config) is not None:
            layer = MEMORY_TYPES[memory.type].layer
            self.memory_pool = layer.make_pool(config.hidden_size, memory, len(config.memory_spans), draw=False)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def memories(self) -> list[MemoryLayer]:
        """The memory layers, in the order of their spans."""
        blocks = cast(list[UltraMemDecoderLayer], list(self.layers))
        return [cast(MemoryLayer, memory) for block in blocks for memory in block.memories]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "UltraMemModel":
        # transformers loads the rotary frequencies in fp32 whatever the dtype; a cast must not make them bf16, in which
        # the angle at position 1,000 is off by whole radians.
        before = dict(self.rotary_emb.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = getattr(self.rotary_emb, name)
            if after.dtype != buffer.dtype:
                setattr(self.rotary_emb, name, buffer.to(device=after.device))
        return self

    def refresh_retrieval(self) -> None:
        """Recompute every memory's coarse directions from its cores; call after each optimizer step."""
        for memory in self.memories:
            memory.refresh_retrieval()

    def set_table_gradients(self, mode: TableGradients) -> None:
        """Choose how the pool's gradients are kept: ``dense`` or ``rows`` (see `MemoryPool`)."""
        if self.memory_pool is not None:
            self.memory_pool.set_table_gradients(mode)

    @torch.no_grad()
    def reset_pool(self) -> None:
        """Draw the pool's rows with the standard deviation that the config's scheme asks for."""
        pool = self.memory_pool
        if pool is None or pool.values.is_meta or all(is_loaded(table) for table in pool.parameters()):
            return
        ffn_ratio = self.config.intermediate_size / self.config.hidden_size
        draw_pool(pool, self.memories, self.config.num_hidden_layers, ffn_ratio)

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_memory_statistics: Statistics = False,
        **kwargs: Any,
    ) -> UltraMemModelOutput:
        """Run the decoder on token ids or embeddings.

        Args:
            input_ids: [B, T] int64; exactly one of it and ``inputs_embeds``.
            attention_mask: [B, T], one where a token is real; or what `transformers` accepts or makes in its place.
            position_ids: [B, T] or [1, T]; None continues the cache.
            past_key_values: KV cache to extend.
            inputs_embeds: [B, T, D].
            use_cache: return a KV cache.
            output_memory_statistics: return each memory's statistics; ``"recall"`` for that of the search too.
            **kwargs: passed to the attention of every block.

        Raises:
            ValueError: both or none of ``input_ids`` and ``inputs_embeds``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen).unsqueeze(0)
        mask, padding_mask = self._masks(hidden_states, attention_mask, past_key_values, position_ids)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        carried: list[tuple[int, Tensor]] = []
        losses: dict[str, Tensor] = {}
        statistics: list[dict[str, Tensor]] = []
        router_logits: list[Tensor] = []
        for block in cast(list[UltraMemDecoderLayer], list(self.layers)):
            hidden_states, results, logits = block(
                hidden_states,
                arriving=tuple(output for end, output in carried if end == block.layer_idx),
                pool=self.memory_pool,
                output_memory_statistics=output_memory_statistics,
                padding_mask=padding_mask,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            if logits is not None:
                router_logits.append(logits)
            for result, end in zip(results, block.memory_ends, strict=True):
                if end > block.layer_idx:
                    carried.append((end, result.output))
                add_losses(losses, result.losses)
                statistics.append(result.statistics)
        if isinstance(self.ffn_config, MoEFFNConfig) and router_logits:
            losses |= router_losses(tuple(router_logits), self.ffn_config, padding_mask)
        return UltraMemModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            auxiliary_losses=losses or None,
            memory_statistics=tuple(statistics) if output_memory_statistics else None,
        )

    def _masks(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        past_key_values: Cache | None,
        position_ids: Tensor,
    ) -> tuple[Any, Tensor | None]:
        """What attention takes, and where tokens are real: [B, past and present tokens], None if nobody says."""
        if isinstance(attention_mask, dict):
            # `generate` with a static cache makes the masks beforehand, one for each need in `layer_types`.
            return attention_mask["full_attention"], attention_mask.get("linear_attention")
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        return mask, attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None


class UltraMemForCausalLM(UltraMemPreTrainedModel, ReservingGenerationMixin):
    """The decoder with its output layer: trains, evaluates, generates and is served as it is."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' own declaration

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__(config)
        self.model = UltraMemModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def refresh_retrieval(self) -> None:
        """See `UltraMemModel.refresh_retrieval`."""
        self.model.refresh_retrieval()

    def set_table_gradients(self, mode: TableGradients) -> None:
        """See `UltraMemModel.set_table_gradients`."""
        self.model.set_table_gradients(mode)

    @property
    def num_slots_per_memory(self) -> list[int]:
        """Virtual slots that each memory addresses."""
        return [memory.num_slots for memory in self.model.memories]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_memory_statistics: Statistics = False,
        **kwargs: Any,
    ) -> UltraMemCausalLMOutput:
        """Predict the next token; arguments as in `UltraMemModel.forward`.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T].
            position_ids: [B, T] or [1, T].
            past_key_values: KV cache to extend.
            inputs_embeds: [B, T, D].
            labels: [B, T] token ids, shifted here; −100 is ignored. With labels the result has a loss.
            use_cache: return a KV cache.
            logits_to_keep: compute only the last so many positions' logits, or those of the given indices; 0 for all.
            output_memory_statistics: return each memory's statistics; ``"recall"`` for that of the search too.
            **kwargs: passed to the loss and to the attention of every block.
        """
        plain_step = (
            isinstance(past_key_values, DecodingCache)
            and not (self.training or output_memory_statistics or labels is not None)
            and isinstance(logits_to_keep, int)
            and use_cache is not False
            and not (self.config.output_hidden_states or self.config.output_attentions)
            and all(value is None or value is False for value in kwargs.values())
        )
        if plain_step and input_ids is not None and inputs_embeds is None and input_ids.shape[1] == 1:
            logits = decode_step(self, input_ids, position_ids, attention_mask, cast(DecodingCache, past_key_values))
            if logits is not None:
                return UltraMemCausalLMOutput(logits=logits, past_key_values=past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_memory_statistics=output_memory_statistics,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            # Trainers that accumulate gradients divide the cross-entropy by the targets of the whole batch; a
            # micro-batch then adds its share of the auxiliary losses.
            num_targets = kwargs.get("num_items_in_batch")
            share = 1.0 if num_targets is None else (labels[..., 1:] != -100).sum() / num_targets
            loss = loss + share * sum((outputs.auxiliary_losses or {}).values())
        return UltraMemCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            auxiliary_losses=outputs.auxiliary_losses,
            memory_statistics=outputs.memory_statistics,
        )
