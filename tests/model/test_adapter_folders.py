"""Adapter folders: the added weights alone, exact after loading, and refused where they do not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import ultramem
from tiny_bases import MEMORIES, base_model, memory_settings
from tiny_memories import token_ids
from tolerances import assert_bit_equal
from ultramem.errors import CheckpointError
from ultramem.files import MARKER_NAME


@pytest.fixture
def saved(tmp_path):
    """A folder with memories for two blocks of a Llama, and the model that they were saved from."""
    model = base_model()
    adapter = ultramem.attach(model, memory_settings(num_heads=2), [0, 2])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.5)
    adapter.refresh_retrieval()
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_is_exact(tmp_path, name, memory, dtype):
    model, ids = base_model(name, dtype), token_ids(2, 9)
    adapter = ultramem.attach(model, memory_settings(memory), [0, 2])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.5)
        adapter.refresh_retrieval()
        adapter.pool.to(dtype)
        adapter.save_pretrained(tmp_path / "adapter")
        other = base_model(name, dtype)
        assert not torch.equal(other(ids).logits, model(ids).logits)
        loaded = ultramem.load_adapter(other, tmp_path / "adapter")
        assert_bit_equal(other(ids).logits, model(ids).logits)
    assert (loaded.blocks, loaded.config) == ([0, 2], adapter.config)
    assert loaded.state_dict().keys() == adapter.state_dict().keys()
    for key, value in adapter.state_dict().items():
        assert_bit_equal(loaded.state_dict()[key], value)
    trained = {parameter for parameter in other.parameters() if parameter.requires_grad}
    assert trained == set(loaded.parameters())
    other.train()
    other(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in loaded.parameters())


def test_the_folder_holds_the_added_weights_alone(saved):
    folder, model = saved
    assert sorted(file.name for file in folder.iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    assert [file.name for file in folder.parent.iterdir()] == ["adapter"]
    assert load_file(folder / "adapter.safetensors").keys() == model.memory_adapter.state_dict().keys()
    description = json.loads((folder / "adapter_config.json").read_text())
    assert description["format"] == 1
    assert description["base_model"] == {"model_type": "llama", "hidden_size": 32, "num_blocks": 3}
    assert (description["memory"]["placement"], description["memory"]["num_heads"]) == ([0, 2], 2)


def test_loading_draws_nothing_and_takes_the_mode_of_training(saved):
    folder, _ = saved
    model = base_model().train()
    state = torch.random.get_rng_state()
    adapter = ultramem.load_adapter(model, folder, train="none")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert adapter.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_model_without_its_output_layer_takes_the_same_adapter(saved):
    folder, model = saved
    other = base_model()
    ultramem.load_adapter(other.model, folder)
    with torch.no_grad():
        assert_bit_equal(other(token_ids(2, 9)).logits, model(token_ids(2, 9)).logits)


def test_saving_again_replaces_the_adapter(saved):
    folder, model = saved
    (folder / "leftover").touch()
    with torch.no_grad():
        model.memory_adapter.pool.values.fill_(3)
    abandoned = folder.parent / "adapter.partial-99999999"
    abandoned.mkdir()
    (abandoned / MARKER_NAME).touch()
    model.memory_adapter.save_pretrained(str(folder))
    assert sorted(file.name for file in folder.iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    assert [file.name for file in folder.parent.iterdir()] == ["adapter"]
    assert (load_file(folder / "adapter.safetensors")["pool.values"] == 3).all()


def test_a_cut_off_save_leaves_the_adapter_that_was_there(saved, monkeypatch):
    folder, model = saved
    before = load_file(folder / "adapter.safetensors")

    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ultramem.model.attach.save_file", full_disk)
    with pytest.raises(
        CheckpointError, match=r"adapter cannot be written \(.*No space left on device\). Make the folder"
    ):
        model.memory_adapter.save_pretrained(folder)
    assert [file.name for file in folder.parent.iterdir()] == ["adapter"]
    assert torch.equal(load_file(folder / "adapter.safetensors")["pool.values"], before["pool.values"])


def test_saving_does_not_replace_what_is_no_adapter(saved, tmp_path):
    _, model = saved
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    for path in (tmp_path / "thesis", tmp_path / "thesis" / "chapter1.tex"):
        with pytest.raises(CheckpointError, match=r"is there and is no adapter folder; name a new folder or"):
            model.memory_adapter.save_pretrained(path)
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]
    (tmp_path / "empty").mkdir()
    model.memory_adapter.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / "adapter_config.json").is_file()


def change_description(**changes):
    def change(folder):
        file = folder / "adapter_config.json"
        description = json.loads(file.read_text())
        for key, value in changes.items():
            description[key] = {**description[key], **value} if isinstance(value, dict) else value
        file.write_text(json.dumps(description))

    return change


def change_weights(change):
    def rewrite(folder):
        tensors = load_file(folder / "adapter.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter.safetensors")

    return rewrite


def cut_off(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: folder.rename(folder.with_name("moved")),
            r"has no adapter_config.json; expected a folder that",
        ),
        (
            lambda folder: (folder / "adapter.safetensors").unlink(),
            r"has no adapter.safetensors. Save the adapter agai",
        ),
        (cut_off("adapter.safetensors"), r"adapter.safetensors is damaged \(.*\). Save the adapter again, or copy"),
        (cut_off("adapter_config.json"), r"adapter_config.json cannot be read \(.*\). Save the adapter again"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), r"adapter_config.json cannot be read \("),
        (change_description(format=2), r"has format 2; this version of ultramem reads format 1. Use the version that"),
        (change_description(base_model={"depth": 3}), r"cannot be read \(.*unexpected keyword argument 'depth'\)"),
        (change_description(memory={"num_keys": "many"}), r"adapter_config.json cannot be read \(.*num_keys"),
        (change_description(memory={"placement": "0:2"}), r"adapter_config.json describes no adapter \(.* has spans"),
        (change_description(memory={"num_keys": 7}), r"memories.0.permutation has shape \[36\] instead of \[49\]; "),
        (change_description(memory={"placement": [0]}), r"memories.1.* is left over; .* and \d+ more. Put back the"),
        (change_weights(lambda tensors: tensors.pop("pool.values")), r"pool.values is missing. Put back the config"),
    ],
)
def test_a_damaged_folder_is_refused(saved, damage, message):
    folder, _ = saved
    damage(folder)
    model = base_model()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(CheckpointError, match=message):
        ultramem.load_adapter(model, folder)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3", {}, r"made for another model: model_type 'llama' instead of 'qwen3'. Load it into the model that it"),
        ("llama", {"hidden_size": 48}, r"another model: hidden_size 32 instead of 48"),
        ("llama", {"num_hidden_layers": 4}, r"another model: num_blocks 3 instead of 4"),
    ],
)
def test_an_adapter_of_another_model_is_refused(saved, name, changes, message):
    folder, _ = saved
    with pytest.raises(CheckpointError, match=message):
        ultramem.load_adapter(base_model(name, **changes), folder)
