"""Bytes that a decode step reads, against a brute-force record of what its operators were given."""

import pytest
import torch
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from ultramem.benchmarks.bytes_read import count_bytes_read
from ultramem.benchmarks.decode_step import DecodeStep, cache_bytes, fill_cache, fitting_kv_length
from ultramem.benchmarks.twins import build_model, build_olmo2, build_olmoe
from ultramem.layers import MemoryPool
from ultramem.model import UltraMemConfig

DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MEMORY = {
    "num_keys": 6,
    "key_dim": 8,
    "value_dim": 8,
    "pre_value_dim": 6,
    "top_k": 5,
    "tables": "ring",
    "share_ratio": 0.5,
}
FFN = {"type": "moe", "num_experts": 7, "num_experts_per_tok": 2}
BATCH, KV_LENGTH = 5, 9


def step_of(model):
    step = DecodeStep(model, fill_cache(model, BATCH, KV_LENGTH), BATCH)
    step.prepare()()
    return step


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("expansion", [1, 2])
def test_rows_of_memories_against_the_rows_that_the_pool_was_asked_for(tied, expansion, monkeypatch):
    memory = {**MEMORY, "key_expansion": expansion}
    model = build_model(UltraMemConfig(**DECODER, memory=memory, tie_word_embeddings=tied))
    step = step_of(model)
    recorded, read = [], MemoryPool.read

    def recording(self, rows_NK, *arguments, **settings):
        recorded.append(set(rows_NK.flatten().tolist()))
        return read(self, rows_NK, *arguments, **settings)

    monkeypatch.setattr(MemoryPool, "read", recording)
    found = count_bytes_read(step)
    assert len(recorded) == 3
    assert found.num_rows == sum(map(len, recorded))
    # A tuple of (slot) entries of the permutation, int32; the model is bf16.
    slots = step.run_with_statistics(step.last_ids_B1, output_memory_statistics=True).memory_statistics
    entries = sum(len(set(one["slots_NK"].flatten().tolist())) for one in slots)
    assert found.tables == 2 * (8 + 6) * found.num_rows + 4 * entries
    assert expansion == 1 or entries >= found.num_rows
    assert found.experts == found.num_experts == 0
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    keys = sum(count for name, count in parameters.items() if name.endswith((".keys", ".cores")))
    tables = sum(count for name, count in parameters.items() if "memory_pool" in name)
    embedding = parameters["model.embed_tokens.weight"]
    assert found.keys == 2 * keys
    rest = sum(parameters.values()) - keys - tables - (0 if tied else embedding)
    assert found.weights == 2 * rest
    distinct = len(set(step.last_ids_B1.flatten().tolist()))
    assert found.embedding == (0 if tied else 2 * 32 * distinct)
    assert found.kv_cache == BATCH * KV_LENGTH * 2 * 2 * 8 * 3 * 2
    numbers = found.to_dict()
    assert numbers["bytes_read"] == found.total == sum(numbers[name] for name in numbers if name.endswith("_bytes"))


@pytest.mark.parametrize("build", [build_model, build_olmoe], ids=["ours", "transformers"])
def test_experts_against_those_that_were_computed(build, monkeypatch):
    model = build(UltraMemConfig(**DECODER, memory=None, ffn=FFN, tie_word_embeddings=False))
    step = step_of(model)
    recorded, forward = [], OlmoeExperts.forward

    def recording(self, hidden_states, index, weights):
        recorded.append(set(index.flatten().tolist()))
        return forward(self, hidden_states, index, weights)

    monkeypatch.setattr(OlmoeExperts, "forward", recording)
    found = count_bytes_read(step)
    assert len(recorded) == 3
    assert found.num_experts == sum(map(len, recorded))
    # Experts have the FFN's inner width over the experts of a token, 48 / 2.
    assert found.experts == found.num_experts * 3 * 32 * 24 * 2
    parameters = dict(model.named_parameters())
    expert_ids = {id(one) for name, one in parameters.items() if ".experts." in name}
    rest = sum(one.numel() for name, one in parameters.items() if id(one) not in expert_ids and "embed" not in name)
    assert found.weights == 2 * rest
    assert found.keys == found.tables == found.num_rows == 0


def test_a_dense_decoder_reads_all_its_weights():
    config = UltraMemConfig(**DECODER, memory=None)
    for build in (build_model, build_olmo2):
        model = build(config)
        found = count_bytes_read(step_of(model))
        assert found.weights == 2 * sum(parameter.numel() for parameter in model.parameters())
        assert found.total == found.weights + found.kv_cache


def test_a_step_leaves_the_cache_as_it_was_and_computes_what_the_model_does():
    model = build_model(UltraMemConfig(**DECODER, memory=MEMORY))
    cache = fill_cache(model, BATCH, KV_LENGTH)
    steps = [DecodeStep(model, cache, BATCH) for _ in range(2)]
    before = [layer.keys.clone() for layer in cache.layers]
    first = steps[0].prepare()()
    assert first.shape == (BATCH, 1, 96)
    other = steps[1].prepare()
    assert cache.get_seq_length() == KV_LENGTH
    other()
    assert cache.get_seq_length() == KV_LENGTH + 1
    again = steps[0].run_with_statistics(steps[0].last_ids_B1).logits
    assert torch.equal(first, again)
    steps[0].prepare()
    assert all(torch.equal(old, layer.keys) for old, layer in zip(before, cache.layers, strict=True))


def test_caches_are_shortened_until_they_fit():
    model = build_model(UltraMemConfig(**DECODER, memory=None))
    one = cache_bytes(model, 4, 64)
    assert one == 2 * 4 * 64 * 16 * 3 * 2
    assert fitting_kv_length(model, 4, 64, free_bytes=2 * one) == 64
    assert fitting_kv_length(model, 4, 64, free_bytes=one) == 32
    assert fitting_kv_length(model, 4, 64, num_caches=2, free_bytes=one) == 16
    assert fitting_kv_length(model, 4, 64, free_bytes=1) == 1
