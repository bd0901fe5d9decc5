"""The published fixtures pass; fixtures of the same form but other sizes pass; a changed number fails and is named."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tiny_memories import memory_config
from ultramem.errors import CheckpointError
from ultramem.evaluation.parity import check_fixture
from ultramem.layers import UltraMemV2

GOLDEN = Path(__file__).parents[1] / "golden"
FIXTURES = sorted(GOLDEN.glob("ultramem_v2_*.safetensors"))
PUBLISHED = {
    "keys": "retrieval.keys",
    "query_proj.weight": "retrieval.query_proj.weight",
    "query_norm.weight": "retrieval.query_norm",
    "keys_norm.weight": "retrieval.key_norm",
    "pre_values_proj.weight": "pre_proj.weight",
    "values_proj.weight": "out_proj.weight",
    "values_for_look_up": "values",
    "pre_values_for_look_up": "pre_values",
}


def read(path):
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def changed(tmp_path):
    """A copy of a fixture after a function has changed its header and tensors in place."""

    def copy(change, name="base"):
        settings, tensors = read(GOLDEN / f"ultramem_v2_{name}.safetensors")
        change(settings, tensors)
        path = tmp_path / "changed.safetensors"
        save_file(tensors, path, metadata=settings)
        return path

    return copy


def test_all_eight_fixtures_are_here():
    assert len(FIXTURES) == 8


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_published_fixture(path):
    report = check_fixture(path)
    assert report.failures == ()
    assert (report.path, report.layer) == (path, "ultramem_v2")
    assert report.output_error < 1e-5
    assert report.gradient_error < 1e-4


def write_fixture(path, hidden_size, num_memories, layer_id, affine=True, **changes):
    """Run our layer in fp64 and write what the published code would have written about it."""
    torch.manual_seed(0)
    config = memory_config(tables="ring", **changes)
    layer = UltraMemV2(hidden_size, config, num_memories, layer_id).double().eval()
    pool = UltraMemV2.make_pool(hidden_size, config, num_memories, draw=False)
    pool.reset_parameters(0.2)
    pool = pool.double()
    with torch.no_grad():
        for gain in (layer.retrieval.query_norm, layer.retrieval.key_norm):
            gain.copy_(torch.linspace(0.5, 1.5, len(gain)) if affine else torch.ones(len(gain)))
    x = torch.randn(2, 5, hidden_size).double().requires_grad_()
    grad_y = torch.randn(2, 5, hidden_size).double()
    result = layer(x, pool)
    ((result.output * grad_y).sum() + sum(result.losses.values())).backward()
    retrieved = layer.retrieval(x.detach().flatten(0, 1))
    ours = dict(layer.named_parameters()) | dict(pool.named_parameters())
    tensors = {"in.x": x.detach(), "in.grad_y": grad_y, "grad.x": x.grad, "out.y": result.output}
    for published, name in PUBLISHED.items():
        if name in ours and (affine or "norm" not in name):
            tensors |= {f"param.{published}": ours[name], f"grad.{published}": ours[name].grad}
    for core in range(config.num_cores):
        tensors[f"param.tucker_core.{core}"] = layer.retrieval.cores[core]
        tensors[f"grad.tucker_core.{core}"] = layer.retrieval.cores.grad[core]
    heads, rank = config.num_heads, config.rank
    tensors |= {
        "buffer.tucker_core_u": layer.retrieval.row_direction.view(1, heads, 1, rank),
        "buffer.tucker_core_v": layer.retrieval.col_direction.view(1, heads, 1, rank),
        "out.scores": retrieved.scores_NHKC.flip(2).flatten(1, 2),
        "out.tucker_aux_loss": layer.retrieval.tucker_penalty(0.15).view(1),
    }
    if config.key_balance_weight:
        tensors["out.balance_loss"] = layer.retrieval.key_balance(retrieved).view(1)
    tensors = {name: tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()}
    tensors["buffer.shuffle_index"] = layer.permutation.long()
    # Slots in another order than ours within each head.
    tensors["out.virtual_indices_before_shuffle"] = retrieved.slots_NHK.flip(2).flatten(1).contiguous()
    side = layer.retrieval.keys.shape[2]
    settings = {
        "layer": "ultramem_v2", "hidden_size": hidden_size, "knum": config.num_keys, "kdim": config.key_dim,
        "vdim": config.value_dim, "pre_vdim": config.pre_value_dim, "knn": config.top_k, "head": heads,
        "tucker_rank": rank, "tucker_multihead": config.num_cores, "mem_key_expand_time": config.key_expansion,
        "value_expand_time": config.key_expansion**2 if config.projection == "project" else 1,
        "share_ratio": config.share_ratio, "mem_layer_num": num_memories, "layer_id": layer_id,
        "mem_use_glu_act": config.pre_value_activation == "gelu", "mem_q_for_each_tucker_rank": config.query_per_rank,
        "mem_key_balance_reg_coef": float(config.key_balance_weight), "attention_layer_norm_with_affine": affine,
        "rows_total": layer.window.num_rows, "rows_window": layer.window.size, "window_offset": layer.window.offset,
        "keys_per_axis": side, "mem_output_dropout_rate": 0.0, "seed": 0,
    }  # fmt: skip
    save_file(tensors, path, metadata={name: str(value) for name, value in settings.items()})
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {"num_heads": 2, "num_cores": 4, "affine": False, "share_ratio": 1.0},
        {"num_heads": 3, "num_cores": 3, "rank": 3, "share_ratio": 0.5, "key_balance_weight": 0.3},
        {"key_expansion": 3, "projection": "project", "share_ratio": 0.8, "pre_value_activation": "gelu"},
        {"key_expansion": 2, "pre_value_dim": 0, "num_cores": 1, "rank": 1, "share_ratio": 0.25},
        {"query_per_rank": True, "num_heads": 2, "share_ratio": 0.6},
    ],
    ids=["heads_cores_no_gains", "heads_rank3", "projected_gelu", "bare", "query_per_rank"],
)
def test_unseen_fixtures_of_the_same_form_pass(settings, tmp_path):
    path = write_fixture(tmp_path / "new.safetensors", 18, num_memories=4, layer_id=3, **settings)
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
    (failure,) = check_fixture(changed(change_number("out.balance_loss"), "key_balance")).failures
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
    number = int(read(GOLDEN / "ultramem_v2_base.safetensors")[0][name])
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
        tmp_path / "new.safetensors", 18, num_memories=3, layer_id=2, num_keys=num_keys, share_ratio=0.3333
    )
    assert read(path)[0]["rows_window"] == str((num_keys - 1) ** 2)
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
        (put("layer", "ultramem_v9"), "its header names layer 'ultramem_v9'; known: ultramem_v2, ultramem_v1, memory_plus, pkm, peer. Name fixtures"),
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
