"""What docs/serving asks of a model definition, bullet by bullet; engines replace attention and output layer."""

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tiny_memories import DECODERS, decoder, token_ids
from tolerances import assert_close
from ultramem import UltraMemForCausalLM

decoders = pytest.mark.parametrize("settings", DECODERS.values(), ids=DECODERS)


@pytest.fixture
def engine():
    """An engine's attention: it records its calls and lets tokens of one request alone see each other."""
    calls = []

    def attend(module, q, k, v, mask, scaling=None, *, requests=None, **kwargs):
        calls.append({"module": module, "shapes": (q.shape, k.shape, v.shape), "scaling": scaling, "q": q} | kwargs)
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        length = q.shape[2]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        if requests is not None:
            seen = seen & (requests[:, None] == requests)
        scores = (q @ k.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["engine"] = attend
    yield calls
    ALL_ATTENTION_FUNCTIONS.pop("engine")


def engine_model(settings):
    model = decoder(**settings)
    model.set_attn_implementation("engine")
    return model


def test_declarations():
    assert issubclass(UltraMemForCausalLM, PreTrainedModel)
    assert UltraMemForCausalLM._supports_attention_backend is True
    assert UltraMemForCausalLM.base_model_prefix == "model"
    model = decoder()
    assert {name for name, _ in model.named_children()} == {"model", "lm_head"}
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert isinstance(getattr(model.config, name), int)


@decoders
def test_nothing_is_computed_after_the_output_layer(settings):
    model, input_ids = decoder(**settings), token_ids(1, 5)
    model.lm_head = torch.nn.Identity()
    assert torch.equal(model(input_ids).logits, model.model(input_ids).last_hidden_state)


@decoders
def test_one_attention_per_block_goes_through_the_interface(settings, engine):
    model, input_ids = engine_model(settings), token_ids(2, 6)
    expected = decoder(**settings)(input_ids).logits
    assert_close(model(input_ids, use_cache=False, sentinel="kept").logits, expected)
    assert [call["module"].layer_idx for call in engine] == [0, 1, 2]
    for call in engine:
        assert call["module"].is_causal is True
        assert call["shapes"] == ((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8))
        assert call["scaling"] == pytest.approx(8**-0.5)
        assert call["sentinel"] == "kept"
        assert call["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]
    attentions = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    assert len(attentions) == 3


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "ultramem"])
def test_requests_in_one_flat_row_get_their_own_logits(name, engine):
    """Memories and spans must not mix tokens that stand side by side; a query convolution does, and is not served."""
    settings = DECODERS[name]
    model = engine_model(settings)
    requests = [token_ids(1, length, seed=length) for length in (5, 1, 3)]
    flat = torch.cat(requests, dim=1)
    positions = torch.cat([torch.arange(request.shape[1]) for request in requests])[None]
    owner = torch.cat([torch.full((request.shape[1],), index) for index, request in enumerate(requests)])
    hidden = model.model(input_ids=flat, position_ids=positions, use_cache=False, return_dict=False, requests=owner)[0]
    logits, start = model.lm_head(hidden), 0
    for request in requests:
        expected = decoder(**settings)(request).logits[0]
        assert_close(logits[0, start : start + request.shape[1]], expected)
        start += request.shape[1]


def test_rotation_follows_position_ids(engine):
    model = engine_model({})
    model(torch.full((1, 3), 7), position_ids=torch.tensor([[5, 0, 5]]), use_cache=False)
    query = engine[0]["q"]
    assert torch.equal(query[:, :, 0], query[:, :, 2])
    assert not torch.allclose(query[:, :, 0], query[:, :, 1])


def test_the_base_model_returns_hidden_states_first():
    model, input_ids = decoder(), token_ids(1, 5)
    positions = torch.arange(5)[None]
    expected = model.model(input_ids).last_hidden_state
    arguments = {"position_ids": positions, "use_cache": False, "return_dict": False}
    from_ids = model.model(input_ids=input_ids, **arguments)
    assert isinstance(from_ids, tuple)
    assert torch.equal(from_ids[0], expected)
    embeds = model.model.embed_tokens(input_ids)
    assert torch.equal(model.model(input_ids=None, inputs_embeds=embeds, **arguments)[0], expected)


@decoders
def test_only_the_embedding_has_as_many_rows_as_the_vocabulary(settings):
    model = decoder(**settings)
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    sized = {name for name, weight in weights.items() if weight is not None and len(weight) == model.config.vocab_size}
    assert sized == {"model.embed_tokens", "lm_head"}
    embeddings = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    assert embeddings == ["model.embed_tokens"]
