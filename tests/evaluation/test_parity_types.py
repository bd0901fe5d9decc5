"""Fixtures of every memory type: each changed number fails and is named, and so is each header that lies."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from published_fixtures import read_fixture
from ultramem.errors import CheckpointError
from ultramem.evaluation.parity import check_fixture

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["ultramem_v1_base", "memory_plus_base", "pkm_value_dim", "peer_base"]


@pytest.fixture
def changed(tmp_path):
    """A copy of a fixture with other header entries and tensors; None takes one away."""

    def copy(name, header=None, tensors=None):
        old_header, old_tensors = read_fixture(GOLDEN / f"{name}.safetensors")
        kept = [
            {key: value for key, value in {**old, **(new or {})}.items() if value is not None}
            for old, new in ((old_tensors, tensors), (old_header, header))
        ]
        save_file(kept[0], tmp_path / "changed.safetensors", metadata=kept[1])
        return tmp_path / "changed.safetensors"

    return copy


def nudged(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[3 % tensor.numel()] += 1e-2
    return tensor


@pytest.mark.parametrize("name", NAMES)
def test_every_changed_number_fails_and_is_named(changed, name):
    _, tensors = read_fixture(GOLDEN / f"{name}.safetensors")
    shown = {"out.y": "output", "out.scores": "scores", "out.raw_scores": "scores"}
    compared = [key for key in tensors if key.startswith("grad.") or key in shown]
    assert len(compared) >= 8
    for key in compared:
        failures = check_fixture(changed(name, tensors={key: nudged(tensors[key])})).failures
        assert len(failures) == 1, key
        assert failures[0].startswith(f"{shown.get(key, key)} differs by up to 1.00e-02"), key


@pytest.mark.parametrize("name", NAMES)
def test_every_changed_weight_fails(changed, name):
    _, tensors = read_fixture(GOLDEN / f"{name}.safetensors")
    for key in [key for key in tensors if key.startswith("param.")]:
        report = check_fixture(changed(name, tensors={key: tensors[key].roll(1, 0) + 0.1}))
        assert any(failure.startswith("output differs") for failure in report.failures), key


@pytest.mark.parametrize("name", NAMES)
def test_every_missing_weight_is_named(changed, name):
    _, tensors = read_fixture(GOLDEN / f"{name}.safetensors")
    weights = [key for key in tensors if key.startswith(("param.", "buffer."))]
    for key in [key for key in weights if "norm" not in key]:
        with pytest.raises(CheckpointError, match=rf"it lacks the weights {key.partition('.')[2]} of the layer that"):
            check_fixture(changed(name, tensors={key: None}))


@pytest.mark.parametrize(("name", "key"), [("ultramem_v1_base", "before_shuffle"), ("pkm_value_dim", "indices")])
def test_other_slots_are_counted(changed, name, key):
    _, tensors = read_fixture(GOLDEN / f"{name}.safetensors")
    (key,) = [full for full in tensors if full.startswith("out.") and full.endswith(key)]
    slots = tensors[key].clone()
    slots.view(len(slots), -1)[4, 0] = 143 if int(slots.view(len(slots), -1)[4, 0]) != 143 else 142
    assert "1 tokens select other slots" in check_fixture(changed(name, tensors={key: slots})).failures


@pytest.mark.parametrize("name", NAMES)
def test_a_fixture_under_another_layers_name_is_refused_or_fails(changed, name):
    """Without its own settings in the header, or with tensors that the other layer does not have."""
    for layer in {"ultramem_v2", "ultramem_v1", "memory_plus", "pkm", "peer"} - {name.rpartition("_")[0]}:
        if name == "pkm_value_dim" and layer == "pkm":
            continue
        with pytest.raises(CheckpointError, match=rf"fixture of {layer}"):
            check_fixture(changed(name, header={"layer": layer}))


@pytest.mark.parametrize(
    ("name", "header", "text"),
    [
        ("ultramem_v1_base", {"value_expand_time": "3"}, "value_expand_time 3 is no square, as an expansion must be"),
        ("ultramem_v1_base", {"value_expand_time": None}, "lacks 'value_expand_time', which a fixture of ultramem_v1"),
        ("ultramem_v1_base", {"head": "0"}, r"memory\.num_heads must be at least 1; got 0"),
        ("ultramem_v1_base", {"knn": "9999"}, r"memory\.top_k must lie between 1 and the 576 slots"),
        ("ultramem_v1_base", {"knum": "13", "keys_per_axis": None}, r"has shape \[576\], its header asks for \[676\]"),
        ("ultramem_v1_base", {"hidden_size": "-48"}, "its header describes layer 0 of 1 layers of width -48"),
        (
            "ultramem_v1_base",
            {"knum": "9" * 12},
            "a layer of [0-9]+ numbers, which no computer holds",
        ),
        (
            "ultramem_v1_base",
            {"knum": "100000", "keys_per_axis": None},
            r"its header asks for \[40000000000\]",
        ),
        ("memory_plus_base", {"mem_k_dim": "25"}, "mem_k_dim 25 is no two halves of a query"),
        ("memory_plus_base", {"mem_query_bias": "False"}, r"it holds param\.query_proj\.query_mlps\.0\.bias, which"),
        ("pkm_base", {"mem_query_bias": "False"}, r"it holds param\.query_proj\.query_mlps\.0\.bias, which"),
        ("pkm_base", {"mem_v_dim": "20"}, r"param\.values\.weight has shape \[144, 48\], .*\[144, 20\]"),
        ("pkm_value_dim", {"mem_v_dim": "-1"}, r"it holds param\.value_proj\.|param\.values\.weight has shape"),
        ("pkm_value_dim", {"mem_v_dim": "0"}, r"memory\.value_dim must be at least 1; got 0"),
        ("pkm_value_dim", {"mem_heads": "2"}, r"its header asks for"),
        ("peer_base", {"mem_n_keys": "11"}, r"has shape .*, its header asks for"),
        ("peer_base", {"mem_knn": "145"}, r"memory\.top_k must lie between 1 and the 144 slots"),
        ("peer_base", {"mem_knn": "5"}, r"out\.indices must be \[10, 10\], is \[10, 2, 6\]"),
        ("peer_base", {"dim": None}, "lacks 'dim', which a fixture of peer must hold"),
        ("peer_base", {"dim": "wide"}, "invalid literal for int.*'wide'"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else None,
)
def test_headers_that_do_not_fit_are_named(changed, name, header, text):
    path = changed(name, header=header)
    with pytest.raises(CheckpointError, match=text) as caught:
        check_fixture(path)
    assert str(caught.value).startswith(str(path))


def test_a_layer_outside_its_model_is_named(changed):
    for index in ("3", "-1"):
        with pytest.raises(CheckpointError, match=f"its header describes layer {index} of 3 layers of width 48"):
            check_fixture(changed("ultramem_v2_base", header={"layer_id": index}))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_another_shape_are_named(changed, name):
    with pytest.raises(CheckpointError, match=r"grad\.keys has shape \[3\], its header asks for"):
        check_fixture(changed(name, tensors={"grad.keys": torch.zeros(3)}))
