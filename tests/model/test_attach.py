"""Memories attached to decoders of transformers: a no-op at first, trained alone, gone without a trace."""

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import ultramem
from tiny_bases import BASES, MEMORIES, base_model, make_loud, memory_settings, vision_language_model
from tiny_memories import token_ids
from tolerances import assert_bit_equal, assert_close
from ultramem.errors import ConfigError
from ultramem.model import parameter_roles

# One memory beside the MLPs of every architecture, and the other memories in one of them.
CASES = [(name, "ultramem_v2") for name in BASES] + [
    ("llama", memory) for memory in MEMORIES if memory != "ultramem_v2"
]
LOSSES = {"key_balance_weight": 0.1, "tucker_penalty_weight": 0.2, "tucker_penalty_margin": 0.0}


def attached(
    name="llama", memory="ultramem_v2", dtype=torch.float32, train="memory", layers=None, loud=True, **settings
):
    """A model with memories that, if ``loud``, say something."""
    model = base_model(name, dtype)
    adapter = ultramem.attach(model, memory_settings(memory, **settings), layers, train=train)
    if loud:
        make_loud(adapter)
    return model, adapter


def generated(model, ids, **options):
    return model.generate(
        ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "memory"), CASES)
def test_attaching_changes_no_bit(name, memory, dtype):
    model, ids = base_model(name, dtype), token_ids(2, 9)
    names = {parameter: key for key, parameter in model.named_parameters()}
    with torch.no_grad():
        before = model(ids).logits
        # torch.matmul picks its kernel by whether a weight requires a gradient: freezing alone may move the last bit.
        model.requires_grad_(False)
        continued = generated(model, ids)
        adapter = ultramem.attach(model, memory_settings(memory), "every")
        after, continued_after = model(ids).logits, generated(model, ids)
        make_loud(adapter)
        changed = model(ids).logits
    assert_bit_equal(after, before)
    assert torch.equal(continued_after.sequences, continued.sequences)
    for logits, logits_before in zip(continued_after.logits, continued.logits, strict=True):
        assert_bit_equal(logits, logits_before)
    assert changed.dtype == dtype
    assert not torch.allclose(changed, before, atol=0.1)
    kept = {parameter: key for key, parameter in model.named_parameters() if "memory_adapter" not in key}
    assert kept == names


@pytest.mark.parametrize(("name", "memory"), CASES)
def test_training_changes_only_the_memory_and_lowers_the_loss(name, memory):
    model, adapter = attached(name, memory, loud=False)
    base = {key: value.clone() for key, value in model.state_dict().items() if "memory_adapter" not in key}
    start = {key: value.clone() for key, value in adapter.named_parameters()}
    optimizer, ids = torch.optim.AdamW(adapter.parameters(), lr=3e-2), token_ids(4, 12)
    losses = []
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.refresh_retrieval()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    assert all(parameter.grad is None for key, parameter in model.named_parameters() if "memory_adapter" not in key)
    for key, value in base.items():
        assert_bit_equal(model.state_dict()[key], value)
    assert [key for key, value in adapter.named_parameters() if torch.equal(value, start[key])] == []


# The experts of gpt_oss have no fp64 kernel.
@pytest.mark.parametrize(("name", "memory"), [case for case in CASES if case[0] != "gpt_oss"])
def test_cached_generation_is_what_the_whole_sequence_gives(name, memory):
    model, _ = attached(name, memory, torch.float64)
    result = generated(model, token_ids(2, 9))
    with torch.no_grad():
        whole = model(result.sequences).logits
    num_new = len(result.logits)
    assert num_new > 1
    assert_close(torch.stack(result.logits, 1), whole[:, -num_new - 1 : -1].to(result.logits[0].dtype), torch.float32)


@pytest.mark.parametrize(("name", "memory"), CASES)
def test_detaching_restores_the_model(name, memory):
    model, ids = base_model(name), token_ids(2, 9)
    next(model.parameters()).requires_grad_(False)

    def everything():
        flags = {key: (id(value), value.requires_grad) for key, value in model.named_parameters()}
        modules = {key: id(module) for key, module in model.named_modules()}
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
        hooks = {key: [list(getattr(module, kind)) for kind in kinds] for key, module in model.named_modules()}
        return flags, modules, hooks, list(model.state_dict())

    with torch.no_grad():
        logits = model(ids).logits
        before = everything()
        make_loud(ultramem.attach(model, memory_settings(memory), train="all"))
        assert not torch.equal(model(ids).logits, logits)
        ultramem.detach(model)
        assert everything() == before
        assert_bit_equal(model(ids).logits, logits)


