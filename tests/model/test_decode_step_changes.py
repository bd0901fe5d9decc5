"""Models that change between two decode steps: what kernels read is collected anew, and let go of with the model."""

import gc
import weakref

import pytest
import torch

from tiny_memories import decoder_config, token_ids
from tolerances import assert_close
from ultramem import UltraMemForCausalLM
from ultramem.model.cache import DecodingCache
from ultramem.model.decoding import decode_step
from ultramem.ops import use_backend


def decoder():
    torch.manual_seed(0)
    model = UltraMemForCausalLM(decoder_config()).eval()
    with torch.no_grad():
        for memory in model.model.memories:
            memory.out_proj.weight.mul_(30)
    return model


def next_logits(model, backend):
    """Logits of the fifth token; from the kernels, those of `decode_step` alone."""
    input_ids, cache = token_ids(2, 5), DecodingCache(model.config, 8)
    with torch.no_grad(), use_backend(backend):
        model(input_ids[:, :4], past_key_values=cache)
        if backend == "reference":
            return model(input_ids[:, 4:], past_key_values=cache).logits
        return decode_step(model, input_ids[:, 4:], None, None, cache)


def exact_search(model):
    model.model.memories[0].retrieval.search = "exact"


def fewer_slots(model):
    model.model.memories[1].retrieval.top_k = 1


def hook(model):
    model.model.memories[0].register_forward_hook(lambda module, inputs, output: output._replace(output=0 * output[0]))


def other_permutation(model):
    model.model.memories[0].permutation = model.model.memories[0].permutation.flip(0)


@pytest.mark.parametrize("change", [exact_search, fewer_slots, hook, other_permutation])
def test_a_memory_that_changes_between_steps_is_heard(change):
    model = decoder()
    before = next_logits(model, "cpu")
    change(model)
    after = next_logits(model, "cpu")
    assert_close(after, next_logits(model, "reference"))
    assert change is exact_search or not torch.allclose(after, before, atol=1e-5)


def test_what_was_collected_of_a_model_goes_with_it():
    model = decoder()
    assert next_logits(model, "cpu") is not None
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
