"""UltraMemConfig: defaults, what it refuses, JSON."""

import json
from dataclasses import fields

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from tiny_memories import decoder_config, token_ids
from ultramem import UltraMemConfig, UltraMemForCausalLM, UltraMemV2Config
from ultramem.errors import ConfigError
from ultramem.layers import Span
from ultramem.model import cost_card


def test_the_default_is_a_small_valid_ultramem():
    config = UltraMemConfig()
    assert isinstance(config.memory_config, UltraMemV2Config)
    assert config.memory["type"] == "ultramem_v2"
    assert cost_card(config).total_parameters < 20e6
    model = UltraMemForCausalLM(config)
    assert model(token_ids(1, 5)).logits.shape == (1, 5, 32_000)
    assert len(model.model.memories) == config.num_hidden_layers


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"memory": {"num_kyes": 4}}, r"memory\.num_kyes is no setting of a memory of type ultramem_v2; allowed are"),
        ({"memory": {"type": "lookup"}}, r"memory\.type must be one of ultramem_v2, .*peer; got 'lookup'"),
        ({"memory": {"type": None}}, r"memory\.type must be one of ultramem_v2, .*peer; got None"),
        ({"memory": {"num_keys": "64"}}, r"memory: .*'num_keys'.*expected int, got str \(value: '64'\)"),
        ({"memory": {"num_keys": 6.0}}, r"memory: .*'num_keys'.*expected int, got float"),
        ({"memory": {"tables": "ring", "share_ratio": "half"}}, r"memory: .*'share_ratio'.*got str"),
        ({"memory": {"projection": "add"}}, r"memory: .*'projection'.*add"),
        ({"memory": {"search": "fast"}}, r"memory: .*'search'.*fast"),
        ({"memory": {"init": "zeros"}}, r"memory: .*'init'.*zeros"),
        ({"memory": {"pre_value_activation": "relu"}}, r"memory: .*'pre_value_activation'.*relu"),
        ({"memory": {"query_per_rank": 1}}, r"memory: .*'query_per_rank'.*expected bool, got int"),
        ({"memory": {"placement": "3:9"}}, r"memory\.placement '3:9': span 3:9 does not fit 4 blocks"),
        ({"memory": {"tables": "ring", "share_ratio": 0.1}}, r"memory\.share_ratio 0\.1 gives a layer less than its"),
        ({"memory": {"top_k": 5000}}, r"memory\.top_k must lie between 1 and the 4096 slots of a layer; got 5000"),
        ({"num_attention_heads": 3}, r"hidden_size \(256\) must be a multiple of num_attention_heads \(3\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ({"hidden_size": 12}, r"hidden_size / num_attention_heads must be even.*got 12 / 4"),
        ({"rope_parameters": {"rope_type": "zzz"}}, r"rope_type must be one of default, .*yarn.*; got 'zzz'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, r"rope_type must be one of default, .*; got \['yarn'\]"),
        ({"rope_scaling": {"type": "zzz", "factor": 2.0}}, r"rope_type must be one of default, .*; got 'zzz'"),
        ({"hidden_act": "swoosh"}, r"hidden_act must be one of .*silu.*; got 'swoosh'"),
        *[
            ({name: 0}, rf"{name} must be at least 1; got 0")
            for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "max_position_embeddings",
            )
        ],
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_named(settings, text):
    with pytest.raises(ConfigError, match=text):
        UltraMemConfig(**settings)


@pytest.mark.parametrize("settings", [{"hidden_size": "256"}, {"memory": 3}, {"tie_word_embeddings": "yes"}], ids=str)
def test_wrong_types_of_the_decoders_own_fields_are_named(settings):
    (name,) = settings
    with pytest.raises(StrictDataclassError, match=rf"Validation error for field '{name}'"):
        UltraMemConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"memory": None},
        {"memory": {"placement": [0, 2]}},
        {"memory": {"placement": "0:2/1:1", "tables": "ring", "share_ratio": 1, "pre_value_activation": "gelu"}},
        {"num_key_value_heads": 1, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
        {"tie_word_embeddings": False, "attention_dropout": 0},
        {"eos_token_id": [0, 3], "initializer_range": 0.02},
    ],
    ids=str,
)  # fmt: skip
def test_json_gives_the_configuration_back(settings, tmp_path):
    config = decoder_config(**settings) if settings.get("memory", {}) is not None else UltraMemConfig(**settings)
    config.save_pretrained(tmp_path)
    loaded = UltraMemConfig.from_pretrained(tmp_path)
    for name in ("memory", "memory_spans", "num_key_value_heads", "rope_parameters", "eos_token_id", "linear_std"):
        assert getattr(loaded, name) == getattr(config, name), name
    assert loaded.to_dict() == config.to_dict()
    again = UltraMemConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()