def test_a_vision_language_model_gets_memories_in_its_text_decoder():
    model, ids = vision_language_model(), token_ids(2, 9)
    with torch.no_grad():
        before = model(ids).logits
        adapter = ultramem.attach(model, memory_settings())
        assert_bit_equal(model(ids).logits, before)
        make_loud(adapter)
        assert not torch.allclose(model(ids).logits, before, atol=0.1)
    assert (adapter.base.model_type, adapter.base.hidden_size, adapter.blocks) == ("gemma3_text", 32, [0, 1, 2])
    assert all(not module._forward_hooks for module in model.model.vision_tower.modules())


@pytest.mark.parametrize(
    ("layers", "placement", "blocks"),
    [
        ("every", [1], [0, 1, 2]),
        ([2, 0], "every", [0, 2]),
        ((1,), "every", [1]),
        (None, [0, 1], [0, 1]),
        (None, "every", [0, 1, 2]),
    ],
)
def test_layers_decide_where_memories_stand(layers, placement, blocks):
    model, adapter = attached(layers=layers, placement=placement)
    assert adapter.blocks == blocks
    assert [block for block in range(3) if model.model.layers[block].mlp._forward_hooks] == blocks
    assert [memory.memory_index for memory in adapter.memories] == list(range(len(blocks)))
    assert adapter.pool.num_rows == len(blocks) * 36


def test_settings_may_be_typed():
    settings = memory_settings(num_heads=2)
    del settings["type"]
    adapter = ultramem.attach(base_model(), ultramem.UltraMemV2Config(**settings), [1])
    assert (adapter.config.num_heads, adapter.config.placement) == (2, [1])


@pytest.mark.parametrize(("train", "of_base", "of_memory"), [("memory", 0, 1), ("all", 1, 1), ("none", 0, 0)])
def test_train_decides_what_requires_a_gradient(train, of_base, of_memory):
    model, adapter = attached(train=train)
    memory = {id(parameter) for parameter in adapter.parameters()}
    assert {parameter.requires_grad for parameter in adapter.parameters()} == {bool(of_memory)}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in memory]
    assert {parameter.requires_grad for parameter in rest} == {bool(of_base)}


def test_the_model_reaches_the_adapter():
    model, adapter = attached()
    assert model.memory_adapter is adapter
    assert not any(module.training for module in adapter.modules())
    model.train()
    assert all(module.training for module in adapter.modules())
    model.to(torch.float64)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float64}
    assert parameter_roles(adapter)["pool.values"] == "table"


def test_added_weights_of_a_16_bit_model_are_float32():
    model, adapter = attached(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    model.to(torch.bfloat16)
    assert model(token_ids(1, 5)).logits.dtype == torch.bfloat16


def test_tables_are_drawn_at_the_scale_of_a_decoder_with_memories():
    """As `UltraMemModel` draws them for the same sizes; only the zeroed output projections are the adapter's own."""
    _, adapter = attached(loud=False, num_keys=48, pre_value_dim=16, value_dim=16)
    own = ultramem.UltraMemForCausalLM(
        ultramem.UltraMemConfig(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            memory=memory_settings(num_keys=48, pre_value_dim=16, value_dim=16),
        )
    )
    expected = float(own.model.memory_pool.values.detach().std())
    assert float(adapter.pool.values.detach().std()) == pytest.approx(expected, rel=0.1)
    assert float(adapter.pool.pre_values.detach().std()) == pytest.approx(expected, rel=0.1)


def test_auxiliary_losses_leave_with_the_output():
    model, adapter = attached(**LOSSES)
    ids = token_ids(2, 9)
    output = model(ids, labels=ids)
    cross_entropy = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert set(output.auxiliary_losses) == {"key_balance", "tucker_penalty"}
    assert all(float(loss.detach()) > 0 for loss in output.auxiliary_losses.values())
    assert_close(output.loss, cross_entropy + sum(output.auxiliary_losses.values()))
    penalties = sum(0.2 * memory.retrieval.tucker_penalty(0.0) for memory in adapter.memories)
    assert_close(output.auxiliary_losses["tucker_penalty"], penalties)
    again = model(ids)
    assert again.loss is None
    assert_close(again.auxiliary_losses["key_balance"], output.auxiliary_losses["key_balance"])


def test_a_base_model_without_a_loss_hands_them_on_too():
    model = base_model().model
    ultramem.attach(model, memory_settings(**LOSSES), [1])
    assert set(model(token_ids(2, 9)).auxiliary_losses) == {"key_balance", "tucker_penalty"}


def test_micro_batches_add_their_share_of_the_auxiliary_losses():
    model, _ = attached(**LOSSES)
    ids = token_ids(2, 9)
    labels = ids.clone()
    labels[0, 6:] = -100
    output = model(ids, labels=labels, num_items_in_batch=40)
    cross_entropy = model.loss_function(output.logits, labels, 61, num_items_in_batch=40)
    assert_close(output.loss, cross_entropy + 13 / 40 * sum(output.auxiliary_losses.values()))


def test_auxiliary_losses_are_not_dropped_silently():
    model, _ = attached(**LOSSES)
    with pytest.raises(ConfigError, match=r"cannot leave in a tuple; call the model with return_dict=True"):
        model(token_ids(2, 9), return_dict=False)
    model, _ = attached()
    assert isinstance(model(token_ids(2, 9), return_dict=False), tuple)


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("train", ["memory", "all"])
def test_gradient_checkpointing_gives_the_same_gradients(train):
    model, _ = attached(train=train, **LOSSES)
    model.train()
    expected = gradients(model, token_ids(2, 9))
    model.gradient_checkpointing_enable()
    actual = gradients(model, token_ids(2, 9))
    assert len(actual) == len(expected) > 20
    for name, gradient in actual.items():
        assert_close(gradient, expected[name])


def test_reentrant_checkpointing_is_refused_where_it_would_lose_gradients():
    model, _ = attached(train="all", **LOSSES)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match=r"use_reentrant=True loses the gradients of the memories' auxiliary losses"):
        gradients(model, token_ids(2, 9))
    model, _ = attached(train="all")
    model.train()
    expected = gradients(model, token_ids(2, 9))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert_close(
        gradients(model, token_ids(2, 9))["memory_adapter.pool.values"], expected["memory_adapter.pool.values"]
    )


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_in_one_graph(backend):
    model, _ = attached(**LOSSES)
    ids = token_ids(2, 9)
    expected, expected_gradients = model(ids, labels=ids, use_cache=False), gradients(model, ids)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    output = compiled(ids, labels=ids, use_cache=False)
    assert_close(output.logits, expected.logits)
    assert_close(output.auxiliary_losses["key_balance"], expected.auxiliary_losses["key_balance"])
    model.zero_grad()
    output.loss.backward()
    for name, gradient in expected_gradients.items():
        assert_close(model.get_parameter(name).grad, gradient)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_has_memories_of_its_own(duplicate):
    model, _ = attached()
    ids = token_ids(2, 9)
    with torch.no_grad():
        logits = model(ids).logits
        twin = duplicate(model)
        assert_bit_equal(twin(ids).logits, logits)
        twin.memory_adapter.pool.values.mul_(2)
        assert not torch.equal(twin(ids).logits, logits)
        assert_bit_equal(model(ids).logits, logits)
        ultramem.detach(twin)
        assert_bit_equal(twin(ids).logits, base_model()(ids).logits)
        assert_bit_equal(model(ids).logits, logits)


