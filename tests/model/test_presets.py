"""The presets: published parameter counts, in plain Python and built on the meta device, and what overrides do."""

import copy
import dataclasses

import pytest
import torch

from ultramem import UltraMemConfig, UltraMemForCausalLM
from ultramem.errors import ConfigError
from ultramem.model import cost_card, parameter_roles
from ultramem.model.presets import PRESETS

# Totals in billions: with the tied embedding for 227M, with both untied matrices for 1B/7B.
PUBLISHED_TOTALS = {
    "ultramem_v2-227m-1.2b": 1.226,
    "ultramem-227m-1.2b": 1.231,
    "memory_plus-227m-1.2b": 1.236,
    "olmoe-227m-1.2b": 1.219,
    "olmoe-1b-7b": 6.919,
}


def card_of(name):
    return cost_card(UltraMemConfig.from_preset(name))


@pytest.mark.parametrize("name", PUBLISHED_TOTALS)
def test_totals_are_the_published_ones(name):
    assert card_of(name).total_parameters == pytest.approx(PUBLISHED_TOTALS[name] * 1e9, rel=0.005)


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_the_built_model(name):
    config = UltraMemConfig.from_preset(name)
    with torch.device("meta"):
        model = UltraMemForCausalLM(config)
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    tables = sum(sizes[key] for key, role in parameter_roles(model).items() if role == "table")
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    card = cost_card(config)
    assert card.total_parameters == sum(sizes.values())
    assert card.table_parameters == tables
    assert card.expert_parameters == experts
    assert (experts > 0) == ("moe" in name)
    assert (tables > 0) == (config.memory is not None)


def test_the_published_vocabulary_and_positions():
    config = UltraMemConfig.from_preset("ultramem_v2-227m-1.2b")
    assert config.vocab_size * config.hidden_size == pytest.approx(38.6e6, rel=1e-3)
    for name, settings in PRESETS.items():
        if "-227m" in name or "-1b-7b" in name:
            assert (settings["vocab_size"], settings["max_position_embeddings"]) == (50_304, 4096)
            assert settings.get("tie_word_embeddings", True) == ("-227m" in name)


def test_the_rows_that_layers_read_follow_the_published_table():
    """Rows, key sides and selected rows of the published comparison."""
    seen = {}
    for name in PUBLISHED_TOTALS:
        config = UltraMemConfig.from_preset(name)
        if (memory := config.memory_config) is not None:
            count = len(config.memory_spans)
            seen[memory.type] = (count, memory.num_rows(count), memory.side(count), memory.num_selected)
    assert seen == {
        "ultramem_v2": (20, 20 * 360**2, 1138, 32),  # ⌊√(0.5·20·360²)⌋ keys a side
        "ultramem": (4, 4 * 808**2, 2 * 808, 160),
        "memory_plus": (4, 1138**2, 1138, 160),
    }


def test_the_dense_counterpart_costs_what_the_227m_set_costs():
    flops = {name: card_of(name).flops_per_token() for name in PRESETS if "-227m" in name}
    dense = flops.pop("dense-227m")
    assert dense == pytest.approx(flops["ultramem_v2-227m-1.2b"], rel=0.002)
    # Memory+ as published has 5 % more than the other three.
    assert dense == pytest.approx(flops.pop("memory_plus-227m-1.2b"), rel=0.05)
    for other in flops.values():
        assert dense == pytest.approx(other, rel=0.01)


def test_the_1b_7b_sizes_and_their_discrepancy():
    """Without embeddings UltraMemV2 has the published 1,079M active; but 6.21B in all, not 6.70B."""
    config = UltraMemConfig.from_preset("ultramem_v2-1b-7b")
    card, embeddings = cost_card(config), 2 * config.vocab_size * config.hidden_size
    assert card.table_parameters == 16 * 528**2 * 1152
    assert card.active_parameters - embeddings == pytest.approx(1.079e9, rel=0.005)
    assert card.total_parameters - embeddings == pytest.approx(6.21e9, rel=0.005)
    # A share of 1/16 among 16 layers: every layer's window is its own.
    memory = config.memory_config
    windows = [memory.window(16, index) for index in range(16)]
    assert [(window.offset, window.size) for window in windows] == [(index * 528**2, 528**2) for index in range(16)]
    olmoe = card_of("olmoe-1b-7b")
    assert olmoe.total_parameters - embeddings == pytest.approx(6.71e9, rel=0.005)
    assert olmoe.active_parameters - embeddings == pytest.approx(1.07e9, rel=0.01)


def test_overrides_win_and_sections_are_merged():
    before = copy.deepcopy(PRESETS)
    config = UltraMemConfig.from_preset(
        "ultramem_v2-227m-1.2b", num_hidden_layers=2, eos_token_id=7, memory={"num_keys": 12, "init": "released"}
    )
    assert (config.num_hidden_layers, config.hidden_size, config.eos_token_id) == (2, 768, 7)
    memory = config.memory_config
    assert (memory.num_keys, memory.init, memory.key_dim, memory.share_ratio) == (12, "released", 192, 0.5)
    moe = UltraMemConfig.from_preset("tiny-moe", ffn={"num_experts": 16})
    assert (moe.ffn_config.num_experts, moe.ffn_config.intermediate_size) == (16, 80)
    named = UltraMemConfig.from_preset("tiny-moe", ffn={"type": "moe", "num_experts": 16})
    assert named.ffn == moe.ffn
    assert before == PRESETS


def test_a_section_of_another_type_stands_alone():
    config = UltraMemConfig.from_preset("tiny-ultramem_v2", memory={"type": "pkm", "num_keys": 20})
    plain = UltraMemConfig(hidden_size=160, num_attention_heads=5, memory={"type": "pkm", "num_keys": 20})
    assert config.memory == plain.memory
    assert UltraMemConfig.from_preset("tiny-moe", ffn={"type": "dense"}).ffn == {"type": "dense"}


def test_sections_that_the_preset_lacks_and_sections_taken_away():
    assert UltraMemConfig.from_preset("tiny-pkm", memory=None).memory is None
    added = UltraMemConfig.from_preset("tiny-dense", memory={"type": "peer"}, ffn={"type": "moe"})
    assert added.memory_config.type == "peer"
    assert added.ffn_config.num_experts == 64


def test_a_preset_can_be_saved_and_read_back(tmp_path):
    config = UltraMemConfig.from_preset("tiny-memory_plus")
    config.save_pretrained(tmp_path)
    again = UltraMemConfig.from_pretrained(tmp_path)
    assert dataclasses.asdict(again.memory_config) == dataclasses.asdict(config.memory_config)
    assert cost_card(again).total_parameters == cost_card(config).total_parameters


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    with pytest.raises(ConfigError) as raised:
        UltraMemConfig.from_preset("tiny-ultramemv2")
    text = str(raised.value)
    assert "there is no preset 'tiny-ultramemv2'" in text
    assert "did you mean tiny-ultramem_v2?" in text
    for name in PRESETS:
        assert name in text
    with pytest.raises(ConfigError, match="there is no preset 'zzz'; the presets are ultramem_v2-227m"):
        UltraMemConfig.from_preset("zzz")


def test_wrong_overrides_are_named():
    with pytest.raises(ConfigError, match="num_kyes is no setting of a memory of type pkm"):
        UltraMemConfig.from_preset("tiny-pkm", memory={"num_kyes": 3})
