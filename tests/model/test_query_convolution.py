"""A query convolution under cached decoding: exact in fp64, whatever is padded, chunked or searched."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tiny_memories import decoder, token_ids
from tolerances import assert_close

LENGTH = 9

# Spans from one block share what the cache keeps; taps beyond the prompt's length; memories in place of the FFN.
VARIANTS = {
    "two_taps": {"query_conv": 2},
    "one_block_twice": {"query_conv": 3, "placement": "0:2/0:0/2:2"},
    "many_taps": {"query_conv": 6, "placement": [1]},
    "replace": {"query_conv": 3, "placement": [0, 1], "position": "replace", "tables": "shared"},
}
variants = pytest.mark.parametrize("memory", VARIANTS.values(), ids=VARIANTS)


def build(memory, **settings):
    model = decoder(memory={"type": "ultramem", **memory}, **settings)
    model.generation_config.eos_token_id = None
    return model


def make_cache(kind, model):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=LENGTH + 4)


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [2, 1, 4, 1, 1], [8, 1]], ids=["token_by_token", "chunks", "prefill"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@variants
def test_cached_logits_are_those_of_the_full_forward(memory, kind, chunks):
    model, input_ids = build(memory), token_ids(2, LENGTH)
    cache, logits, start = make_cache(kind, model), [], 0
    with torch.no_grad():
        expected = model(input_ids, use_cache=False).logits
        for size in chunks:
            logits.append(model(input_ids[:, start : start + size], past_key_values=cache).logits)
            start += size
    assert_close(torch.cat(logits, dim=1), expected)


@variants
def test_the_convolution_matters(memory):
    with_taps, without = build(memory), build({**memory, "query_conv": 0})
    without.load_state_dict({n: t for n, t in with_taps.state_dict().items() if "query_conv" not in n})
    input_ids = token_ids(1, LENGTH)
    assert not torch.allclose(with_taps(input_ids).logits, without(input_ids).logits)


def left_padded(prompts):
    length = max(prompt.shape[1] for prompt in prompts)
    batch, mask = torch.full((len(prompts), length), 1), torch.zeros(len(prompts), length, dtype=torch.int64)
    for index, prompt in enumerate(prompts):
        batch[index, -prompt.shape[1] :], mask[index, -prompt.shape[1] :] = prompt[0], 1
    return batch, mask


PROMPTS = [token_ids(1, length, seed=length) for length in (2, 6, 4)]


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@variants
def test_a_left_padded_batch_generates_what_each_prompt_does(memory, options):
    model = build(memory)
    batch, mask = left_padded(PROMPTS)
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    together = model.generate(batch, attention_mask=mask, **options)
    for row, prompt in zip(together, PROMPTS, strict=True):
        expected = prompt
        for _ in range(5):
            logits = model(expected, use_cache=False).logits
            expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert row[-5:].tolist() == expected[0, -5:].tolist()


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
@variants
def test_beam_search_reorders_what_the_cache_keeps(memory, options):
    model, prompt = build(memory), token_ids(2, 4)
    search = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "return_dict_in_generate": True}
    search["output_scores"] = True
    expected = model.generate(prompt, use_cache=False, **search)
    found = model.generate(prompt, **search, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert (found.beam_indices.diff(dim=1)[:, :-1] != 0).any(), "no beam was left for another"


@pytest.mark.parametrize("memory", [VARIANTS["one_block_twice"]], ids=["one_block_twice"])
def test_several_sequences_per_prompt(memory):
    """Sampling copies the prompt's cache for each sequence."""
    model, prompt = build(memory), token_ids(1, 4)
    options = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 3}
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        sampled.append(model.generate(prompt, use_cache=use_cache, **options))
    assert torch.equal(*sampled)


@variants
def test_saving_and_loading_keeps_the_taps(memory, tmp_path):
    model = build(memory, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.layer_types == model.config.layer_types
    assert torch.equal(loaded(token_ids(2, LENGTH)).logits, model(token_ids(2, LENGTH)).logits)


def test_blocks_that_look_back_say_so():
    kinds = build({"query_conv": 3, "placement": "0:2/2:2"}).config.layer_types
    assert kinds == ["hybrid", "full_attention", "hybrid"]
    for memory in ({"query_conv": 1}, {"query_conv": 0}):
        assert build(memory).config.layer_types == ["full_attention"] * 3


@pytest.mark.slow
@variants
def test_a_compiled_decode_step(memory, fresh_compiler):
    model, input_ids = build(memory), token_ids(1, 6)
    expected = model(input_ids, use_cache=False).logits
    cache = make_cache("static", model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        logits = [model(input_ids[:, :2], past_key_values=cache).logits]
        for place in range(2, 6):
            step, position = input_ids[:, place : place + 1].contiguous(), torch.tensor([[place]])
            logits.append(compiled(step, position_ids=position, past_key_values=cache, use_cache=True).logits)
    assert_close(torch.cat(logits, dim=1), expected)
