"""Decode steps on the CPU's kernels against the model's own forward, and everything that they must leave to it."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, TextIteratorStreamer
from transformers.generation import GenerateDecoderOnlyOutput

from memory_types import memory_type
from tiny_memories import DECODERS, decoder_config, token_ids
from tiny_models import tiny_tokenizer
from tolerances import assert_close
from ultramem import UltraMemForCausalLM
from ultramem.layers import MEMORY_TYPES
from ultramem.model import modeling
from ultramem.model.cache import DecodingCache
from ultramem.ops import use_backend

LENGTH = 12
MOE = {"memory": None, "ffn": {"type": "moe", "num_experts": 6, "num_experts_per_tok": 2}}
# Beside the decoders of the other tests: those without an FFN's or attention's usual form.
SETTINGS = {
    **{name: settings for name, settings in DECODERS.items() if name != "ultramem"},
    "ultramem": {"memory": {"type": "ultramem", "placement": "0:2/1:1"}},
    "ultramem-signed": {"memory": {"type": "ultramem", "search": "signed", "coarse_top_k": 4, "key_expansion": 1}},
    "ultramem-exact": {"memory": {"type": "ultramem", "search": "exact"}},
    "v2-gelu-project": {
        "memory": {"pre_value_activation": "gelu", "projection": "project", "key_expansion": 2, "query_per_rank": True}
    },
    "v2-without-pre-values": {"memory": {"pre_value_dim": 0}},
    "moe": MOE,
    "moe-untied": {**MOE, "ffn": {**MOE["ffn"], "norm_topk_prob": True}, "tie_word_embeddings": False},
    "clip-bias": {"memory": None, "clip_qkv": 0.1, "attention_bias": True},
    "own-kv-heads": {"memory": None, "num_key_value_heads": 4, "tie_word_embeddings": False},
}
settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture
def steps(monkeypatch):
    """What every call of `decode_step` returned."""
    results = []

    def step(*arguments):
        results.append(original(*arguments))
        return results[-1]

    original = modeling.decode_step
    monkeypatch.setattr(modeling, "decode_step", step)
    return results


def decoder(dtype=torch.float32, seed=0, output_scale=1, **changes):
    """A decoder in evaluation mode whose logits are far from uniform, and that no token ends.

    ``output_scale`` makes blocks outweigh the embedding, so that greedy text depends on the whole context.
    """
    torch.manual_seed(seed)
    model = UltraMemForCausalLM(decoder_config(**changes)).eval()
    with torch.no_grad():
        for block in model.model.layers:
            for weight in (block.self_attn.o_proj.weight, *([] if block.mlp is None else [block.mlp.output_weight])):
                weight.mul_(output_scale)
        if output_scale == 1:
            model.model.embed_tokens.weight.mul_(3)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.generation_config.eos_token_id = None
    return model.to(dtype)


def step_logits(model, input_ids, cache, start=3, mask=None):
    """Logits [B, T - start, vocabulary] of tokens that are fed one by one."""
    logits = []
    with torch.no_grad():
        model(input_ids[:, :start], past_key_values=cache, attention_mask=None if mask is None else mask[:, :start])
        for place in range(start, input_ids.shape[1]):
            part = None if mask is None else mask[:, : place + 1]
            out = model(input_ids[:, place : place + 1], past_key_values=cache, attention_mask=part)
            logits.append(out.logits)
    return torch.cat(logits, dim=1)


def both_ways(model, input_ids, mask=None):
    """Logits from the kernels, and from the model's own forward."""
    own = step_logits(model, input_ids, DynamicCache(config=model.config), mask=mask)
    return step_logits(model, input_ids, DecodingCache(model.config, LENGTH), mask=mask), own


@settings
def test_logits_are_those_of_the_models_own_forward(settings, steps):
    model, input_ids = decoder(**settings), token_ids(3, LENGTH)
    assert_close(*both_ways(model, input_ids))
    assert len(steps) == LENGTH - 3
    assert all(logits is not None for logits in steps)
    mask = torch.ones_like(input_ids)
    mask[0, :2], mask[1, 4] = 0, 0
    assert_close(*both_ways(model, input_ids, mask))


