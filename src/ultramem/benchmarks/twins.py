"""The models that are compared: UltraMemV2, the dense decoder and OLMoE's mixture of experts at equal cost and size."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Olmo2Config, Olmo2ForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from ultramem.benchmarks.measure import CPU_DEVICE
from ultramem.benchmarks.targets import DENSE, MOE, OLMO2, OLMOE, V2
from ultramem.errors import ConfigError
from ultramem.model import UltraMemConfig, UltraMemForCausalLM, cost_card
from ultramem.model.ffn import MoEFFNConfig

NAMES = (V2, DENSE, MOE)
FAMILIES = {
    **{size: (f"{size}-ultramem_v2", f"{size}-dense", f"{size}-moe") for size in ("tiny", "small", "base")},
    "227m": ("ultramem_v2-227m-1.2b", "dense-227m", "olmoe-227m-1.2b"),
    "1b": ("ultramem_v2-1b-7b", "dense-1b", "olmoe-1b-7b"),
}
"""Presets of `NAMES`, in that order."""
MOST_KEYS, MOST_EXPERTS = 2**14, 2**16
# Of the wanted number of parameters.
SIZE_TOLERANCE = 0.1
# FFN widths that vector instructions like.
WIDTH_STEP = 16

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
    "memory",
    "ffn",
)


@dataclass(frozen=True)
class ModelCost:
    """What the project's accounting says of a model.

    Attributes:
        name: of the model.
        active_parameters: see `ultramem.model.accounting.CostCard`.
        total_parameters: the same.
        flops_per_token: of a forward, without attention over a context.
    """

    name: str
    active_parameters: int
    total_parameters: int
    flops_per_token: int


def model_cost(name: str, config: UltraMemConfig) -> ModelCost:
    """The cost of one of our models."""
    card = cost_card(config)
    return ModelCost(name, card.active_parameters, card.total_parameters, card.flops_per_token())


def family_configs(family: str, num_layers: int | None = None) -> dict[str, UltraMemConfig]:
    """The three members of a family of presets: equal FLOPs per token, and equal size of all but the dense one.

    Args:
        family: one of `FAMILIES`.
        num_layers: blocks; None for the family's own number.

    Raises:
        ConfigError: no such family.
    """
    if family not in FAMILIES:
        raise ConfigError(f"there is no family of models {family!r}; there are {', '.join(FAMILIES)}.")
    overrides: dict[str, Any] = {} if num_layers is None else {"num_hidden_layers": num_layers}
    # Room for the token after the longest cache.
    overrides["max_position_embeddings"] = 4096
    return {
        name: UltraMemConfig.from_preset(preset, **overrides)
        for name, preset in zip(NAMES, FAMILIES[family], strict=True)
    }


def with_sparse_ratio(configs: dict[str, UltraMemConfig], ratio: float) -> dict[str, UltraMemConfig]:
    """The same models with about ``ratio`` times as many sparse parameters as the dense one has parameters.

    The mixture gets more experts, the memory more rows, and narrower FFNs, so that a token's FLOPs stay those of the
    dense model. The routers of large mixtures cost a few per cent more.

    Args:
        configs: UltraMemV2, dense twin and MoE twin, by these names.
        ratio: parameters of UltraMemV2 and of the MoE beyond those of the dense twin, over the latter; more than 0.

    Raises:
        ConfigError: no size of UltraMemV2 or the MoE has that ratio.
    """
    dense = cost_card(configs[DENSE])
    wanted = round((1 + ratio) * dense.total_parameters)
    moe, v2, ffn = configs[MOE], configs[V2], configs[MOE].ffn_config
    assert isinstance(ffn, MoEFFNConfig)
    assert v2.memory is not None

    def with_experts(count: int) -> UltraMemConfig:
        return _replace(moe, ffn={**(moe.ffn or {}), "num_experts": count})

    def with_keys(side: int) -> UltraMemConfig:
        return _with_keys(v2, side, dense.flops_per_token())

    found = {
        V2: with_keys(_search(lambda side: _size(with_keys(side)), wanted, v2.memory["top_k"], MOST_KEYS)),
        DENSE: configs[DENSE],
        MOE: with_experts(
            _search(lambda count: _size(with_experts(count)), wanted, ffn.num_experts_per_tok, MOST_EXPERTS)
        ),
    }
    for name in (V2, MOE):
        reached = _size(found[name]) / dense.total_parameters - 1
        if abs((1 + reached) / (1 + ratio) - 1) > SIZE_TOLERANCE:
            raise ConfigError(
                f"no {name} has {ratio:g} times the dense model's parameters in sparse ones: the nearest has "
                f"{reached:.2f} times as many."
            )
    return found


def _size(config: UltraMemConfig) -> int:
    return cost_card(config).total_parameters


def _replace(config: UltraMemConfig, **settings: Any) -> UltraMemConfig:
    return UltraMemConfig(**{**{name: getattr(config, name) for name in _SIZES}, **settings})


def _with_keys(config: UltraMemConfig, num_keys: int, flops_per_token: int) -> UltraMemConfig:
    """UltraMemV2 with so many keys a side, and the FFN width whose FLOPs per token are nearest to the given ones."""
    assert config.memory is not None
    memory = {**config.memory, "num_keys": num_keys}
    narrow = cost_card(_replace(config, memory=memory, intermediate_size=WIDTH_STEP)).flops_per_token()
    per_step = 6 * config.hidden_size * WIDTH_STEP * config.num_hidden_layers
    steps = max(1, 1 + round((flops_per_token - narrow) / per_step))
    return _replace(config, memory=memory, intermediate_size=WIDTH_STEP * steps)


def _search(size_of: Callable[[int], int], wanted: int, low: int, high: int) -> int:
    """The whole number in [low, high] whose size is nearest to the wanted one; sizes grow with it."""
    while low < high:
        middle = (low + high) // 2
        if size_of(middle) < wanted:
            low = middle + 1
        else:
            high = middle
    return min((low, max(1, low - 1)), key=lambda number: abs(size_of(number) - wanted))


def build_model(
    config: UltraMemConfig, dtype: torch.dtype = torch.bfloat16, device: torch.device = CPU_DEVICE
) -> UltraMemForCausalLM:
    """A random model in evaluation mode, its search refreshed."""
    torch.manual_seed(0)
    # Drawn where it stays: the largest take minutes elsewhere.
    with device:
        model = UltraMemForCausalLM(config).to(dtype).eval()
    model.refresh_retrieval()
    return model


def build_olmo2(
    config: UltraMemConfig, dtype: torch.dtype = torch.bfloat16, device: torch.device = CPU_DEVICE
) -> PreTrainedModel:
    """OLMo 2 of transformers at the sizes of a dense decoder, as it comes."""
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = Olmo2ForCausalLM(
            Olmo2Config(intermediate_size=config.intermediate_size, **_common(config))
        )
    return model.to(dtype).eval()


def build_olmoe(
    config: UltraMemConfig, dtype: torch.dtype = torch.bfloat16, device: torch.device = CPU_DEVICE
) -> PreTrainedModel:
    """OLMoE of transformers at the sizes of a decoder with a mixture of experts, as it comes."""
    ffn = config.ffn_config
    assert isinstance(ffn, MoEFFNConfig)
    torch.manual_seed(0)
    olmoe_config = OlmoeConfig(
        intermediate_size=ffn.expert_size(config.intermediate_size),
        num_experts=ffn.num_experts,
        num_experts_per_tok=ffn.num_experts_per_tok,
        **_common(config),
    )
    with device:
        model: PreTrainedModel = OlmoeForCausalLM(olmoe_config)
    return model.to(dtype).eval()


def _common(config: UltraMemConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        # The defaults are ids of a larger vocabulary.
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


BUILDERS: dict[str, tuple[str, Callable[..., PreTrainedModel]]] = {
    V2: (V2, build_model),
    DENSE: (DENSE, build_model),
    MOE: (MOE, build_model),
    OLMO2: (DENSE, build_olmo2),
    OLMOE: (MOE, build_olmoe),
}
"""How each competitor is made: whose config it takes, and its constructor."""
