"""AdamW with one parameter group per role family: tables, the keys that find their rows, and everything else."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import AdamW

from ultramem.layers import MemoryPool
from ultramem.ops import RowGradients
from ultramem.training.config import OptimizerSection, TableGradients
from ultramem.training.moments import MOMENT_TYPES
from ultramem.training.row_adamw import RowAdamW

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


def collect_row_gradients(model: nn.Module) -> dict[nn.Parameter, RowGradients]:
    """Makes all pools of a model collect their gradients as rows, and returns the trainable tables' collectors.

    A frozen table gets none: nothing would ever clear it.
    """
    collectors: dict[nn.Parameter, RowGradients] = {}
    for pool in model.modules():
        if not isinstance(pool, MemoryPool):
            continue
        pool.set_table_gradients("rows")
        for table, name in ((pool.values, "value_gradients"), (pool.pre_values, "pre_value_gradients")):
            if table is not None and table.requires_grad:
                collectors[table] = getattr(pool, name)
            else:
                setattr(pool, name, None)
    return collectors


def build_optimizer(
    model: nn.Module, roles: Mapping[str, str], settings: OptimizerSection, table_gradients: TableGradients = "dense"
) -> AdamW:
    """AdamW over the groups of :func:`group_parameters`; with ``rows`` the tables' part is row-wise.

    Weight decay acts on every parameter, norms, embeddings and tables included, as in the published runs; through each
    group's own learning rate.
    """
    parameters_of = group_parameters(model, roles)
    groups = [
        {"params": parameters, "name": name, **group_settings(settings)} for name, parameters in parameters_of.items()
    ]
    if table_gradients == "rows":
        collectors = collect_row_gradients(model)
        tables = parameters_of.get("tables", [])
        assert {id(table) for table in collectors} == {id(table) for table in tables}, "not every table has a collector"
        return RowAdamW(groups, collectors, MOMENT_TYPES[settings.table_moments](), lr=settings.lr)
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
