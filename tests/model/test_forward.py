"""The decoder's forward against one written by hand, what it returns, and the ways in which it may run."""

import math

import pytest
import torch

from tiny_memories import DECODERS, decoder, token_ids
from tolerances import assert_close
from ultramem.errors import ConfigError
from ultramem.layers import MEMORY_TYPES

decoders = pytest.mark.parametrize("settings", DECODERS.values(), ids=DECODERS)


def norm(module, x):
    # OLMoE's norms work in fp32 whatever the model's dtype.
    wide = x.float()
    return module.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def attend(attention, x):
    """Causal attention with grouped keys, QK-norm over the whole width and rotary embedding from position 0."""
    num_heads, num_groups, width = 4, 2, 8
    (batch, length), weight = x.shape[:2], lambda name: getattr(attention, name).weight
    q = norm(attention.q_norm, x @ weight("q_proj").T).view(batch, length, num_heads, width).transpose(1, 2)
    k = norm(attention.k_norm, x @ weight("k_proj").T).view(batch, length, num_groups, width).transpose(1, 2)
    v = (x @ weight("v_proj").T).view(batch, length, num_groups, width).transpose(1, 2)
    # transformers makes angles in fp32.
    frequencies = 1.0 / (10_000 ** (torch.arange(0, width, 2).float() / width))
    angle = torch.arange(length)[:, None].float() * frequencies
    cos, sin = (torch.cat([part, part], -1).to(x.dtype) for part in (angle.cos(), angle.sin()))

    def rotate(heads):
        half = width // 2
        return heads * cos + torch.cat([-heads[..., half:], heads[..., :half]], -1) * sin

    q, k = rotate(q), rotate(k)
    k, v = (heads.repeat_interleave(num_heads // num_groups, dim=1) for heads in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(width)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1) @ weight("o_proj").T


def handwritten(model, input_ids):
    """Hidden states before the first block and after every block, the last one normed; memories by their spans."""
    decoder, spans = model.model, model.config.memory_spans
    x = decoder.embed_tokens.weight[input_ids]
    states, results, starts = [x], {}, {span.start for span in spans}
    for index, block in enumerate(decoder.layers):
        x = x + attend(block.self_attn, norm(block.input_layernorm, x))
        h = norm(block.post_attention_layernorm, x)
        if not (model.config.memory and model.config.memory["position"] == "replace" and index in starts):
            mlp = block.mlp
            gate = h @ mlp.gate_proj.weight.T
            x = x + (gate * gate.sigmoid() * (h @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
        for number, span in enumerate(spans):
            if span.start == index:
                results[number] = decoder.memories[number](h, decoder.memory_pool).output
            if span.end == index:
                x = x + results[number]
        states.append(x)
    return [*states[:-1], norm(decoder.norm, x)]


@decoders
def test_forward_is_the_one_written_by_hand(settings):
    model, input_ids = decoder(**settings), token_ids(2, 9)
    with torch.no_grad():
        expected = handwritten(model, input_ids)
        outputs = model(input_ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == len(expected)
    for ours, theirs in zip(outputs.hidden_states, expected, strict=True):
        assert_close(ours, theirs)
    assert_close(outputs.logits, expected[-1] @ model.lm_head.weight.T)


def test_every_span_is_read_and_added():
    """Silencing one memory changes hidden states from its end on, and none before."""
    settings = DECODERS["spans"]
    input_ids = token_ids(1, 5)
    expected = decoder(**settings)(input_ids, output_hidden_states=True).hidden_states
    spans = decoder(**settings).config.memory_spans
    assert [tuple(span) for span in spans] == [(0, 1), (0, 2), (1, 2), (2, 2)]
    for number, span in enumerate(spans):
        model = decoder(**settings)
        with torch.no_grad():
            model.model.memories[number].out_proj.weight.zero_()
        states = model(input_ids, output_hidden_states=True).hidden_states
        changed = [not torch.allclose(ours, theirs) for ours, theirs in zip(states, expected, strict=True)]
        assert changed == [index > span.end for index in range(4)]


def test_the_placement_changes_the_output():
    outputs = [decoder(memory={"placement": place})(token_ids(1, 5)).logits for place in ([0, 1], [0, 2], "0:0/1:2")]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def test_memories_share_one_pool_through_their_own_windows():
    model = decoder(memory={"placement": "0:2/0:1/1:2/2:2"})
    memories = model.model.memories
    assert [memory.memory_index for memory in memories] == [0, 1, 2, 3]
    assert [memory.window.offset for memory in memories] == [0, 36, 72, 108]
    assert model.model.memory_pool.num_rows == 4 * 36
    assert model.num_slots_per_memory == [36] * 4
    permutations = {tuple(memory.permutation.tolist()) for memory in memories}
    assert len(permutations) == 4


def test_a_dense_model_has_nothing_of_a_memory():
    model = decoder(memory=None)
    assert model.model.memory_pool is None
    assert model.model.memories == []
    assert model.num_slots_per_memory == []
    assert not [name for name in model.state_dict() if "memor" in name]
    model.refresh_retrieval()
    model.set_table_gradients("rows")
    output = model(token_ids(1, 4), labels=token_ids(1, 4), output_memory_statistics=True)
    assert output.auxiliary_losses is None
    assert output.memory_statistics == ()


def test_loss_is_cross_entropy_plus_weighted_auxiliary_losses():
    model = decoder(**DECODERS["losses"])
    input_ids, labels = token_ids(2, 9), token_ids(2, 9)
    labels[0, :4] = -100
    outputs = model(input_ids, labels=labels, output_hidden_states=True)
    assert set(outputs.auxiliary_losses) == {"key_balance", "tucker_penalty"}
    targets = labels[:, 1:].flatten()
    shifted = outputs.logits[:, :-1].flatten(0, 1).log_softmax(-1)
    cross_entropy = -torch.stack([line[t] for line, t in zip(shifted, targets, strict=True) if t != -100]).mean()
    # The loss function of transformers works in fp32.
    assert_close(outputs.loss, cross_entropy + sum(outputs.auxiliary_losses.values()), torch.float32)
    penalties = [memory.retrieval.tucker_penalty(0.0) for memory in model.model.memories]
    assert len(penalties) == 3
    assert_close(outputs.auxiliary_losses["tucker_penalty"], 0.2 * sum(penalties))
    unlabelled = model(input_ids)
    assert unlabelled.loss is None
    assert_close(unlabelled.auxiliary_losses["key_balance"], outputs.auxiliary_losses["key_balance"])


def test_micro_batches_add_up_to_the_whole_batch():
    model = decoder(memory={"tucker_penalty_weight": 0.2, "tucker_penalty_margin": 0.0})
    input_ids = token_ids(4, 9)
    whole = model(input_ids, labels=input_ids)
    assert whole.auxiliary_losses["tucker_penalty"] > 1e-3
    parts = [model(part, labels=part, num_items_in_batch=4 * 8).loss for part in (input_ids[:1], input_ids[1:])]
    assert_close(parts[0] + parts[1], whole.loss, torch.float32)


def test_auxiliary_losses_reach_the_gradient():
    input_ids = token_ids(2, 9)
    gradients = []
    for weight in (0.0, 0.5):
        model = decoder(memory={"key_balance_weight": weight})
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append(model.model.memories[0].retrieval.keys.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4


def test_statistics_of_every_memory():
    model = decoder(memory={"placement": "0:2/1:1", "num_heads": 2})
    outputs = model(token_ids(2, 5), output_memory_statistics=True)
    assert len(outputs.memory_statistics) == 2
    for statistics, num_slots in zip(outputs.memory_statistics, model.num_slots_per_memory, strict=True):
        assert statistics["slots_NK"].shape == statistics["scores_NK"].shape == (10, 8)
        assert 0 <= statistics["slots_NK"].min() <= statistics["slots_NK"].max() < num_slots
        assert statistics["singular_values"].shape == (2, 2)
        assert statistics["output_std"].shape == ()
    assert model(token_ids(2, 5)).memory_statistics is None


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4])], ids=str)
def test_logits_of_chosen_positions(kept):
    model, input_ids = decoder(), token_ids(2, 6)
    full = model(input_ids).logits
    assert model(input_ids, logits_to_keep=0).logits.shape == (2, 6, 61)
    expected = full[:, -kept:] if isinstance(kept, int) else full[:, kept]
    assert_close(model(input_ids, logits_to_keep=kept).logits, expected)


def test_embeddings_may_take_the_place_of_ids():
    model, input_ids = decoder(), token_ids(2, 6)
    embeds = model.model.embed_tokens(input_ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids).logits)
    for arguments in ({}, {"input_ids": input_ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**arguments)


def test_eager_attention_gives_its_weights_and_the_logits_of_sdpa():
    # Not in fp64: the mask's -1.8e308 overflows in eager attention's fp32 softmax.
    model, input_ids = decoder(torch.float32), token_ids(2, 6)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    expected = model(input_ids, attention_mask=mask)
    model.set_attn_implementation("eager")
    outputs = model(input_ids, attention_mask=mask, output_attentions=True)
    assert_close(outputs.logits[1], expected.logits[1])
    assert_close(outputs.logits[0, 2:], expected.logits[0, 2:])
    assert [weights.shape for weights in outputs.attentions] == [(2, 4, 6, 6)] * 3
    assert_close(outputs.attentions[0][1].sum(-1), torch.ones(4, 6))
    assert (outputs.attentions[0][1].triu(1) == 0).all()


def test_a_tuple_comes_without_return_dict():
    model, input_ids = decoder(), token_ids(2, 6)
    expected = model(input_ids, labels=input_ids)
    loss, logits = model(input_ids, labels=input_ids, use_cache=False, return_dict=False)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)


@decoders
def test_gradient_checkpointing_changes_no_gradient(settings):
    input_ids = token_ids(2, 6)
    results = []
    for checkpointing in (False, True):
        model = decoder(**settings).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        output = model(input_ids, labels=input_ids)
        output.loss.backward()
        results.append([output.loss.detach(), *[parameter.grad for parameter in model.parameters()]])
    for plain, checkpointed in zip(*results, strict=True):
        assert_close(checkpointed, plain)


def test_gradient_checkpointing_advances_running_statistics_once():
    statistics = {}
    for checkpointing in (False, True):
        model = decoder(memory={"type": "pkm", "num_keys": 8, "key_dim": 8, "top_k": 4, "query_norm": "batch"}).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        input_ids = token_ids(2, 6)
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
        retrieval = model.model.layers[0].memories[0].retrieval
        statistics[checkpointing] = retrieval.query_mean, retrieval.query_variance
        assert statistics[checkpointing][0].abs().max() > 0
    torch.testing.assert_close(statistics[True], statistics[False], rtol=0, atol=0)


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ConfigError, match="use_reentrant=True loses gradients of the memories; leave it out or set it"):
        decoder().gradient_checkpointing_enable({"use_reentrant": True})
    decoder().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_mode_collects_the_dense_gradient(checkpointing):
    input_ids = token_ids(2, 6)
    dense, rows = (decoder(memory={"tables": "ring", "share_ratio": 0.8}).train() for _ in range(2))
    rows.set_table_gradients("rows")
    if checkpointing:
        rows.gradient_checkpointing_enable()
    for model in (dense, rows):
        model(input_ids, labels=input_ids).loss.backward()
    pool = rows.model.memory_pool
    for name, collector in (("values", pool.value_gradients), ("pre_values", pool.pre_value_gradients)):
        expected = getattr(dense.model.memory_pool, name).grad
        assert getattr(pool, name).grad is None
        assert len(collector.contributions) == 3
        assert_close(torch.zeros_like(expected).index_copy(0, *collector.coalesce()), expected)
    for ours, theirs in zip(rows.named_parameters(), dense.named_parameters(), strict=True):
        if "memory_pool" not in ours[0]:
            assert_close(ours[1].grad, theirs[1].grad)


