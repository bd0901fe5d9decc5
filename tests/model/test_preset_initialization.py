"""Initialisation at the presets' sizes: one memory of each, its rows folded onto fewer where the pool would not fit."""

import math

import pytest
import torch

from tiny_memories import PRODUCT_KEY_TYPES
from ultramem import UltraMemConfig
from ultramem.layers import MEMORY_TYPES, MemoryPool, RingWindow
from ultramem.model.presets import PRESETS

# Enough rows that two slots of a token rarely meet.
MOST_ROWS = 60_000
NUM_TOKENS = 512

MEMORY = {name: settings["memory"]["type"] for name, settings in PRESETS.items() if settings["memory"]}
TUCKER = ("ultramem", "ultramem_v2")


def presets(*kinds):
    """The presets with such memories; of the families, all but the tiny one are slow."""
    names = [name for name, kind in MEMORY.items() if kind in kinds]
    slow = [pytest.mark.slow]
    chosen = [pytest.param(name, marks=slow if name.startswith(("small-", "base-")) else ()) for name in names]
    return pytest.mark.parametrize("name", chosen)


def build(name, **changes):
    """The second memory of a preset and its pool, drawn as in the decoder."""
    torch.manual_seed(0)
    config = UltraMemConfig.from_preset(name, memory=changes)
    memory, hidden = config.memory_config, config.hidden_size
    num_memories = len(config.memory_spans)
    layer = MEMORY_TYPES[memory.type].layer(hidden, memory, num_memories, memory_index=1).eval()
    num_rows = min(layer.window.num_rows, MOST_ROWS)
    layer.window = RingWindow(layer.window.offset % num_rows, layer.window.size, num_rows)
    std = memory.table_std(hidden, config.num_hidden_layers, config.intermediate_size / hidden, layer.score_variance())
    return config, layer, MemoryPool(num_rows, *memory.row_widths(hidden), std)


def look_up(layer, pool):
    """Selected scores [N, H, K, C] and output [N, D] on normal inputs that no simulation saw."""
    x = torch.randn(NUM_TOKENS, layer.hidden_size, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return layer.retrieval(x).scores_NHKC, layer(x, pool).output


def assert_std(tensor, std):
    assert tensor.mean().item() == pytest.approx(0, abs=0.1 * std)
    assert tensor.std().item() == pytest.approx(std, rel=0.03)


@presets(*TUCKER)
def test_scores_are_one_and_the_output_has_its_published_strength(name):
    """V1: variance 1/(2L); V2: 0.032·κ/L; both within a factor 1.5 in standard deviation."""
    config, layer, pool = build(name)
    assert config.memory_config.init == "paper"
    scores, output = look_up(layer, pool)
    assert scores.mean().item() == pytest.approx(1, abs=0.1)
    kappa, num_blocks = config.intermediate_size / config.hidden_size, config.num_hidden_layers
    variance = 1 / 2 if MEMORY[name] == "ultramem" else 0.032 * kappa
    target = math.sqrt(variance / num_blocks)
    assert target / 1.5 < output.std().item() < target * 1.5
    assert output.mean().abs().item() < 0.2 * target


@presets(*PRODUCT_KEY_TYPES)
def test_scores_are_one_where_norms_can_set_them(name):
    _, layer, pool = build(name, query_norm="rms", key_norm=True, init="paper")
    scores, output = look_up(layer, pool)
    assert scores.mean().item() == pytest.approx(1, abs=0.1)
    assert output.isfinite().all()


@presets(*TUCKER)
def test_released_scheme_of_tucker_memories(name):
    _, layer, pool = build(name, init="released")
    memory, retrieval = layer.config, layer.retrieval
    assert_std(pool.values, 0.02)
    assert_std(retrieval.query_proj.weight, memory.key_dim**-0.5)
    assert_std(retrieval.keys, memory.key_dim**-0.5)
    fan_in = memory.value_dim * (4 if MEMORY[name] == "ultramem" else 1)
    assert_std(layer.out_proj.weight, fan_in**-0.5)
    power = -0.33 if MEMORY[name] == "ultramem" else -0.4
    for gain in (retrieval.query_norm, retrieval.key_norm):
        assert gain.tolist() == pytest.approx([memory.key_dim**power] * memory.key_dim)
    if MEMORY[name] == "ultramem_v2":
        assert_std(pool.pre_values, 0.02)
        assert_std(layer.pre_proj.weight, layer.hidden_size**-0.5)


@presets("memory_plus", "pkm", "peer")
def test_released_scheme_of_additive_memories(name):
    config, layer, pool = build(name)
    memory, retrieval, hidden = layer.config, layer.retrieval, config.hidden_size
    assert memory.init == "released"
    bound = (2 * memory.key_dim) ** -0.5
    assert retrieval.keys.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert_std(retrieval.keys, bound / math.sqrt(3))
    query = retrieval.query_proj
    assert_std(query.weight, math.sqrt(2 / (query.in_features + query.out_features)))
    assert (query.bias == 0).all()
    for table in pool.parameters():
        assert_std(table, hidden**-0.5)
    if MEMORY[name] == "memory_plus":
        for linear in (layer.gate_proj, layer.out_proj):
            assert_std(linear.weight, hidden**-0.5)
            assert (linear.bias == 0).all()
