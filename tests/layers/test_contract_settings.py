"""Every setting of every memory type changes something, and every valid combination of sizes works."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_types import memory_type
from tiny_memories import SIZES, drawn_layer, memory_config, memory_layer, tokens
from ultramem.layers import MEMORY_TYPES
from ultramem.ops.product_topk import num_candidates

# The type names the class; placement and position belong to the decoder (tests/model/test_placements.py).
ELSEWHERE = {"type", "placement", "position"}

CHANGES = {kind: memory_type(kind).CHANGES for kind in MEMORY_TYPES}


def observed(settings):
    """Everything that a setting could show in: structure, drawn tensors, output, losses."""
    config = memory_config(**settings)
    drawn = [module.state_dict() for module in drawn_layer(config)]
    layer, pool = memory_layer(config)
    result = layer(tokens(20), pool)
    return [
        *(tensor for state in drawn for _, tensor in sorted(state.items())),
        result.output.detach(),
        *(loss.detach() for _, loss in sorted(result.losses.items())),
    ]


def same(before, after):
    return len(before) == len(after) and all(
        ours.shape == theirs.shape and torch.equal(ours, theirs) for ours, theirs in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("kind", MEMORY_TYPES)
def test_every_setting_is_covered(kind):
    names = {field.name for field in dataclasses.fields(MEMORY_TYPES[kind].config)} - ELSEWHERE
    assert names == set(CHANGES[kind])


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in CHANGES for name in CHANGES[kind]])
def test_every_setting_changes_something(kind, name):
    base, change = CHANGES[kind][name]
    before = {"type": kind, **base}
    assert same(observed(before), observed(before))
    assert not same(observed(before), observed({**before, **change}))


sizes = st.integers(1, 6)


@st.composite
def configs(draw, kind):
    """(hidden size, number of memories, settings) of any valid layer of a type."""
    num_memories = draw(st.integers(1, 4))
    num_keys = draw(st.integers(1, 5))
    settings = {
        "num_keys": num_keys,
        "key_dim": draw(sizes),
        "num_heads": draw(st.integers(1, 3)),
        "init": draw(st.sampled_from(["paper", "released"])),
        "tables": draw(st.sampled_from(["private", "shared", "ring"])),
    }
    if settings["tables"] == "ring":
        settings["share_ratio"] = draw(st.floats(1 / num_memories, 1))
    config = MEMORY_TYPES[kind].config
    most = config(**{**SIZES[kind], **settings, "top_k": 1}).side(num_memories) ** 2
    fields = {field.name for field in dataclasses.fields(config)}
    if "key_expansion" in fields:
        num_cores = draw(st.integers(1, 3))
        expansion = draw(st.integers(1, 3))
        settings |= {
            "num_cores": num_cores,
            "value_dim": num_cores * draw(st.integers(1, 3)),
            "rank": draw(st.integers(1, 3)),
            "key_expansion": expansion,
            "search": draw(st.sampled_from(["two_stage", "signed", "exact"])),
        }
        side = config(**settings, top_k=1).side(num_memories)
        settings["coarse_top_k"] = draw(st.integers(1, side))
        most = num_candidates(settings["search"], side, settings["coarse_top_k"])
    elif "query_bias" in fields:
        settings |= {
            "query_bias": draw(st.booleans()),
            "query_norm": draw(st.sampled_from([None, "rms", "batch"])),
            "key_norm": draw(st.booleans()),
        }
    settings["top_k"] = draw(st.integers(1, min(most, 20)))
    settings |= {name: draw(strategy) for name, strategy in memory_type(kind).STRATEGIES.items()}
    return draw(st.integers(2, 6)), num_memories, settings


@pytest.mark.parametrize("kind", SIZES)
@given(data=st.data())
def test_any_valid_sizes_work(kind, data):
    hidden_size, num_memories, settings = data.draw(configs(kind))
    config, layer_class = MEMORY_TYPES[kind].config(**settings), MEMORY_TYPES[kind].layer
    layer = layer_class(hidden_size, config, num_memories, data.draw(st.integers(0, num_memories - 1)))
    pool = layer_class.make_pool(hidden_size, config, num_memories)
    x = torch.randn(*data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), hidden_size)
    result = layer(x, pool, return_statistics=True)
    assert result.output.shape == x.shape
    assert result.output.isfinite().all()
    assert config.dense_parameters(hidden_size, num_memories) == sum(p.numel() for p in layer.parameters())
    assert config.table_parameters(hidden_size, num_memories) == sum(p.numel() for p in pool.parameters())
    slots = result.statistics["slots_NK"]
    assert slots.shape == (x[..., 0].numel(), config.num_selected)
    assert 0 <= slots.min() <= slots.max() < layer.num_slots
    for head in slots.unflatten(1, (config.num_heads, config.top_k)).flatten(0, 1):
        assert len(head.unique()) == config.top_k
