import pytest
import torch

from tiny_memories import DECODERS, decoder
from ultramem.model import parameter_roles


@pytest.mark.parametrize("settings", [*DECODERS.values(), {"attention_bias": True}], ids=[*DECODERS, "biases"])
def test_roles_cover_every_parameter_exactly_once(settings):
    model = decoder(**settings)
    roles = parameter_roles(model)
    named = dict(model.named_parameters())
    assert set(roles) == set(named)
    assert len({id(named[name]) for name in roles}) == len(list(model.parameters()))
    assert set(roles.values()) <= {"matrix", "norm", "embedding", "key", "table"}


def test_every_kind_of_parameter_has_its_role():
    roles = parameter_roles(decoder(attention_bias=True, tie_word_embeddings=False))
    memory = "model.layers.0.memories.0"
    expected = {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "matrix",
        "model.norm.weight": "norm",
        "model.layers.0.input_layernorm.weight": "norm",
        "model.layers.0.self_attn.q_norm.weight": "norm",
        "model.layers.0.self_attn.q_proj.weight": "matrix",
        "model.layers.0.self_attn.q_proj.bias": "norm",
        "model.layers.0.mlp.down_proj.weight": "matrix",
        f"{memory}.retrieval.keys": "key",
        f"{memory}.retrieval.cores": "key",
        f"{memory}.retrieval.query_norm": "norm",
        f"{memory}.retrieval.key_norm": "norm",
        f"{memory}.retrieval.query_proj.weight": "matrix",
        f"{memory}.pre_proj.weight": "matrix",
        f"{memory}.out_proj.weight": "matrix",
        "model.memory_pool.values": "table",
        "model.memory_pool.pre_values": "table",
    }
    assert {name: roles[name] for name in expected} == expected
    assert [name for name, role in roles.items() if role == "table"] == list(expected)[-2:]


def test_parameters_that_only_some_memories_have():
    memory = "model.layers.0.memories.0"
    pkm = parameter_roles(decoder(memory={"type": "pkm", "query_norm": "batch", "key_norm": True, "output_proj": True}))
    assert {name.removeprefix(f"{memory}.") for name in pkm if name.startswith(memory)} == {
        "out_proj.weight", "out_proj.bias", "retrieval.query_proj.weight", "retrieval.query_proj.bias",
        "retrieval.query_norm", "retrieval.query_shift", "retrieval.key_norm", "retrieval.keys",
    }  # fmt: skip
    for name in ("query_norm", "query_shift", "key_norm", "query_proj.bias"):
        assert pkm[f"{memory}.retrieval.{name}"] == "norm"
    assert pkm[f"{memory}.out_proj.bias"] == "norm"
    assert pkm[f"{memory}.retrieval.keys"] == "key"
    memory_plus = parameter_roles(decoder(memory={"type": "memory_plus"}))
    assert memory_plus[f"{memory}.gate_proj.weight"] == "matrix"
    assert memory_plus[f"{memory}.gate_proj.bias"] == "norm"
    peer = parameter_roles(decoder(memory={"type": "peer"}))
    assert [name for name, role in peer.items() if role == "table"] == [
        "model.memory_pool.values", "model.memory_pool.pre_values",
    ]  # fmt: skip


def test_a_tied_matrix_is_an_embedding_once():
    roles = parameter_roles(decoder())
    assert roles["model.embed_tokens.weight"] == "embedding"
    assert "lm_head.weight" not in roles


class Undeclared(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mystery = torch.nn.Parameter(torch.zeros(2))


class Misspelt(Undeclared):
    parameter_roles = {"mystery": "matrices"}  # noqa: RUF012


@pytest.mark.parametrize("kind", [Undeclared, Misspelt])
def test_an_undeclared_parameter_is_named(kind):
    model = decoder()
    model.model.layers[1].extra = kind()
    with pytest.raises(
        TypeError, match=rf"{kind.__name__} at 'model\.layers\.1\.extra' declares no role for its parameter 'mystery'"
    ):
        parameter_roles(model)


def test_a_subclass_of_a_known_module_must_declare_too():
    class Weird(torch.nn.Linear):
        pass

    with pytest.raises(TypeError, match="Weird at '' declares no role for its parameter 'weight'"):
        parameter_roles(Weird(2, 2))
