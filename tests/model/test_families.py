"""The small families: dense, MoE and memories with the same FLOPs, parameters and table reads per token."""

import math

import pytest
import torch

from ultramem import UltraMemConfig, UltraMemForCausalLM
from ultramem.model import cost_card
from ultramem.model.presets import PRESETS

DENSE_PARAMETERS = {"tiny": 3e6, "small": 15e6, "base": 60e6}
# Every family has these; a family may have other memories too.
KINDS = {"dense", "moe", "pkm", "peer", "memory_plus", "ultramem", "ultramem_v2"}
TOLERANCE = 0.03

families = pytest.mark.parametrize("family", DENSE_PARAMETERS)


def kinds(family):
    return [name.removeprefix(f"{family}-") for name in PRESETS if name.startswith(f"{family}-")]


def configs(family):
    return {kind: UltraMemConfig.from_preset(f"{family}-{kind}") for kind in kinds(family)}


def memories(members):
    """The kinds of a family's members that have memories."""
    return [kind for kind in members if kind not in ("dense", "moe")]


def spread(numbers):
    """How far the largest lies above the smallest."""
    return max(numbers) / min(numbers) - 1


def table_elements(config):
    memory = config.memory_config
    return len(config.memory_spans) * memory.table_elements_per_token(config.hidden_size) if memory else 0


@families
def test_a_family_costs_and_holds_the_same(family):
    members = configs(family)
    cards = {kind: cost_card(config) for kind, config in members.items()}
    half = members["dense"].max_position_embeddings // 2
    headings = ("dense", "expert", "table", "total", "FLOPs, 0", f"FLOPs, {half:,}")
    print(f"\n{family:12} {' '.join(f'{heading:>12}' for heading in headings)} {'read':>8}")
    for kind, card in cards.items():
        numbers = (
            card.dense_parameters,
            card.expert_parameters,
            card.table_parameters,
            card.total_parameters,
            card.flops_per_token(),
            card.flops_per_token(half),
        )
        print(f"{kind:12} {' '.join(f'{number:12,}' for number in numbers)} {table_elements(members[kind]):8,}")
    for context in (0, half):
        assert spread([card.flops_per_token(context) for card in cards.values()]) < TOLERANCE
    assert spread([cards[kind].total_parameters for kind in members if kind != "dense"]) < TOLERANCE
    assert spread([table_elements(members[kind]) for kind in memories(members)]) < TOLERANCE
    assert cards["dense"].total_parameters == pytest.approx(DENSE_PARAMETERS[family], rel=0.1)
    assert 5 <= cards["moe"].total_parameters / cards["dense"].total_parameters <= 8


@families
def test_members_differ_in_nothing_but_ffn_and_memory(family):
    common = []
    for config in configs(family).values():
        settings = config.to_dict()
        for name in ("ffn", "memory", "intermediate_size", "experts_implementation", "_experts_implementation"):
            settings.pop(name, None)
        common.append(settings)
    assert all(settings == common[0] for settings in common)


@families
def test_members_are_what_their_names_say(family):
    members = configs(family)
    assert set(members) >= KINDS
    assert members["dense"].memory is None
    assert members["moe"].memory is None
    moe = members["moe"].ffn_config
    assert (moe.type, moe.num_experts_per_tok) == ("moe", 8)
    # 8 experts of a token together are as wide as the width that the config states.
    assert 8 * moe.intermediate_size == members["moe"].intermediate_size
    for kind in memories(members):
        assert members[kind].memory_config.type == kind
        assert members[kind].ffn == {"type": "dense"}
    v2, plus = members["ultramem_v2"].memory_config, members["memory_plus"].memory_config
    assert (v2.placement, v2.tables, v2.share_ratio) == ("every", "ring", 0.5)
    assert (len(plus.placement), plus.tables) == (3, "shared")
    assert members["ultramem"].memory_config.num_blocks == 4


@families
def test_sizes_suit_hardware(family):
    """Widths are multiples of 8, and those of attention heads of 32."""
    for config in configs(family).values():
        assert (config.hidden_size // config.num_attention_heads) % 32 == 0
        widths = [config.hidden_size, config.intermediate_size]
        if config.ffn["type"] == "moe":
            widths.append(config.ffn_config.intermediate_size)
        if (memory := config.memory_config) is not None:
            widths += [memory.key_dim, *memory.row_widths(config.hidden_size)]
        assert [width % 8 for width in widths] == [0] * len(widths)


@pytest.mark.parametrize("kind", kinds("tiny"))
def test_tiny_members_compute(kind):
    """Forward and backward, at about the loss of guessing."""
    torch.manual_seed(0)
    model = UltraMemForCausalLM(UltraMemConfig.from_preset(f"tiny-{kind}"))
    input_ids = torch.randint(4096, (2, 16))
    outputs = model(input_ids, labels=input_ids)
    assert outputs.loss.item() == pytest.approx(math.log(4096), abs=0.5)
    outputs.loss.backward()
    tables = model.model.memory_pool
    if tables is not None:
        assert (tables.values.grad != 0).any()
