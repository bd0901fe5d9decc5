"""The language model: configuration, decoder, parameter roles and costs; registered with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ultramem.model.accounting import CostCard, cost_card
from ultramem.model.configuration import UltraMemConfig
from ultramem.model.modeling import UltraMemForCausalLM, UltraMemModel
from ultramem.model.olmoe import from_olmoe, to_olmoe
from ultramem.model.roles import parameter_roles

AutoConfig.register("ultramem", UltraMemConfig, exist_ok=True)
AutoModel.register(UltraMemConfig, UltraMemModel, exist_ok=True)
AutoModelForCausalLM.register(UltraMemConfig, UltraMemForCausalLM, exist_ok=True)

__all__ = [
    "CostCard",
    "UltraMemConfig",
    "UltraMemForCausalLM",
    "UltraMemModel",
    "cost_card",
    "from_olmoe",
    "parameter_roles",
    "to_olmoe",
]
