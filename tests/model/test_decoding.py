"""Cached decoding, padding and generation, in fp64: top-k is discontinuous, so that rounding may swap slots."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tiny_memories import DECODERS, decoder, token_ids
from tolerances import assert_close

LENGTH = 11

decoders = pytest.mark.parametrize("settings", DECODERS.values(), ids=DECODERS)


def decode(model, input_ids, cache, chunks):
    """Logits of all positions, fed in chunks of the given sizes through a cache."""
    logits, start = [], 0
    with torch.no_grad():
        for size in chunks:
            part = input_ids[:, start : start + size]
            logits.append(model(part, past_key_values=cache, use_cache=True).logits)
            start += size
    assert start == input_ids.shape[1]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [4, 1, 5, 1], [LENGTH]], ids=["token_by_token", "chunks", "at_once"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@decoders
def test_cached_logits_are_those_of_the_full_forward(settings, kind, chunks):
    model, input_ids = decoder(**settings), token_ids(2, LENGTH)
    expected = model(input_ids, use_cache=False).logits
    if kind == "dynamic":
        cache = DynamicCache(config=model.config)
    else:
        cache = StaticCache(config=model.config, max_cache_len=LENGTH + 3)
    assert_close(decode(model, input_ids, cache, chunks), expected)
    assert cache.get_seq_length() == LENGTH


def test_a_cache_is_made_and_returned_unless_refused():
    model, input_ids = decoder(), token_ids(2, 5)
    assert model(input_ids).past_key_values.get_seq_length() == 5
    assert model(input_ids, use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(input_ids).past_key_values is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@decoders
def test_padding_changes_nothing(settings, side, attention):
    # Eager attention's masked rows are NaN in fp64, whose smallest number its fp32 softmax does not hold.
    dtype = torch.float64 if attention == "sdpa" else torch.float32
    model = decoder(dtype, **settings)
    model.set_attn_implementation(attention)
    rows = [token_ids(1, 4, seed=3), token_ids(1, 7, seed=4)]
    padded, mask = torch.full((2, 7), 1), torch.zeros(2, 7, dtype=torch.int64)
    places = [slice(7 - row.shape[1], 7) if side == "left" else slice(row.shape[1]) for row in rows]
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        padded[index, place], mask[index, place] = row[0], 1
    logits = model(padded, attention_mask=mask).logits
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        # Left padding shifts all positions alike, which rotary embedding does not see up to its fp32 angles.
        assert_close(logits[index, place], model(row).logits[0], torch.float32)


def test_position_ids_decide_the_rotation():
    model, input_ids = decoder(), token_ids(1, 6)
    expected = model(input_ids).logits
    assert_close(model(input_ids, position_ids=torch.arange(6)[None]).logits, expected)
    # Relative positions count, absolute ones do not.
    assert_close(model(input_ids, position_ids=torch.arange(6)[None] + 7).logits, expected, torch.float32)
    stretched = model(input_ids, position_ids=3 * torch.arange(6)[None]).logits
    assert (stretched - expected).abs().max() > 1e-3


@decoders
def test_greedy_generation_repeats_the_full_forward(settings):
    model, prompt = decoder(**settings), token_ids(2, 5)
    model.generation_config.eos_token_id = None
    expected = prompt
    for _ in range(8):
        expected = torch.cat([expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        generated = model.generate(prompt, max_new_tokens=8, do_sample=False, **options)
        assert torch.equal(generated, expected), options


def test_generation_of_a_left_padded_batch_is_that_of_each_prompt():
    model = decoder()
    prompts = [token_ids(1, 3, seed=5), token_ids(1, 6, seed=6)]
    batch, mask = torch.full((2, 6), 1), torch.zeros(2, 6, dtype=torch.int64)
    for index, prompt in enumerate(prompts):
        batch[index, -prompt.shape[1] :], mask[index, -prompt.shape[1] :] = prompt[0], 1
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = model.generate(batch, attention_mask=mask, **options)
    for row, prompt in zip(together, prompts, strict=True):
        assert row[6:].tolist() == model.generate(prompt, **options)[0, prompt.shape[1] :].tolist()


def test_beam_search_finds_sequences_at_least_as_likely_as_greedy():
    model, prompt = decoder(), token_ids(2, 5)
    model.generation_config.eos_token_id = None

    def log_probability(sequences):
        logits = model(sequences).logits[:, 4:-1].log_softmax(-1)
        return logits.gather(2, sequences[:, 5:, None]).sum((1, 2))

    greedy = model.generate(prompt, max_new_tokens=5, do_sample=False)
    beams = model.generate(prompt, max_new_tokens=5, do_sample=False, num_beams=4)
    assert beams.shape == (2, 10)
    assert (log_probability(beams) >= log_probability(greedy) - 1e-6).all()


def test_sampling_follows_the_seed():
    model, prompt = decoder(), token_ids(2, 5)
    sampled = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        sampled.append(model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=True))
    assert sampled[0].shape == (2, 17)
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])


def test_generation_in_bf16_and_from_embeddings():
    model, prompt = decoder(torch.bfloat16), token_ids(2, 5)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    generated = model.generate(prompt, **options)
    assert generated.shape == (2, 11)
    embeds = model.model.embed_tokens(prompt)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), generated[:, 5:])


def test_generation_stops_at_the_end_token():
    model, prompt = decoder(), token_ids(1, 5)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 100 * model(prompt, output_hidden_states=True).hidden_states[-1][0, -1]
    assert model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 5:].tolist() == [0]


@pytest.mark.slow
def test_a_compiled_decode_step_with_a_static_cache(fresh_compiler):
    model, input_ids = decoder(num_hidden_layers=2), token_ids(1, 6)
    expected = model(input_ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=8)
    logits = [decode(model, input_ids[:, :2], cache, [2])]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for place in range(2, 6):
            step, position = input_ids[:, place : place + 1].contiguous(), torch.tensor([[place]])
            logits.append(compiled(step, position_ids=position, past_key_values=cache, use_cache=True).logits)
    assert_close(torch.cat(logits, dim=1), expected)