def opt_without_mlp():
    import transformers

    sizes = {"vocab_size": 61, "hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, word_embed_proj_dim=32))


def two_towers():
    model = base_model()
    model.model.others = copy.deepcopy(model.model.layers)
    return model


def with_memories():
    return attached()[0]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (opt_without_mlp, {}, r"OPTForCausalLM has no list of blocks that all have an `mlp`; memories can be attached"),
        (two_towers, {}, r"several lists of blocks with an `mlp`: layers, others; attach to the submodule that is"),
        (with_memories, {}, r"has memories attached already; call ultramem.detach\(model\) first"),
        (lambda: nn.Linear(2, 2), {}, r"takes a model of transformers; got a Linear"),
        (lambda: base_model().to("meta"), {}, r"on the meta device; load its weights before"),
        (base_model, {"train": "tables"}, r"train must be one of memory, all, none; got 'tables'"),
        (base_model, {"layers": "0:1"}, r"'0:1' has spans; .* Give layers a list of blocks in 0…2 or \"every\""),
        (base_model, {"layers": [3]}, r"span 3:3 does not fit 3 blocks"),
        (base_model, {"layers": []}, r"placement is empty"),
        (base_model, {"memory_config": {"type": "ntm"}}, r"memory.type must be one of ultramem_v2"),
        (
            base_model,
            {"memory_config": memory_settings(position="replace")},
            r"'replace' is for ultramem's own decoder",
        ),
        (
            base_model,
            {"memory_config": memory_settings("ultramem", query_conv=3)},
            r"a cache .* set memory.query_conv to",
        ),
    ],
)
def test_what_cannot_be_attached_is_refused(make, options, message):
    model = make()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ConfigError, match=message):
        ultramem.attach(model, **{"memory_config": memory_settings(), **options})
    assert [name for name, _ in model.named_parameters()] == names


def test_the_documented_example_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "attach.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "docs/attach.md", "exec"), names)
    assert names["after"] < names["before"] - 0.5
    assert capsys.readouterr().out.startswith("loss 6.")
    assert names["model"](names["ids"], labels=names["ids"]).loss.item() == names["after"]


def test_nothing_to_detach():
    with pytest.raises(ConfigError, match=r"no memories are attached to this LlamaForCausalLM; give the model that"):
        ultramem.detach(base_model())
