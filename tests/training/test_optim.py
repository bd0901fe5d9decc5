"""Optimizer groups cover every parameter once, with weight decay on all of them."""

import pytest
import torch
from torch import nn

from tiny_training import tiny_model
from ultramem.model.roles import parameter_roles
from ultramem.training.config import OptimizerSection
from ultramem.training.optim import build_optimizer, group_parameters
from ultramem.training.row_adamw import RowAdamW


def test_groups_cover_a_memory_model():
    model = tiny_model()
    optimizer = build_optimizer(model, parameter_roles(model), OptimizerSection(lr=0.5, weight_decay=0.1))
    by_name = {group["name"]: group for group in optimizer.param_groups}
    assert list(by_name) == ["dense", "keys", "tables"]
    retrievals = [memory.retrieval for memory in model.model.memories]
    keys = {id(parameter) for retrieval in retrievals for parameter in (retrieval.keys, retrieval.cores)}
    assert {id(parameter) for parameter in by_name["keys"]["params"]} == keys
    tables = {id(parameter) for parameter in by_name["tables"]["params"]}
    assert tables == {id(model.model.memory_pool.values), id(model.model.memory_pool.pre_values)}
    assert len(tables) + len(keys) + len(by_name["dense"]["params"]) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (0.5, 0.5, 0.1)
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-8)


def test_every_table_has_a_collector_and_the_groups_are_the_same():
    model = tiny_model()
    roles = parameter_roles(model)
    dense = build_optimizer(model, roles, OptimizerSection())
    assert type(dense) is torch.optim.AdamW
    rows = build_optimizer(model, roles, OptimizerSection(table_moments="bf16"), "rows")
    assert isinstance(rows, RowAdamW)
    assert model.model.memory_pool.table_gradients == "rows"
    for a, b in zip(dense.param_groups, rows.param_groups, strict=True):
        assert [id(parameter) for parameter in a["params"]] == [id(parameter) for parameter in b["params"]]
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}
    assert list(rows.coalesce()) == list(model.model.memory_pool.parameters())


def test_a_table_outside_a_pool_is_caught():
    model = tiny_model()
    model.extra = nn.Linear(2, 2, bias=False)
    with pytest.raises(AssertionError, match="not every table has a collector"):
        build_optimizer(model, parameter_roles(model) | {"extra.weight": "table"}, OptimizerSection(), "rows")


def test_a_frozen_table_collects_nothing():
    model = tiny_model()
    pool = model.model.memory_pool
    pool.pre_values.requires_grad_(False)
    optimizer = build_optimizer(model, parameter_roles(model), OptimizerSection(), "rows")
    before = pool.pre_values.clone()
    model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    optimizer.step()
    assert list(optimizer.coalesce()) == [pool.values]
    assert pool.pre_value_gradients is None
    assert torch.equal(pool.pre_values, before)


def test_dense_model_has_no_table_group():
    model = tiny_model(memory=None)
    assert list(group_parameters(model, parameter_roles(model))) == ["dense"]


def test_missing_and_doubled_parameters_are_caught():
    model = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="do not cover"):
        group_parameters(model, {"weight": "matrix"})
    model.alias = nn.Module()
    model.alias.weight = model.weight
    named = {"weight": model.weight, "bias": model.bias, "alias.weight": model.weight}
    model.named_parameters = lambda **_: iter(named.items())
    with pytest.raises(AssertionError, match="two optimizer groups"):
        group_parameters(model, {"weight": "matrix", "bias": "norm", "alias.weight": "matrix"})


def test_weight_decay_acts_through_the_groups_own_rate():
    """With zero gradients AdamW multiplies by 1 − lr·decay, in every role."""
    model = tiny_model()
    roles = parameter_roles(model)
    optimizer = build_optimizer(model, roles, OptimizerSection(lr=0.5, weight_decay=0.1))
    for group in optimizer.param_groups:
        group["lr"] = {"dense": 0.5, "keys": 0.25, "tables": 1.0}[group["name"]]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = {"table": 0.9, "key": 0.975}.get(roles[name], 0.95)
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
