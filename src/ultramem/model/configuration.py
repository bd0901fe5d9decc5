"""UltraMemConfig: an OLMoE-style decoder with memory layers, in the names that transformers uses."""

from dataclasses import asdict, field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from ultramem.errors import ConfigError
from ultramem.layers import MEMORY_TYPES, MemoryConfig, Span, parse_placement
from ultramem.model.ffn import FFNConfig, MoEFFNConfig, make_ffn_config
from ultramem.model.presets import preset_settings
from ultramem.model.sections import make_section

_POSITIVE_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def make_memory_config(settings: dict[str, Any]) -> MemoryConfig:
    """Build the typed settings of a memory from a mapping whose ``type`` names a kind of memory.

    Raises:
        ConfigError: an unknown type or field, or a value of the wrong type; names the field and what is allowed.
    """
    return make_section("memory", "a memory", settings, {name: kind.config for name, kind in MEMORY_TYPES.items()})


def _check_rope_type(kind: object) -> None:
    allowed = ("default", *ROPE_INIT_FUNCTIONS)
    if kind not in allowed:
        raise ConfigError(f"rope_parameters.rope_type must be one of {', '.join(allowed)}; got {kind!r}.")


@strict
class UltraMemConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Settings of `UltraMemModel`; the defaults are a small, valid UltraMemV2 decoder.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: D.
        intermediate_size: inner width of the SwiGLU FFN (each of its two halves).
        num_hidden_layers: L, decoder blocks.
        num_attention_heads: attention heads; must divide ``hidden_size``.
        num_key_value_heads: heads of keys and values; None for ``num_attention_heads``.
        hidden_act: activation of the FFN's gate.
        max_position_embeddings: longest sequence, in tokens.
        initializer_range: standard deviation of linear layers and embeddings; None for √(2/(5D)), as published. Output
            projections of attention and FFN are divided by √(2L).
        rms_norm_eps: ε of the decoder's norms.
        rope_parameters: rotary embedding, as in transformers.
        attention_bias: biases in the attention's projections.
        attention_dropout: dropout of attention weights.
        clip_qkv: clips queries, keys and values; None for no clipping.
        tie_word_embeddings: one matrix for embedding and output.
        ffn: settings of the FFN, ``{"type": "dense"}`` or ``{"type": "moe", …}`` (see `MoEFFNConfig`).
        memory: settings of the memory layers (see the config class of its ``type``), None for a dense decoder.
    """

    model_type = "ultramem"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' own declaration

    vocab_size: int = 32_000
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float | None = None
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    clip_qkv: float | None = None
    ffn: dict[str, Any] | None = None
    memory: dict[str, Any] | None = field(default_factory=lambda: {"type": "ultramem_v2"})

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in defaults and check that sizes fit. Raises ConfigError naming the field."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name in _POSITIVE_SIZES:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.hidden_act not in ACT2FN:
            raise ConfigError(f"hidden_act must be one of {', '.join(ACT2FN)}; got {self.hidden_act!r}.")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise ConfigError(
                f"hidden_size / num_attention_heads must be even, for the rotary embedding turns pairs; got "
                f"{self.hidden_size} / {self.num_attention_heads}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})."
            )
        ffn = make_ffn_config(self.ffn)
        if isinstance(ffn, MoEFFNConfig):
            ffn.expert_size(self.intermediate_size)
            # transformers' own switch, which `from_pretrained` and `set_experts_implementation` change.
            if kwargs.get("experts_implementation") is None:
                kwargs["experts_implementation"] = ffn.experts_implementation
        self.ffn = asdict(ffn)
        if self.memory is not None:
            memory = make_memory_config(self.memory)
            # Every setting explicit: a saved model does not change when a default does.
            self.memory = asdict(memory)
            spans = parse_placement(memory.placement, self.num_hidden_layers)
            memory.check_sizes(len(spans))
            # Sizes that need the model's width.
            memory.dense_parameters(self.hidden_size, len(spans))
        # transformers reads the scaling of older files from `rope_scaling`, and its kind from `type`.
        rope = self.rope_parameters or kwargs.get("rope_scaling") or {}
        if isinstance(rope, dict):
            _check_rope_type(rope.get("rope_type", rope.get("type", "default")))
        kwargs["layer_types"] = self._cache_kinds()
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but refuses the settings of another architecture. Raises ConfigError."""
        if (kind := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            advice = " `ultramem.model.from_olmoe` converts it." if kind == "olmoe" else ""
            raise ConfigError(f"model_type must be {cls.model_type!r}; got {kind!r}.{advice}")
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "UltraMemConfig":
        """The settings of one of `ultramem.model.presets.PRESETS`.

        Args:
            name: of the preset.
            overrides: arguments that replace the preset's; mappings for ``memory`` and ``ffn`` are merged over the
                preset's, or stand alone if they name another ``type``.

        Raises:
            ConfigError: no such preset (names the nearest and lists all), or settings that do not fit together.
        """
        return cls(**preset_settings(name, **overrides))

    @property
    def ffn_config(self) -> FFNConfig:
        """The typed settings of the FFN."""
        return make_ffn_config(self.ffn)

    @property
    def memory_config(self) -> MemoryConfig | None:
        """The typed settings of the memories, None for a dense decoder."""
        return None if self.memory is None else make_memory_config(self.memory)

    @property
    def memory_spans(self) -> list[Span]:
        """One span of blocks per memory, in the memories' order; empty for a dense decoder."""
        memory = self.memory_config
        return [] if memory is None else parse_placement(memory.placement, self.num_hidden_layers)

    @property
    def replaced_blocks(self) -> set[int]:
        """Blocks without an FFN: a memory that starts there takes its place."""
        memory = self.memory_config
        replace = memory is not None and memory.position == "replace"
        return {span.start for span in self.memory_spans} if replace else set()

    def _cache_kinds(self) -> list[str]:
        # What the cache keeps for each block, in transformers' words: keys and values; where the queries of memories
        # look back, also the latest inputs of those memories. Plain data, for a compiled forward reads it.
        memory = self.memory_config
        looks_back = memory is not None and memory.num_past_tokens > 0
        starts = {span.start for span in self.memory_spans} if looks_back else set()
        return ["hybrid" if block in starts else "full_attention" for block in range(self.num_hidden_layers)]

    @property
    def linear_std(self) -> float:
        """Standard deviation of linear layers and embeddings at initialisation."""
        return self.initializer_range if self.initializer_range is not None else (2 / (5 * self.hidden_size)) ** 0.5
