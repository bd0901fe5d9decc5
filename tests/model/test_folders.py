import json

import pytest

from ultramem.errors import CheckpointError
from ultramem.model.folders import resolve_model_folder, weight_files


def make_model(folder, config=True, weights=True):
    folder.mkdir(parents=True)
    if config:
        (folder / "config.json").write_text("{}")
    if weights:
        (folder / "model.safetensors").write_bytes(b"")
    return folder


def make_sharded_model(folder, num_parts, missing=()):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    names = [f"model-{part:05}-of-{num_parts:05}.safetensors" for part in range(1, num_parts + 1)]
    weight_map = {f"tensor{part}": name for part, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for part, name in enumerate(names):
        if part not in missing:
            (folder / name).write_bytes(b"")
    return folder


def test_a_model_folder_is_returned_as_it_is(tmp_path):
    model = make_model(tmp_path / "model")
    assert resolve_model_folder(model) == model
    assert resolve_model_folder(str(model)) == model
    assert weight_files(model) == [model / "model.safetensors"]


def test_a_sharded_model_folder_lists_its_parts(tmp_path):
    model = make_sharded_model(tmp_path / "model", num_parts=2)
    assert resolve_model_folder(model) == model
    assert [file.name for file in weight_files(model)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_a_run_folder_resolves_to_its_newest_export_by_number(tmp_path):
    make_model(tmp_path / "step900-hf")
    newest = make_model(tmp_path / "step1000-hf")
    (tmp_path / "step2000").mkdir()
    assert resolve_model_folder(tmp_path) == newest


@pytest.mark.parametrize("lacking", ["config", "weights", "part"])
def test_an_incomplete_export_is_never_chosen(tmp_path, lacking):
    complete = make_model(tmp_path / "step5-hf")
    newer = tmp_path / "step10-hf"
    if lacking == "part":
        make_sharded_model(newer, num_parts=3, missing={1})
    else:
        make_model(newer, config=lacking != "config", weights=lacking != "weights")
    assert resolve_model_folder(tmp_path) == complete


def test_temporary_names_are_not_exports(tmp_path):
    complete = make_model(tmp_path / "step5-hf")
    make_model(tmp_path / "step10-hf.tmp")
    make_model(tmp_path / ".step11-hf")
    assert resolve_model_folder(tmp_path) == complete


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, ["does not exist", "expected a model folder", "run folder"]),
        (lambda path: path.write_text("x"), ["is a file", "expected a model folder"]),
        (lambda path: path.mkdir(), ["holds nothing", "expected a model folder"]),
        (
            lambda path: (path.mkdir(), (path / "notes.txt").write_text("x")),
            ["holds notes.txt", "config.json with model.safetensors"],
        ),
        (lambda path: make_model(path, weights=False), ["neither model.safetensors nor model.safetensors.index.json"]),
        (
            lambda path: make_sharded_model(path, 2, missing={0}),
            ["lacks weights that its index names: model-00001-of-00002.safetensors", "Copy the whole folder again"],
        ),
        (
            lambda path: make_model(path / "step7-hf", weights=False),
            ["exports are incomplete (step7-hf)", "`ultramem train` command again"],
        ),
        (lambda path: (path / "step7").mkdir(parents=True), ["without a finished export", "it resumes"]),
    ],
)
def test_a_wrong_path_says_what_was_expected_and_what_was_found(tmp_path, make, said):
    path = tmp_path / "given"
    make(path)
    with pytest.raises(CheckpointError) as caught:
        resolve_model_folder(path)
    text = str(caught.value)
    assert str(path) in text
    for part in said:
        assert part in text


@pytest.mark.parametrize("content", ["not json", "{}", "[]", '{"weight_map": {}}'])
def test_a_damaged_index_is_reported(tmp_path, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index|weight_map"):
        resolve_model_folder(tmp_path)
