"""``--scale``: the same shape at a tiny size, for every shipped config and every preset."""

import copy
import math
from pathlib import Path

import pytest
import torch
import yaml

from ultramem import UltraMemConfig, UltraMemForCausalLM
from ultramem.errors import ConfigError
from ultramem.model import cost_card
from ultramem.model.presets import PRESETS
from ultramem.training.config import RunConfig, load_config
from ultramem.training.run import model_config, resolve_config, train
from ultramem.training.scale import SCALES, scale_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TINY = SCALES["tiny"]


def tiny(config: RunConfig) -> RunConfig:
    return scale_config(config, model_config(config), "tiny")


def tiny_model(**settings) -> dict:
    config = RunConfig.from_dict({"run": {"save_folder": "runs/x"}, "training": {"max_steps": 7}})
    config.model = settings
    scaled = tiny(config).model
    UltraMemConfig(**scaled)
    return scaled


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_trains_saves_and_loads_again(path, data_folder, tmp_path):
    # Two steps; the config's own length is tried below without training.
    overrides = [f"data.folder={data_folder}", f"run.save_folder={tmp_path}/run", "training.max_tokens=512"]
    config, manifest = resolve_config(path, overrides, "tiny")
    folder = train(config, manifest)
    assert folder == tmp_path / "run-tiny" / "step2-hf"
    model = UltraMemForCausalLM.from_pretrained(folder)
    real = model_config(load_config(path))
    assert model.config.vocab_size == manifest.vocab_size
    assert model.config.eos_token_id == manifest.eos_token_id
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    assert (model.config.memory or {}).get("type") == (real.memory or {}).get("type")
    assert model.config.ffn["type"] == real.ffn["type"]
    with torch.no_grad():
        output = model(input_ids=torch.arange(32)[None], labels=torch.arange(32)[None])
    assert output.loss.isfinite()
    # The same config finds its run complete.
    assert train(*resolve_config(path, overrides, "tiny")) == folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_proportions_of_a_shipped_config_stay(path):
    config = load_config(path)
    before = copy.deepcopy(config)
    scaled = tiny(config)
    assert config == before
    assert scaled.num_steps == TINY.num_steps
    assert scaled.run.save_folder == f"{config.run.save_folder}-tiny"
    assert scaled.optimizer == config.optimizer
    assert scaled.schedule.warmup_fraction == config.schedule.warmup_fraction
    if config.schedule.warmup_tokens is not None:
        share = config.schedule.warmup_tokens / config.num_tokens
        assert scaled.schedule.warmup_tokens == pytest.approx(share * scaled.num_tokens, abs=1)
    intervals = {scaled.checkpoint.interval_steps, scaled.validation.interval_steps, scaled.logging.interval_steps}
    assert intervals == {10}
    assert (scaled.logging.memory_interval_steps is None) == (config.logging.memory_interval_steps is None)
    scaled.validate()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_scaling_twice_is_scaling_once(path):
    scaled = tiny(load_config(path))
    assert tiny(scaled) == scaled


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_keeps_its_shape(name):
    real = UltraMemConfig.from_preset(name)
    scaled = UltraMemConfig(**tiny_model(**PRESETS[name]), vocab_size=64)
    assert cost_card(scaled).total_parameters < 200_000
    assert scaled.hidden_size == TINY.hidden_size
    assert scaled.tie_word_embeddings == real.tie_word_embeddings
    assert scaled.intermediate_size / scaled.hidden_size == pytest.approx(
        real.intermediate_size / real.hidden_size, rel=0.05
    )
    if (memory := scaled.memory_config) is not None:
        unchanged = ("type", "position", "tables", "init", "num_cores", "rank", "key_expansion", "search")
        assert {key: scaled.memory.get(key) for key in unchanged} == {key: real.memory.get(key) for key in unchanged}
        assert memory.num_keys == TINY.num_keys
        if real.memory["placement"] != "every":
            assert len(scaled.memory_spans) == len(real.memory_spans)
    else:
        assert real.memory is None


@pytest.mark.parametrize(
    ("placement", "num_blocks", "expected"),
    [
        ("every", 20, "every"),
        ([4, 8, 12, 16], 20, [1, 2, 3, 4]),
        ("2:5/6:9/10:13/14:17", 20, "0:1/1:2/2:3/3:4"),
        ([3, 6, 9], 12, [1, 2, 3]),
        ("2:4/5:7/8:10", 12, "0:1/2:3/3:4"),
        # Memories that meet in a block become one; a span within a block stays within one.
        ([0, 1, 2, 3, 38, 39], 40, [0, 4]),
        ("7:7/39:39/38:39", 40, "0:0/4:4"),
        ("0:1/2:3", 4, "0:1/2:3"),
    ],
)
def test_placements_map_to_fewer_blocks(placement, num_blocks, expected):
    scaled = tiny_model(num_hidden_layers=num_blocks, memory={"placement": placement})
    assert scaled["memory"]["placement"] == expected
    assert scaled["num_hidden_layers"] == min(num_blocks, 5)


