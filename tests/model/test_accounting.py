"""The cost card against the built module: parameters, FLOPs, bytes."""

import pytest
import torch

from tiny_memories import DECODERS, SMALL, decoder, decoder_config, token_ids
from ultramem import UltraMemConfig, UltraMemForCausalLM
from ultramem.model import cost_card, parameter_roles

CONFIGS = {
    **DECODERS,
    "biases": {"attention_bias": True},
    "one_key_value_head": {"num_key_value_heads": 1},
    "all_key_value_heads": {"num_key_value_heads": 4},
    "projected": {"memory": {"key_expansion": 2, "projection": "project", "num_heads": 2, "query_per_rank": True}},
    "no_pre_values": {"memory": {"pre_value_dim": 0, "search": "exact"}},
    "signed": {"memory": {"search": "signed", "coarse_top_k": 6, "num_cores": 3, "rank": 3}},
}
configs = pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)


@configs
def test_parameters_are_those_of_the_built_module(settings):
    model, card = decoder(**settings), cost_card(decoder_config(**settings))
    roles = parameter_roles(model)
    named = dict(model.named_parameters())
    tables = sum(named[name].numel() for name, role in roles.items() if role == "table")
    assert card.table_parameters == tables
    assert card.dense_parameters == sum(parameter.numel() for parameter in named.values()) - tables
    assert card.total_parameters == card.dense_parameters + tables
    assert card.num_memories == len(model.model.memories)
    read = 0
    for memory in model.model.memories:
        row = sum(table.shape[1] for table in model.model.memory_pool.parameters())
        read += memory.config.top_k * memory.config.num_heads * row
    assert card.active_parameters == card.dense_parameters + read


@configs
def test_flops_are_those_that_the_counter_sees(settings):
    settings = {**settings, "attn_implementation": "eager"}
    if settings.get("memory"):
        # The key-balance loss repeats the coarse scores; it is training's, not the model's.
        settings["memory"] = {name: value for name, value in settings["memory"].items() if name != "key_balance_weight"}
    model = decoder(torch.float32, **settings)
    card = cost_card(model.config)
    for length in (1, 7):
        with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            model(token_ids(2, length), use_cache=False)
        # Eager attention computes all pairs, masked ones too: every token attends to `length` tokens.
        assert counter.get_total_flops() == 2 * length * card.flops_per_token(length)


def test_flops_grow_with_the_context_by_the_attentions_products():
    card = cost_card(decoder_config())
    assert card.flops_per_token(100) - card.flops_per_token() == 100 * 4 * 32 * 3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("batch_size", [1, 64])
def test_bytes_of_a_decode_step_by_hand(batch_size, tied):
    """Dense weights once (the embedding at B rows only), expected distinct rows of each memory, the KV cache."""
    config = decoder_config(tie_word_embeddings=tied)
    card = cost_card(config)
    attention, ffn, norms = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 40, 2 * 32 + 32 + 16
    memory = 32 * (16 + 10 + 12) + 2 * 6 * 8 * 2 + 2 * 8 + 2 * 4
    dense = 3 * (attention + ffn + norms + memory) + 32 + 61 * 32
    rows = 3 * 36 * (1 - (1 - 1 / 36) ** (batch_size * 4))
    elements = dense + batch_size * 32 + rows * (12 + 10)
    assert card.bytes_per_decode_step(batch_size) == round(2 * elements)
    assert card.bytes_per_decode_step(batch_size, bytes_per_element=4) == round(4 * elements)
    cache = batch_size * 50 * 3 * 2 * 16
    assert card.bytes_per_decode_step(batch_size, context_length_tokens=50) == round(2 * (elements + cache))


def test_a_dense_twin_reads_no_table():
    card = cost_card(decoder_config(memory=None))
    assert card.table_parameters == card.num_memories == card.memory_flops_per_token == 0
    assert card.active_parameters == card.total_parameters


def test_the_published_run_has_its_published_size():
    """227M active, 1.2B total; counted with the tied embedding 1.226B."""
    config = UltraMemConfig(
        vocab_size=50_304,
        hidden_size=768,
        intermediate_size=2496,
        num_hidden_layers=20,
        num_attention_heads=12,
        memory={
            "num_keys": 360, "key_dim": 192, "value_dim": 192, "pre_value_dim": 192, "top_k": 32,
            "tables": "ring", "share_ratio": 0.5,
        },
    )  # fmt: skip
    card = cost_card(config)
    assert card.total_parameters == pytest.approx(1.226e9, rel=0.005)
    assert card.active_parameters == pytest.approx(230.4e6, rel=0.001)
    with torch.device("meta"):
        model = UltraMemForCausalLM(config)
    assert card.total_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_small_settings_are_those_counted_by_hand():
    assert SMALL == {"num_keys": 6, "key_dim": 8, "value_dim": 12, "pre_value_dim": 10, "top_k": 4}
