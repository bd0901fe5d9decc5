"""Interchange with OLMoE: its checkpoints become our decoder without memories, and back, with the same logits."""

import copy
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, OlmoeConfig, OlmoeForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from ultramem.errors import CheckpointError, ConfigError
from ultramem.model.configuration import UltraMemConfig
from ultramem.model.ffn import MoEFFNConfig
from ultramem.model.modeling import UltraMemForCausalLM

# What both configurations call by one name. The width of the FFN is not among them: OLMoE's is that of one expert.
_COMMON_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "clip_qkv",
)
_FFN_FIELDS = ("num_experts", "num_experts_per_tok", "norm_topk_prob", "router_aux_loss_coef")


def config_from_olmoe(config: OlmoeConfig) -> UltraMemConfig:
    """The settings of our decoder that OLMoE's describe.

    ``intermediate_size`` becomes what a token's experts have in all. The weight of the router's z-loss, which
    transformers' OLMoE does not know, is the published one.
    """
    return UltraMemConfig(
        **_pick(config, _COMMON_FIELDS),
        initializer_range=config.initializer_range,
        intermediate_size=config.intermediate_size * config.num_experts_per_tok,
        ffn={"type": "moe", "intermediate_size": config.intermediate_size, **_pick(config, _FFN_FIELDS)},
        memory=None,
    )


def config_to_olmoe(config: UltraMemConfig) -> OlmoeConfig:
    """OLMoE's settings of a decoder without memories whose FFN is a mixture of experts.

    Raises:
        ConfigError: the decoder has memories or a dense FFN, which OLMoE has not.
    """
    ffn = config.ffn_config
    if config.memory is not None:
        raise ConfigError(
            f"memory is of type {config.memory['type']!r}; OLMoE has no memories. Only a model with `memory: null` can "
            "become one."
        )
    if not isinstance(ffn, MoEFFNConfig):
        raise ConfigError(
            f"ffn.type is {ffn.type!r}; OLMoE's FFN is a mixture of experts. Only a model with `ffn.type: moe` can "
            "become one."
        )
    return OlmoeConfig(
        **_pick(config, _COMMON_FIELDS),
        initializer_range=config.linear_std,
        intermediate_size=ffn.expert_size(config.intermediate_size),
        **_pick(ffn, _FFN_FIELDS),
    )


def from_olmoe(source: OlmoeForCausalLM | str | Path) -> UltraMemForCausalLM:
    """Make our decoder from an OLMoE model; the logits are the same to the bit.

    Args:
        source: a model, whose weights are copied, or where ``OlmoeForCausalLM.from_pretrained`` finds one.

    Returns:
        A model in evaluation mode, in the dtype and on the device of the source.

    Raises:
        CheckpointError: there is no model at ``source``.
        ConfigError: the model there is no OLMoE.
    """
    if not isinstance(source, OlmoeForCausalLM):
        source = _load(source)
    return cast(UltraMemForCausalLM, _copy_into(UltraMemForCausalLM, config_from_olmoe(source.config), source))


def to_olmoe(model: UltraMemForCausalLM) -> OlmoeForCausalLM:
    """Make an OLMoE model, which saves itself as OLMoE's checkpoints are; the logits are the same to the bit.

    Args:
        model: a decoder without memories whose FFN is a mixture of experts; its weights are copied.

    Returns:
        A model in evaluation mode, in the dtype and on the device of ``model``.

    Raises:
        ConfigError: the model has memories or a dense FFN, which OLMoE has not.
    """
    return cast(OlmoeForCausalLM, _copy_into(OlmoeForCausalLM, config_to_olmoe(model.config), model))


def _pick(config: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(config, name)) for name in names}


def _load(source: str | Path) -> OlmoeForCausalLM:
    try:
        config = AutoConfig.from_pretrained(source)
        if isinstance(config, OlmoeConfig):
            return OlmoeForCausalLM.from_pretrained(source)
    except OSError as error:
        raise CheckpointError(
            f"no OLMoE model can be read at {str(source)!r} ({' '.join(str(error).split())}). Name a folder that "
            "`OlmoeForCausalLM.save_pretrained` wrote, or a model of the Hub."
        ) from error
    raise ConfigError(f"{str(source)!r} holds a model of type {config.model_type!r}; expected 'olmoe'.")


def _copy_into(kind: type[PreTrainedModel], config: Any, source: PreTrainedModel) -> PreTrainedModel:
    with no_init_weights():
        model: PreTrainedModel = kind._from_config(config, dtype=source.dtype)  # type: ignore[no-untyped-call]
    model.tie_weights()
    model.load_state_dict(source.state_dict())
    model.generation_config = copy.deepcopy(source.generation_config)
    return cast(PreTrainedModel, model.to(source.device).eval())  # type: ignore[arg-type]
