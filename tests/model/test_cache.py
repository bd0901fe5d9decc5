import pytest
import torch
from transformers import DynamicCache

from tiny_memories import decoder_config
from tolerances import assert_bit_equal
from ultramem.model.cache import DecodingCache


def states(num_tokens, seed, batch=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, num_tokens, 4, generator=generator) for _ in range(2)]


def same(cache, other):
    assert cache.get_seq_length() == other.get_seq_length()
    for layer, expected in zip(cache.layers, other.layers, strict=True):
        assert_bit_equal(layer.keys, expected.keys)
        assert_bit_equal(layer.values, expected.values)


@pytest.mark.parametrize("room", [1, 9, 100])
def test_it_holds_what_a_dynamic_cache_holds(room):
    config = decoder_config()
    cache, other = DecodingCache(config, room), DynamicCache(config=config)
    indices = torch.tensor([2, 2, 0])
    operations = [
        lambda c: [c.update(*states(5, index), index) for index in range(3)],
        lambda c: [c.update(*states(1, index), index) for index in range(3)],
        lambda c: c.crop(-2),
        lambda c: [c.update(*states(2, 7 + index), index) for index in range(3)],
        lambda c: c.reorder_cache(indices),
        lambda c: [c.update(*states(3, 9 + index), index) for index in range(3)],
        lambda c: c.batch_select_indices(torch.tensor([1, 2])),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: [c.update(*states(1, 11 + index, batch=4), index) for index in range(3)],
        lambda c: c.reset(),
        lambda c: [c.update(*states(4, 13 + index), index) for index in range(3)],
    ]
    assert cache.get_seq_length() == 0
    for operation in operations:
        operation(cache)
        operation(other)
        if other.get_seq_length():
            same(cache, other)


def test_new_tokens_are_written_in_place():
    cache = DecodingCache(decoder_config(), 9)
    cache.update(*states(5, 0), 0)
    before = cache.layers[0].keys.data_ptr()
    for _ in range(4):
        cache.update(*states(1, 1), 0)
    assert cache.layers[0].keys.data_ptr() == before
    cache.update(*states(1, 1), 0)
    assert cache.layers[0].keys.data_ptr() != before
    assert cache.get_seq_length() == 10


def test_it_suits_decoders_whose_memories_do_not_look_back():
    assert DecodingCache.suits(decoder_config())
    assert DecodingCache.suits(decoder_config(memory=None))
    assert not DecodingCache.suits(decoder_config(memory={"type": "ultramem", "query_conv": 2}))