def test_json_spells_every_setting_out(tmp_path):
    """A saved model does not change when a default does."""
    UltraMemConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(saved["memory"]) == {field.name for field in fields(UltraMemV2Config)}
    assert {"vocab_size", "hidden_size", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"} <= set(saved)
    UltraMemConfig(memory=None).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["memory"] is None


def test_configurations_do_not_share_their_memory():
    given = {"placement": [0, 1], "top_k": 4}
    first, second = UltraMemConfig(memory=given), UltraMemConfig(memory=given)
    first.memory["top_k"] = 9
    first.memory["placement"].append(2)
    assert given == {"placement": [0, 1], "top_k": 4}
    assert second.memory["top_k"] == 4
    assert second.memory_spans == [Span(0, 0), Span(1, 1)]
    default = UltraMemConfig()
    default.memory["top_k"] = 1
    assert UltraMemConfig().memory["top_k"] == 16


def test_a_dense_configuration_has_no_memory():
    config = UltraMemConfig(memory=None)
    assert config.memory_config is None
    assert config.memory_spans == []


def test_initializer_range_replaces_the_published_standard_deviation():
    assert UltraMemConfig(hidden_size=768, num_attention_heads=12).linear_std == pytest.approx(0.02282177, abs=1e-8)
    assert UltraMemConfig(initializer_range=0.3).linear_std == 0.3


def test_every_field_of_the_decoder_changes_the_model():
    """Structure, weights or output; ids of special tokens and `use_cache` belong to generation."""
    base = {"num_key_value_heads": 4, "max_position_embeddings": 64}
    changes = {
        "vocab_size": 62,
        "hidden_size": 40,
        "intermediate_size": 41,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "hidden_act": "gelu",
        "initializer_range": 0.5,
        "rms_norm_eps": 0.5,
        "rope_parameters": {"rope_theta": 10.0, "rope_type": "default"},
        "attention_bias": True,
        "attention_dropout": 0.5,
        "clip_qkv": 0.1,
        "tie_word_embeddings": False,
        "ffn": {"type": "moe", "num_experts": 4, "num_experts_per_tok": 2},
        "memory": {"placement": [1]},
    }
    ours = {field.name for field in fields(UltraMemConfig)} & set(UltraMemConfig.__annotations__)
    assert ours - set(changes) == {
        "max_position_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"
    }  # fmt: skip

    def observed(settings):
        torch.manual_seed(0)
        model = UltraMemForCausalLM(decoder_config(**settings)).train()
        shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        shared = model.lm_head.weight is model.model.embed_tokens.weight
        return shapes, shared, model(token_ids(2, 6)).logits.detach()

    for name, value in changes.items():
        # Fewer heads need fewer groups.
        before = {**base, "num_key_value_heads": 2} if name == "num_attention_heads" else base
        (shapes, shared, logits), (new_shapes, new_shared, new_logits) = (
            observed(before),
            observed({**before, name: value}),
        )
        assert not (new_shapes == shapes and new_shared == shared and torch.equal(new_logits, logits)), name
