"""AdamW with one parameter group per role family: tables, the keys that find their rows, and everything else."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import AdamW

from ultramem.training.config import OptimizerSection

GROUP_OF_ROLE = {"matrix": "dense", "norm": "dense", "embedding": "dense", "key": "keys", "table": "tables"}


def group_parameters(model: nn.Module, roles: Mapping[str, str]) -> dict[str, list[nn.Parameter]]:
    """Splits the trainable parameters by role.

    Args:
        model: the model.
        roles: role of every parameter by name, as :func:`ultramem.model.roles.parameter_roles` gives them.

    Returns:
        group name ("dense", "keys", "tables") → parameters; groups without parameters are left out. Each trainable
        parameter is in exactly one group, once.
    """
    named = dict(model.named_parameters())
    groups: dict[str, list[nn.Parameter]] = {"dense": [], "keys": [], "tables": []}
    for name, role in roles.items():
        if named[name].requires_grad:
            groups[GROUP_OF_ROLE[role]].append(named[name])
    grouped = [id(parameter) for parameters in groups.values() for parameter in parameters]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped)), "a parameter is in two optimizer groups"
    assert set(grouped) == trainable, "the optimizer groups do not cover every trainable parameter"
    return {name: parameters for name, parameters in groups.items() if parameters}


def build_optimizer(model: nn.Module, roles: Mapping[str, str], settings: OptimizerSection) -> AdamW:
    """AdamW over the groups of :func:`group_parameters`.

    Weight decay acts on every parameter, norms, embeddings and tables included, as in the published runs; through each
    group's own learning rate.
    """
    groups = [
        {"params": parameters, "name": name, **group_settings(settings)}
        for name, parameters in group_parameters(model, roles).items()
    ]
    # The fused step runs on CPU too, several times faster than the loop over tensors.
    return AdamW(groups, lr=settings.lr, fused=True)


def group_settings(settings: OptimizerSection) -> dict[str, Any]:
    """What the config says about a parameter group: these win over what a checkpoint remembers.

    ``initial_lr`` is the dense peak for all groups; multipliers belong to their schedules.
    """
    return {
        "lr": settings.lr,
        "initial_lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
