"""Looking at a model folder without loading it: every way in which it can be wrong is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_memories import DECODERS, decoder
from ultramem.errors import CheckpointError
from ultramem.model.inspection import check_weights, load_config


@pytest.fixture
def folder(tmp_path):
    decoder(torch.float32).save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("shard_size", ["16KB", "5GB"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_saved_model_is_what_it_says(name, shard_size, tmp_path):
    model = decoder(torch.bfloat16, **DECODERS[name])
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    config = load_config(tmp_path)
    assert config.memory == model.config.memory
    summary = check_weights(tmp_path, config)
    files = list(tmp_path.glob("*.safetensors"))
    assert summary.num_files == len(files)
    assert (len(files) > 1) == (shard_size == "16KB")
    assert summary.num_bytes == sum(file.stat().st_size for file in files)
    assert summary.num_tensors == len(model.state_dict()) - model.config.tie_word_embeddings
    buffers = {"F32" if buffer.is_floating_point() else "I32" for buffer in model.model.layers.buffers()}
    assert set(summary.dtypes) == {"BF16", *buffers}
    assert buffers == {"every": {"F32", "I32"}, "pkm": {"F32"}, "dense": set()}.get(name, buffers)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "llama"}, "describes a model of type 'llama'; expected 'ultramem'"),
        ({"hidden_size": "32"}, "is not valid: Validation error for field 'hidden_size': .*expected int, got str"),
        ({"hidden_size": 33}, r"is not valid: hidden_size \(33\) must be a multiple"),
        ({"memory": {"num_kyes": 3}}, r"is not valid: memory\.num_kyes is no setting"),
        ({"rope_parameters": {"rope_type": "zzz"}}, r"is not valid: rope_parameters\.rope_type must be one of"),
        ({"memory": {"num_keys": "6"}}, r"is not valid: memory: .*'num_keys'.*expected int, got str"),
        ({"memory": "ultramem_v2"}, "is not valid: Validation error for field 'memory'"),
        ({"memory": [1]}, "is not valid: Validation error for field 'memory'"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_valid_is_named(folder, changes, text):
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=text) as caught:
        load_config(folder)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize("content", ["", "[1]", "{", None])
def test_a_configuration_that_cannot_be_read_is_named(folder, content):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_config(folder)


def test_tensors_that_do_not_belong_to_the_configuration_are_named(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.extra"] = torch.zeros(2)
    tensors["model.memory_pool.values"] = torch.zeros(3, 4)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        check_weights(folder, load_config(folder))
    for problem in (
        "model.norm.weight is missing",
        "model.extra is left over",
        "model.memory_pool.values has shape [3, 4] instead of [108, 12]",
    ):
        assert problem in str(caught.value)


def test_a_damaged_file_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        check_weights(folder, load_config(folder))