def test_what_is_small_already_stays():
    settings = {
        "hidden_size": 12,
        "intermediate_size": 3,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "memory": {"num_keys": 5, "key_dim": 3, "value_dim": 2, "pre_value_dim": 1, "top_k": 3, "coarse_top_k": 2},
    }
    scaled = tiny_model(**settings)
    assert {key: scaled[key] for key in settings if key != "memory"} == {
        key: settings[key] for key in settings if key != "memory"
    }
    assert {key: scaled["memory"][key] for key in settings["memory"]} == settings["memory"]


@pytest.mark.parametrize(
    "memory",
    [
        {"tables": "ring", "share_ratio": 1 / 16, "num_keys": 100},
        {"num_cores": 8, "value_dim": 64, "top_k": 30, "coarse_top_k": 6, "num_keys": 100},
        {"num_keys": 100, "top_k": 10, "coarse_top_k": 5, "search": "signed"},
        {"num_keys": 100, "top_k": 3, "coarse_top_k": 3, "search": "signed"},
        {"num_keys": 100, "top_k": 3, "coarse_top_k": 90, "search": "exact"},
        {"num_keys": 2, "top_k": 4, "pre_value_dim": 0},
        {"type": "pkm", "value_dim": 256, "output_proj": False, "num_heads": 8, "position": "replace"},
        {"type": "peer", "tables": "ring", "share_ratio": 0.1},
        {"type": "memory_plus", "query_norm": "batch", "num_keys": 300},
        {"type": "ultramem", "query_conv": 3, "key_expansion": 3, "num_cores": 4},
    ],
)
def test_unusual_memories_stay_possible(memory):
    scaled = tiny_model(hidden_size=256, num_hidden_layers=16, memory=memory)
    for key in memory.keys() & {"type", "tables", "search", "num_cores", "query_conv", "key_expansion", "position"}:
        assert scaled["memory"][key] == memory[key]


@pytest.mark.parametrize(
    ("heads", "groups", "expected"), [(12, 12, (4, 4)), (12, 4, (4, 1)), (3, 3, (2, 2)), (8, 4, (4, 2))]
)
def test_attention_heads_stay_in_groups(heads, groups, expected):
    scaled = tiny_model(hidden_size=48 * heads, num_attention_heads=heads, num_key_value_heads=groups, memory=None)
    assert (scaled["num_attention_heads"], scaled["num_key_value_heads"]) == expected


def test_initial_weights_keep_their_scale():
    """√(2/(5D)) of the real width becomes √(2/(5D)) of the tiny one."""
    scaled = tiny_model(hidden_size=768, num_attention_heads=12, initializer_range=math.sqrt(2 / (5 * 768)))
    assert scaled["initializer_range"] == pytest.approx(math.sqrt(2 / (5 * 32)))


def test_experts_that_share_the_inner_width():
    scaled = tiny_model(
        hidden_size=320, num_attention_heads=5, intermediate_size=1280, ffn={"type": "moe"}, memory=None
    )
    assert scaled["ffn"]["intermediate_size"] is None
    assert UltraMemConfig(**scaled).ffn_config.expert_size(scaled["intermediate_size"]) == 64


@pytest.mark.parametrize(
    ("batch", "micro", "expected"), [(768, 3, (8, 2)), (6, 3, (6, 2)), (9, 3, (8, 2)), (5, 5, (5, 1))]
)
def test_micro_batches_divide_the_batch(config_path, batch, micro, expected):
    overrides = [f"training.global_batch_sequences={batch}", f"training.micro_batch_sequences={micro}"]
    scaled = tiny(load_config(config_path, overrides))
    assert (scaled.training.global_batch_sequences, scaled.training.micro_batch_sequences) == expected
    scaled.validate()


def test_steps_and_short_runs(config_path):
    scaled = tiny(load_config(config_path, ["training.max_steps=3", "checkpoint.interval_steps=null"]))
    assert (scaled.training.max_steps, scaled.training.max_tokens) == (3, None)
    assert scaled.checkpoint.interval_steps is None
    assert (scaled.validation.interval_steps, scaled.validation.tokens) == (1, TINY.validation_tokens)
    assert tiny(load_config(config_path, ["training.max_steps=999"])).num_steps == 20
    few = tiny(load_config(config_path, ["validation.tokens=40"]))
    assert few.validation.tokens == 40


def test_an_unknown_scale_lists_those_there_are(config_path):
    with pytest.raises(ConfigError, match="there is no scale 'small': --scale takes one of tiny"):
        resolve_config(config_path, [], "small")


def test_the_real_config_is_checked_before_it_is_scaled(config_path):
    settings = yaml.safe_load(config_path.read_text())
    settings["model"]["num_attention_heads"] = 3
    config_path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match=r"hidden_size \(16\) must be a multiple of num_attention_heads \(3\)"):
        resolve_config(config_path, [], "tiny")
