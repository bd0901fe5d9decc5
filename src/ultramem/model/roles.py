"""The role of every parameter, read from the modules that make them; optimizer groups are built on it."""

from typing import Literal, get_args

from torch import nn
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts, OlmoeRMSNorm, OlmoeTopKRouter

Role = Literal["matrix", "norm", "embedding", "key", "table"]

_ROLES_OF_OTHERS: dict[type[nn.Module], dict[str, Role]] = {
    nn.Linear: {"weight": "matrix", "bias": "norm"},
    nn.Embedding: {"weight": "embedding"},
    nn.Conv1d: {"weight": "matrix", "bias": "norm"},
    OlmoeRMSNorm: {"weight": "norm"},
    OlmoeTopKRouter: {"weight": "matrix"},
    OlmoeExperts: {"gate_up_proj": "matrix", "down_proj": "matrix"},
}


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of each parameter by its name in ``model.named_parameters()``; a shared parameter appears once.

    Our modules declare ``parameter_roles`` where they make their parameters; modules of torch and transformers are
    listed here by their type.

    Raises:
        TypeError: a module owns a parameter for which no role is declared.
    """
    roles: dict[str, Role] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        declared = getattr(module, "parameter_roles", None) or _ROLES_OF_OTHERS.get(type(module), {})
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if declared.get(name) not in get_args(Role):
                raise TypeError(f"{type(module).__name__} at {path!r} declares no role for its parameter {name!r}.")
            roles[f"{path}.{name}" if path else name] = declared[name]
    return roles
