"""The published fixtures pass; fixtures of the same form but other sizes pass; a changed number fails and is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from published_fixtures import read_fixture, write_fixture
from ultramem.errors import CheckpointError
from ultramem.evaluation.parity import check_fixture
from ultramem.ops import use_backend

GOLDEN = Path(__file__).parents[1] / "golden"
FIXTURES = sorted(GOLDEN.glob("*.safetensors"))


@pytest.fixture
def changed(tmp_path):
    """A copy of a fixture after a function has changed its header and tensors in place."""

    def copy(change, name="ultramem_v2_base"):
        settings, tensors = read_fixture(GOLDEN / f"{name}.safetensors")
        change(settings, tensors)
        path = tmp_path / "changed.safetensors"
        save_file(tensors, path, metadata=settings)
        return path

    return copy


def test_all_fifteen_fixtures_are_here():
    layers = [read_fixture(path)[0]["layer"] for path in FIXTURES]
    numbers = {"ultramem_v2": 8, "ultramem_v1": 3, "pkm": 2, "memory_plus": 1, "peer": 1}
    assert {layer: layers.count(layer) for layer in layers} == numbers


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_published_fixture(path, backend):
    """By name: kernels that cannot run raise. `tests/ops/interpreted/test_fixtures.py` has Triton's."""
    with use_backend(backend):
        report = check_fixture(path)
    assert report.failures == ()
    assert report.path == path
    assert path.stem.startswith(report.layer)
    assert report.output_error < 1e-5
    assert report.gradient_error < 1e-4