@decoders
def test_every_parameter_gets_a_gradient(settings):
    model = decoder(**settings).train()
    input_ids = token_ids(4, 12)
    model(input_ids, labels=input_ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


COMPILED_SLOWLY = ["spans", "untied", "replace", *MEMORY_TYPES]
TWO_BLOCKS = {"num_hidden_layers": 2, "memory": {"placement": "0:1/1:1", "key_balance_weight": 0.1}}


@pytest.mark.parametrize(
    "settings",
    [TWO_BLOCKS, *[pytest.param(DECODERS[name], marks=pytest.mark.slow) for name in COMPILED_SLOWLY]],
    ids=["two_blocks", *COMPILED_SLOWLY],
)
def test_compiles_without_a_graph_break(settings, fresh_compiler):
    model = decoder(**settings)
    input_ids = token_ids(2, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, output = (run(input_ids, labels=input_ids, use_cache=False) for run in (model, compiled))
    assert_close(output.logits, expected.logits)
    parameters = list(model.parameters())
    gradients = zip(*(torch.autograd.grad(result.loss, parameters) for result in (output, expected)), strict=True)
    for ours, theirs in gradients:
        assert_close(ours, theirs)


@pytest.mark.parametrize("memory", [{}, {"type": "ultramem", "query_conv": 2}], ids=["keys_values", "convolution"])
def test_compiles_with_the_cache_that_it_makes(memory, fresh_compiler):
    model, input_ids = decoder(num_hidden_layers=1, memory=memory), token_ids(2, 6)
    expected = model(input_ids)
    outputs = torch.compile(model, fullgraph=True, backend="eager")(input_ids)
    assert_close(outputs.logits, expected.logits)
    assert outputs.past_key_values.get_seq_length() == 6


@pytest.mark.slow
def test_inductor_compiles_the_training_step(fresh_compiler):
    model = decoder(dtype=torch.float32, num_hidden_layers=1, memory={"key_balance_weight": 0.1}).train()
    input_ids = token_ids(2, 6)
    model.refresh_retrieval()
    compiled = torch.compile(model, fullgraph=True)
    expected, output = (run(input_ids, labels=input_ids, use_cache=False) for run in (model, compiled))
    assert_close(output.loss, expected.loss)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@decoders
def test_bf16_is_finite_and_near(settings):
    model, input_ids = decoder(torch.bfloat16, **settings), token_ids(2, 12)
    outputs = model(input_ids, labels=input_ids)
    assert outputs.logits.dtype == torch.bfloat16
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    exact = decoder(**settings)
    exact.load_state_dict(model.state_dict())
    expected = exact(input_ids).logits
    similarity = torch.nn.functional.cosine_similarity(outputs.logits.double(), expected, dim=-1)
    assert similarity.mean() > 0.98


def test_autocast_trains_in_bf16_around_an_fp32_search():
    model, input_ids = decoder(torch.float32, **DECODERS["losses"]).train(), token_ids(2, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(input_ids, labels=input_ids)
    assert outputs.loss.dtype == torch.float32
    assert outputs.logits.dtype == torch.bfloat16
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    expected = model(input_ids, labels=input_ids).loss
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=0.05)


def test_no_activation_is_left_unwritten(poisoned_memory):
    model, input_ids = decoder(**DECODERS["losses"]).train(), token_ids(2, 6)
    loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_refreshing_reaches_every_memory():
    model = decoder(memory={"placement": "0:2/0:1/1:2"})
    with torch.no_grad():
        for memory in model.model.memories:
            memory.retrieval.cores.copy_(torch.eye(2).flip(0) + 0.1 * torch.eye(2)[0])
    before = [memory.retrieval.row_direction.clone() for memory in model.model.memories]
    model.refresh_retrieval()
    for old, memory in zip(before, model.model.memories, strict=True):
        assert not torch.equal(old, memory.retrieval.row_direction)
