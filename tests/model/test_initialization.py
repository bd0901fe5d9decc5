"""The decoder's initialisation: published standard deviations, the pool's, and the memories' output."""

import math

import pytest
import torch

from tiny_memories import decoder_config, token_ids
from ultramem import UltraMemConfig, UltraMemForCausalLM

MID = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "memory": {
        "num_keys": 32,
        "key_dim": 32,
        "value_dim": 32,
        "pre_value_dim": 32,
        "top_k": 8,
        "tables": "ring",
        "share_ratio": 0.6,
    },
}


def build(seed=0, **settings):
    torch.manual_seed(seed)
    return UltraMemForCausalLM(UltraMemConfig(**{**MID, **settings})).eval()


def assert_std(tensor, std):
    assert tensor.mean().item() == pytest.approx(0, abs=0.1 * std)
    assert tensor.std().item() == pytest.approx(std, rel=0.04)


@pytest.mark.parametrize("initializer_range", [None, 0.05])
def test_linears_and_embeddings(initializer_range):
    model = build(initializer_range=initializer_range, tie_word_embeddings=False, attention_bias=True)
    std = math.sqrt(2 / (5 * 128)) if initializer_range is None else initializer_range
    for linear in (model.model.embed_tokens, model.lm_head):
        assert_std(linear.weight, std)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            assert_std(linear.weight, std)
        for linear in (attention.o_proj, mlp.down_proj):
            assert_std(linear.weight, std / math.sqrt(2 * 4))
        for linear in (attention.q_proj, attention.o_proj):
            assert (linear.bias == 0).all()
        for norm in (block.input_layernorm, block.post_attention_layernorm, attention.q_norm, attention.k_norm):
            assert (norm.weight == 1).all()
        # The memory's own linears follow the paper, and its output projection is not divided.
        for memory in block.memories:
            for linear in (memory.out_proj, memory.pre_proj, memory.retrieval.query_proj):
                assert_std(linear.weight, math.sqrt(2 / (5 * 128)))


def test_the_pool_is_drawn_for_the_memories_that_read_it():
    model = build()
    variance = sum(float(memory.retrieval.simulate().var()) for memory in model.model.memories) / 4
    std = model.config.memory_config.table_std(128, 4, 2.5, variance)
    assert_std(model.model.memory_pool.values, std)
    assert_std(model.model.memory_pool.pre_values, std)
    released = build(memory={**MID["memory"], "init": "released"})
    assert_std(released.model.memory_pool.values, 0.02)


@pytest.mark.parametrize("placement", ["every", "0:1/0:2/1:3"])
def test_memories_start_at_the_published_strength(placement):
    """On the decoder's own hidden states: output variance 0.032·κ/L, within a factor 1.5 in standard deviation."""
    model = build(memory={**MID["memory"], "placement": placement})
    input_ids = torch.randint(500, (16, 32))
    outputs = model(input_ids, output_memory_statistics=True)
    target = math.sqrt(0.032 * 2.5 / 4)
    assert len(outputs.memory_statistics) == len(model.config.memory_spans)
    for statistics in outputs.memory_statistics:
        assert target / 1.5 < statistics["output_std"].item() < target * 1.5
        assert statistics["scores_NK"].mean().item() == pytest.approx(1, abs=0.25)


def test_the_seed_decides():
    first, again, other = (build(seed=seed).state_dict() for seed in (0, 0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
    assert not torch.equal(first["model.memory_pool.values"], other["model.memory_pool.values"])
    name = "model.layers.2.memories.0.permutation"
    assert torch.equal(first[name], other[name])


def test_directions_belong_to_the_drawn_cores():
    for memory in build().model.memories:
        retrieval = memory.retrieval
        core = retrieval.cores.sum(0)
        leading = torch.einsum("hr,hrq,hq->h", retrieval.row_direction, core, retrieval.col_direction)
        torch.testing.assert_close(leading, torch.linalg.svdvals(core)[:, 0])


def test_an_untrained_model_predicts_all_tokens_alike():
    torch.manual_seed(0)
    model = UltraMemForCausalLM(decoder_config()).eval()
    loss = model(token_ids(8, 20), labels=token_ids(8, 20)).loss.item()
    assert loss == pytest.approx(math.log(61), abs=0.35)