RING = {"num_memories": 4, "layer_id": 3, "tables": "ring"}
# The released code leaves its penalty out.
V1 = {"type": "ultramem", "tucker_penalty_weight": 0.0}
UNSEEN = {
    "v2_heads_cores_no_gains": {**RING, "num_heads": 2, "num_cores": 4, "affine": False, "share_ratio": 1.0},
    "v2_heads_rank3": {**RING, "num_heads": 3, "num_cores": 3, "rank": 3, "share_ratio": 0.5, "key_balance_weight": 1},
    "v2_projected_gelu": {
        **RING, "key_expansion": 3, "projection": "project", "share_ratio": 0.8, "pre_value_activation": "gelu"
    },
    "v2_bare": {**RING, "key_expansion": 2, "pre_value_dim": 0, "num_cores": 1, "rank": 1, "share_ratio": 0.25},
    "v2_query_per_rank": {**RING, "query_per_rank": True, "num_heads": 2, "share_ratio": 0.6},
    "v1_expansion": {**V1, "key_expansion": 3, "num_heads": 3, "num_cores": 3, "rank": 3},
    "v1_no_gains": {**V1, "key_expansion": 1, "num_cores": 1, "rank": 1, "affine": False},
    "v1_wide": {**V1, "num_heads": 2, "num_cores": 4, "key_dim": 5, "value_dim": 20, "top_k": 7},
    "memory_plus_value_dim": {"type": "memory_plus", "value_dim": 11, "num_heads": 3},
    "memory_plus_no_bias": {"type": "memory_plus", "query_bias": False, "num_heads": 1, "top_k": 9},
    "pkm_no_bias": {"type": "pkm", "query_bias": False, "num_heads": 1},
    "pkm_value_dim": {"type": "pkm", "value_dim": 9, "num_heads": 4, "top_k": 9},
    "peer_heads": {"type": "peer", "num_heads": 3, "top_k": 8, "key_dim": 5},
    "peer_no_bias": {"type": "peer", "query_bias": False, "num_heads": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", UNSEEN)
def test_unseen_fixtures_of_the_same_form_pass(name, tmp_path):
    path = write_fixture(tmp_path / "new.safetensors", **UNSEEN[name])
    report = check_fixture(path)
    assert report.failures == ()
    assert report.gradient_error < 1e-3


def change_number(name):
    def change(_, tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[3 % tensors[name].numel()] += 1e-2

    return change


@pytest.mark.parametrize(
    "name",
    [
        "grad.x", "grad.keys", "grad.keys_norm.weight", "grad.query_norm.weight", "grad.query_proj.weight",
        "grad.pre_values_for_look_up", "grad.pre_values_proj.weight", "grad.values_for_look_up",
        "grad.values_proj.weight", "grad.tucker_core.0", "grad.tucker_core.1", "out.y", "out.scores",
        "out.tucker_aux_loss",
    ],
)  # fmt: skip
def test_a_changed_number_fails_and_is_named(changed, name):
    (failure,) = check_fixture(changed(change_number(name))).failures
    shown = {"out.y": "output", "out.scores": "scores", "out.tucker_aux_loss": "tucker_aux_loss"}.get(name, name)
    assert failure.startswith(f"{shown} differs by up to 1.00e-02")


def test_a_changed_balance_loss_fails(changed):
    (failure,) = check_fixture(changed(change_number("out.balance_loss"), "ultramem_v2_key_balance")).failures
    assert failure.startswith("balance_loss differs")


def test_a_number_that_is_none_fails(changed):
    def change(_, tensors):
        tensors["out.y"][0, 0, 0] = float("nan")
        tensors["grad.keys"].view(-1)[0] = float("nan")

    report = check_fixture(changed(change))
    assert [failure.split()[0] for failure in report.failures] == ["output", "grad.keys"]
    assert report.output_error != report.output_error
    assert report.gradient_error != report.gradient_error


@pytest.mark.parametrize("name", ["keys", "values_for_look_up", "query_proj.weight", "keys_norm.weight"])
def test_changed_weights_fail(changed, name):
    def change(_, tensors):
        tensors[f"param.{name}"] = tensors[f"param.{name}"].roll(1, 0).flip(-1)

    failures = check_fixture(changed(change)).failures
    assert any(failure.startswith("output differs") for failure in failures)


def test_another_permutation_fails(changed):
    def change(_, tensors):
        tensors["buffer.shuffle_index"] = tensors["buffer.shuffle_index"].roll(1)

    assert any(failure.startswith("output") for failure in check_fixture(changed(change)).failures)


def test_other_slots_are_counted(changed):
    def change(_, tensors):
        tensors["out.virtual_indices_before_shuffle"][4, 0] = 399

    assert "1 tokens select other slots" in check_fixture(changed(change)).failures


@pytest.mark.parametrize("name", ["rows_total", "rows_window", "window_offset", "keys_per_axis"])
def test_another_window_in_the_header_fails(changed, name):
    def change(settings, _):
        settings[name] = str(int(settings[name]) + 1)

    (failure,) = check_fixture(changed(change)).failures
    number = int(read_fixture(GOLDEN / "ultramem_v2_base.safetensors")[0][name])
    assert failure == f"{name} is {number} here and {number + 1} in the fixture"


OPTIONAL = ["out.scores", "out.virtual_indices_before_shuffle", "out.tucker_aux_loss"]


@pytest.mark.parametrize("absent", [*([name] for name in OPTIONAL), OPTIONAL], ids=lambda names: " ".join(names))
def test_what_a_layer_does_not_expose_is_not_compared(changed, absent):
    def change(_, tensors):
        for name in absent:
            del tensors[name]

    def change_the_rest_too(settings, tensors):
        change(settings, tensors)
        for name in {"out.y", "grad.x", *OPTIONAL} - set(absent):
            tensors[name][0] += 1

    assert check_fixture(changed(change)).failures == ()
    failures = check_fixture(changed(change_the_rest_too)).failures
    expected = {"output differs", "grad.x differs", "1 tokens", "scores differs", "tucker_aux_loss differs"}
    gone = dict(zip(OPTIONAL, ("scores differs", "1 tokens", "tucker_aux_loss differs"), strict=True))
    assert {" ".join(failure.split()[:2]) for failure in failures} == expected - {gone[name] for name in absent}


@pytest.mark.parametrize("num_keys", [6, 12])
def test_a_share_ratio_that_a_header_rounds_passes(num_keys, tmp_path):
    path = write_fixture(
        tmp_path / "new.safetensors", num_memories=3, layer_id=2, num_keys=num_keys, tables="ring", share_ratio=0.3333
    )
    assert read_fixture(path)[0]["rows_window"] == str((num_keys - 1) ** 2)
    assert check_fixture(path).failures == ()


def drop(key, header=False):
    return lambda settings, tensors: (settings if header else tensors).pop(key)


def put(key, value):
    return lambda settings, tensors: (settings if isinstance(value, str) else tensors).update({key: value})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (drop("grad.keys"), "lacks 'grad.keys', which a fixture of ultramem_v2 must hold. Write the fixture again"),
        (drop("out.y"), "lacks 'out.y', which"),
        (drop("in.x"), "lacks 'in.x', which"),
        (drop("knum", header=True), "lacks 'knum', which"),
        (drop("layer", header=True), "no fixture of a layer that is built here: its header names layer ''"),
        (put("layer", "ultramem_v9"), "its header names layer 'ultramem_v9'; known: ultramem_v2, .*Name fixtures"),
        (put("knum", "many"), "no consistent fixture of ultramem_v2: invalid literal for int.*'many'"),
        (put("vdim", "33"), r"no consistent fixture .*memory.value_dim \(33\) must be a multiple"),
        (put("vdim", "34"), r"param.values_for_look_up has shape \[432, 32\], its header asks for \[432, 34\]"),
        (put("tucker_multihead", "1"), "it holds param.tucker_core.1, which the layer that its header describes"),
        (put("param.bias", torch.zeros(2)), "it holds param.bias, which the layer that its header describes"),
        (put("out.y", torch.zeros(1, 7, 48)), r"output has shape \[1, 7, 48\], its header asks for \[3, 7, 48\]"),
        (put("in.grad_y", torch.zeros(48)), r"in.x and in.grad_y must both be \[..., 48\]"),
        (put("out.scores", torch.zeros(21, 5, 2)), r"out.scores must be \[21, 6, 2\], is \[21, 5, 2\]\. Write the"),
        (put("share_ratio", "0.3"), "share_ratio 0.3 gives a layer less than its own share.*Write the fixture again"),
        (put("out.virtual_indices_before_shuffle", torch.zeros(21, 5).long()), r"before_shuffle must be \[21, 6\]"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_fixture_is_named(changed, change, text):
    path = changed(change)
    with pytest.raises(CheckpointError, match=text) as caught:
        check_fixture(path)
    assert str(caught.value).startswith(str(path))


def test_files_that_cannot_be_read_are_named(tmp_path):
    text = tmp_path / "notes.safetensors"
    text.write_text("no tensors here")
    for path in (tmp_path / "missing.safetensors", tmp_path, text):
        with pytest.raises(CheckpointError, match=r"cannot be read as a safetensors fixture.*copy it again") as caught:
            check_fixture(path)
        assert str(path) in str(caught.value)