@settings
def test_greedy_text_is_that_of_the_models_own_forward(settings, steps):
    model, prompt = decoder(output_scale=20, **settings), token_ids(2, 5)
    options = {"max_new_tokens": 12, "do_sample": False}
    generated = model.generate(prompt, **options)
    assert len(steps) == 11
    assert all(logits is not None for logits in steps)
    own = model.generate(prompt, past_key_values=DynamicCache(config=model.config), **options)
    assert torch.equal(generated, own)
    assert len(generated[:, 5:].unique()) > 1


def test_a_memory_that_looks_back_keeps_its_own_cache(steps):
    model = decoder(memory={"type": "ultramem", "query_conv": 3})
    output = model.generate(token_ids(1, 4), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert type(output.past_key_values) is DynamicCache
    assert not steps


def test_prompts_of_different_lengths_are_continued_as_if_alone():
    for name in ("dense", "ultramem_v2", "moe"):
        model = decoder(output_scale=20, **SETTINGS[name])
        prompts = [token_ids(1, length, seed=length) for length in (3, 7, 1)]
        batch, mask = torch.full((3, 7), 1), torch.zeros(3, 7, dtype=torch.int64)
        for index, prompt in enumerate(prompts):
            batch[index, -prompt.shape[1] :], mask[index, -prompt.shape[1] :] = prompt[0], 1
        options = {"max_new_tokens": 10, "do_sample": False}
        together = model.generate(batch, attention_mask=mask, **options)
        for row, prompt in zip(together, prompts, strict=True):
            assert row[7:].tolist() == model.generate(prompt, **options)[0, prompt.shape[1] :].tolist()


# In bf16 the model's own logits (standard deviation about 1) lie up to 0.05 from those in fp32, ours half as far: where
# the best token leads by more than both together, both must name it.
EPSILON = 0.125
# Selecting everything, for a choice between slots or experts with almost equal scores is no matter of rounding logits.
WHOLE = {
    "dense": {"memory": None},
    "moe": {"memory": None, "ffn": {"type": "moe", "num_experts": 4, "num_experts_per_tok": 4}},
    **{kind: {"memory": {"type": kind, "num_keys": 4, "top_k": 16}} for kind in MEMORY_TYPES},
}
for kind in ("ultramem", "ultramem_v2"):
    WHOLE[kind]["memory"] |= {"coarse_top_k": 4, "key_expansion": 1}


@pytest.mark.parametrize("changes", WHOLE.values(), ids=WHOLE)
def test_bf16_names_the_same_token_wherever_it_leads_clearly(changes):
    model, input_ids = decoder(tie_word_embeddings=False, **changes), token_ids(6, 24)
    nn.init.normal_(model.lm_head.weight, std=0.2)
    exact = step_logits(model, input_ids, DynamicCache(config=model.config))
    ours, own = both_ways(model.bfloat16(), input_ids)
    assert ours.dtype == own.dtype == torch.bfloat16
    best = own.float().topk(2).values
    clear = best[..., 0] - best[..., 1] > EPSILON
    assert clear.float().mean() > 0.5
    assert torch.equal(ours.argmax(-1)[clear], own.argmax(-1)[clear])
    error, own_error = ((logits.float() - exact).square().mean() for logits in (ours, own))
    assert error < 1.05 * own_error


@pytest.mark.parametrize("kind", MEMORY_TYPES)
def test_bf16_is_no_farther_from_fp32_than_the_models_own_forward(kind):
    memory = {key: value for key, value in memory_type(kind).DECODER.items() if key != "query_conv"}
    errors = torch.zeros(2)
    for seed in range(3):
        model, input_ids = decoder(seed=seed, memory={"type": kind, **memory}), token_ids(6, 24, seed=seed)
        exact = step_logits(model, input_ids, DynamicCache(config=model.config))
        for index, logits in enumerate(both_ways(model.bfloat16(), input_ids)):
            errors[index] += (logits.float() - exact).abs().median()
    assert errors[0] < 1.05 * errors[1]


def replace_parameter(model):
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(2 * model.model.layers[0].mlp.up_proj.weight.detach())


def load_other_weights(model):
    model.load_state_dict(decoder(seed=1, **SETTINGS["ultramem_v2"]).state_dict(), assign=True)


def change_keys(model):
    for memory in model.model.memories:
        memory.retrieval.keys.add_(torch.randn_like(memory.retrieval.keys))


def change_cores(model):
    for memory in model.model.memories:
        memory.retrieval.cores.copy_(memory.retrieval.cores.flip(-1))
    model.refresh_retrieval()


CHANGES = {
    "in place": lambda model: model.model.layers[1].self_attn.v_proj.weight.mul_(2),
    "data": lambda model: setattr(
        model.model.layers[1].mlp.down_proj.weight, "data", 2 * model.model.layers[1].mlp.down_proj.weight
    ),
    "parameter": replace_parameter,
    "loaded": load_other_weights,
    "keys": change_keys,
    "cores": change_cores,
    "rows": lambda model: model.model.memory_pool.values.normal_(),
    "cast": lambda model: model.bfloat16().float(),
    "head": lambda model: setattr(model, "lm_head", nn.Linear(32, model.config.vocab_size, bias=False)),
    "trained": lambda model: model.train().model.norm.weight.mul_(torch.linspace(0.5, 2, 32)) is None or model.eval(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_seen_at_once(change):
    model, input_ids = decoder(**SETTINGS["ultramem_v2"]), token_ids(2, LENGTH)
    before, _ = both_ways(model, input_ids)
    with torch.no_grad():
        change(model)
    ours, own = both_ways(model, input_ids)
    assert_close(ours, own)
    assert not torch.allclose(ours, before, atol=1e-5)


class Doubled(nn.Linear):
    """Stands for an adapter."""

    def forward(self, x):
        return 2 * super().forward(x)


def hook_on(path):
    return lambda model: model.get_submodule(path).register_forward_hook(lambda module, inputs, output: output)


def adapt(path):
    def change(model):
        model.get_submodule(path).__class__ = Doubled

    return change


LEFT_ALONE = {
    "hook on a linear": hook_on("model.layers.1.mlp.up_proj"),
    "hook on a block": hook_on("model.layers.0"),
    "hook on the decoder": hook_on("model"),
    "hook on the head": hook_on("lm_head"),
    "adapter": adapt("model.layers.1.self_attn.q_proj"),
    "training": lambda model: model.train(),
    "hidden states": lambda model: setattr(model.config, "output_hidden_states", True),
    "activation": lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.GELU()),
    "method": lambda model: setattr(model.model.norm, "forward", lambda x: 2 * x),
    "module": lambda model: setattr(model.model.layers[1].mlp, "up_proj", Doubled(32, 40, bias=False)),
}


@pytest.mark.parametrize("after_a_step", [False, True])
@pytest.mark.parametrize("change", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_the_kernels_do_not_know_is_the_models_own(change, after_a_step, steps):
    model, input_ids = decoder(memory=None), token_ids(2, LENGTH)
    if after_a_step:
        both_ways(model, input_ids)
        assert all(logits is not None for logits in steps)
        steps.clear()
    change(model)
    assert_close(*both_ways(model, input_ids))
    assert not any(logits is not None for logits in steps)


@pytest.mark.parametrize("path", ["query_proj", "out_proj", "pre_proj"])
def test_adapters_inside_a_memory_are_heard(path, steps):
    model, input_ids = decoder(**SETTINGS["ultramem_v2"]), token_ids(2, LENGTH)
    before, _ = both_ways(model, input_ids)
    memory = model.model.memories[1]
    (memory.retrieval if path == "query_proj" else memory).get_submodule(path).__class__ = Doubled
    ours, own = both_ways(model, input_ids)
    assert_close(ours, own)
    # RMS-normed queries do not show their scale.
    assert torch.allclose(ours, before, atol=1e-3) == (path == "query_proj")
    assert all(logits is not None for logits in steps)


def test_gradients_are_the_models_own(steps):
    model, input_ids = decoder(), token_ids(1, 4)
    cache = DecodingCache(model.config, 8)
    with torch.no_grad():
        model(input_ids, past_key_values=cache)
    model(input_ids[:, :1], past_key_values=cache).logits.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    assert steps == [None]


@pytest.mark.parametrize("how", ["no compiler", "reference"])
def test_without_kernels_the_text_is_the_same(how, steps, monkeypatch):
    model, prompt = decoder(), token_ids(2, 5)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompt, **options)
    steps.clear()
    if how == "no compiler":
        monkeypatch.setattr("ultramem.ops.backends._why_not_here", lambda backend: "there is no C++ compiler")
    with use_backend("auto" if how == "no compiler" else "reference"):
        assert torch.equal(model.generate(prompt, **options), expected)
    assert steps == [None] * 7


def test_the_number_of_threads_changes_no_bit():
    model, input_ids, before = decoder(torch.bfloat16), token_ids(3, LENGTH), torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results.append(step_logits(model, input_ids[:, 2:], DecodingCache(model.config, LENGTH), start=1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_sampling_follows_the_seed(steps):
    model, prompt, sampled = decoder(), token_ids(2, 5), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        sampled.append(model.generate(prompt, max_new_tokens=12, do_sample=True))
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])
    assert all(logits is not None for logits in steps)


class Forbid(LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores[:, self.token] = -torch.inf
        return scores


def test_what_generate_offers_keeps_working(steps):
    model, prompt = decoder(output_scale=20), token_ids(1, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    plain = model.generate(prompt, **options)
    first = plain[0, 5].item()
    without = model.generate(prompt, logits_processor=LogitsProcessorList([Forbid(first)]), **options)
    assert first not in without[0, 5:]
    output = model.generate(prompt, return_dict_in_generate=True, output_scores=True, output_logits=True, **options)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert torch.equal(output.sequences, plain)
    assert len(output.scores) == len(output.logits) == 8
    third = plain[0, 7].item()
    assert model.generate(prompt, eos_token_id=third, **options)[0].tolist() == plain[0, :8].tolist()
    streamer = TextIteratorStreamer(tiny_tokenizer(vocab_size=300))
    model.generate(prompt, streamer=streamer, **options)
    assert "".join(streamer)
    assert all(logits is not None for logits in steps)
    steps.clear()
    hidden = model.generate(prompt, return_dict_in_generate=True, output_hidden_states=True, **options)
    assert len(hidden.hidden_states) == 8
    assert model.generate(prompt, num_beams=2, **options).shape == (1, 13)
    assert not any(logits is not None for logits in steps)


def test_finished_sequences_are_padded_while_others_go_on():
    model, prompts = decoder(output_scale=20), token_ids(4, 5)
    plain = model.generate(prompts, max_new_tokens=10, do_sample=False)[:, 5:]
    end = plain[0, 2].item()
    ended = model.generate(prompts, max_new_tokens=10, do_sample=False, eos_token_id=end, pad_token_id=1)[:, 5:]
    for row, expected in zip(ended.tolist(), plain.tolist(), strict=True):
        length = expected.index(end) + 1 if end in expected else len(expected)
        kept = min(length, len(row))
        assert row[:kept] == expected[:kept]
        assert set(row[kept:]) <= {1}


def test_a_returned_cache_continues_its_text():
    model, prompt = decoder(output_scale=20), token_ids(2, 5)
    options = {"do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(prompt, max_new_tokens=12, **options).sequences
    first = model.generate(prompt, max_new_tokens=5, **options)
    assert isinstance(first.past_key_values, DecodingCache)
    copied = copy.deepcopy(first.past_key_values)
    for cache in (first.past_key_values, copied):
        again = model.generate(first.sequences, past_key_values=cache, max_new_tokens=7, **options)
        assert torch.equal(again.sequences, expected)
