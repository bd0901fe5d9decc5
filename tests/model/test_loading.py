"""Saving and loading: every tensor comes back bit for bit, and nothing is drawn anew."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tiny_memories import DECODERS, OUTPUT_SCALE, decoder, decoder_config, token_ids
from tolerances import assert_bit_equal
from ultramem import UltraMemConfig, UltraMemForCausalLM, UltraMemModel

decoders = pytest.mark.parametrize("settings", DECODERS.values(), ids=DECODERS)


def trained_looking(dtype=torch.float32, **settings):
    """A decoder in which every tensor differs from what initialisation or a refresh would give."""
    model = decoder(dtype, **settings)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.randn_like(tensor))
        for name, buffer in model.named_buffers():
            if "permutation" in name:
                buffer.copy_(buffer.roll(5))
            elif "query_variance" in name:
                buffer.abs_()
    # Made from the configuration, not saved.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def all_tensors(model):
    """Parameters and buffers, those too that are not saved."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def assert_same_tensors(loaded, model):
    ours, theirs = all_tensors(loaded), all_tensors(model)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert not tensor.is_meta
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@decoders
def test_loading_gives_every_tensor_back(settings, tmp_path):
    model = trained_looking(**settings)
    model.save_pretrained(tmp_path)
    torch.manual_seed(12345)
    loaded = UltraMemForCausalLM.from_pretrained(tmp_path)
    assert_same_tensors(loaded, model)
    assert not loaded.training
    assert torch.equal(loaded(token_ids(2, 5)).logits, model(token_ids(2, 5)).logits)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings


@decoders
def test_loading_into_bf16_rounds_weights_and_keeps_buffers(settings, tmp_path):
    model = trained_looking(**settings)
    model.save_pretrained(tmp_path)
    loaded = UltraMemForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    saved = all_tensors(model)
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    for name, tensor in all_tensors(loaded).items():
        expected = saved[name].bfloat16() if name in parameters else saved[name]
        assert_bit_equal(tensor, expected)
    # The same model as casting after loading in fp32.
    assert_same_tensors(UltraMemForCausalLM.from_pretrained(tmp_path).bfloat16(), loaded)


def test_a_bf16_model_is_saved_and_loaded_in_bf16(tmp_path):
    model = trained_looking(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_same_tensors(UltraMemForCausalLM.from_pretrained(tmp_path), model)
    wide = UltraMemForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, tensor in all_tensors(wide).items():
        assert torch.equal(tensor, all_tensors(model)[name].to(tensor.dtype)), name


def test_directions_stay_fp32_whatever_is_loaded(tmp_path):
    model = trained_looking()
    model.save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        loaded = UltraMemForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        for ours, theirs in zip(loaded.model.memories, model.model.memories, strict=True):
            assert_bit_equal(ours.retrieval.row_direction, theirs.retrieval.row_direction)
            assert_bit_equal(ours.retrieval.col_direction, theirs.retrieval.col_direction)
            assert_bit_equal(ours.permutation, theirs.permutation)
            assert ours.retrieval.keys.dtype == dtype


@decoders
def test_sharded_files_hold_the_same(settings, tmp_path):
    model = trained_looking(**settings)
    model.save_pretrained(tmp_path, max_shard_size="16KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_tensors(UltraMemForCausalLM.from_pretrained(tmp_path), model)
    half = UltraMemForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_tensors(half, copy.deepcopy(model).bfloat16())


def test_auto_classes_load_the_same(tmp_path):
    model = trained_looking(**DECODERS["spans"])
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), UltraMemConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, UltraMemForCausalLM)
    assert_same_tensors(loaded, model)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, UltraMemModel)
    assert_same_tensors(base, model.model)


def test_saving_the_loaded_model_gives_the_same_file(tmp_path):
    trained_looking().save_pretrained(tmp_path / "first")
    UltraMemForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_the_file_decides_over_the_seed_in_the_configuration(tmp_path):
    """What initialisation would draw is never used, even where it would differ."""
    model = trained_looking()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["memory"] |= {"shuffle_seed": 77, "init": "released"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_tensors(UltraMemForCausalLM.from_pretrained(tmp_path), model)


MISSING = {
    "every": [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.memories.0.permutation",
        "model.layers.1.memories.0.out_proj.weight",
        "model.layers.1.memories.0.pre_proj.weight",
        "model.layers.1.memories.0.retrieval.query_proj.weight",
        "model.layers.1.memories.0.retrieval.query_norm",
        "model.layers.1.memories.0.retrieval.keys",
        "model.layers.1.memories.0.retrieval.cores",
        "model.memory_pool.values",
        "model.memory_pool.pre_values",
    ],
    "ultramem": [
        "model.layers.1.memories.0.permutation",
        "model.layers.1.memories.0.out_proj.weight",
        "model.layers.1.memories.0.query_conv.weight",
        "model.layers.1.memories.0.retrieval.key_norm",
        "model.layers.1.memories.0.retrieval.cores",
        "model.memory_pool.values",
    ],
    "memory_plus": [
        "model.layers.2.memories.0.gate_proj.weight",
        "model.layers.2.memories.0.gate_proj.bias",
        "model.layers.2.memories.0.out_proj.weight",
        "model.layers.2.memories.0.out_proj.bias",
        "model.layers.2.memories.0.retrieval.keys",
        "model.memory_pool.values",
    ],
    "pkm": [
        "model.layers.1.memories.0.out_proj.weight",
        "model.layers.1.memories.0.out_proj.bias",
        "model.layers.1.memories.0.retrieval.query_proj.weight",
        "model.layers.1.memories.0.retrieval.query_proj.bias",
        "model.layers.1.memories.0.retrieval.query_norm",
        "model.layers.1.memories.0.retrieval.query_shift",
        "model.layers.1.memories.0.retrieval.query_mean",
        "model.layers.1.memories.0.retrieval.query_variance",
    ],
    "peer": [
        "model.layers.1.memories.0.retrieval.query_proj.weight",
        "model.layers.1.memories.0.retrieval.keys",
        "model.memory_pool.values",
        "model.memory_pool.pre_values",
    ],
}
# What starts as one number; the gains of Tucker retrievals are simulated.
CONSTANTS = {"bias": 0.0, "query_shift": 0.0, "query_mean": 0.0, "query_variance": 1.0, "norm.weight": 1.0}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in MISSING for name in MISSING[kind]])
def test_only_a_missing_tensor_is_drawn(kind, name, tmp_path):
    model = trained_looking(**DECODERS[kind])
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    loaded = UltraMemForCausalLM.from_pretrained(tmp_path)
    for other, tensor in loaded.state_dict().items():
        if other not in (name, "lm_head.weight"):
            assert_bit_equal(tensor, tensors[other])
    drawn, saved = loaded.state_dict()[name], model.state_dict()[name]
    assert not torch.equal(drawn, saved)
    assert drawn.float().isfinite().all()
    constants = CONSTANTS | ({"query_norm": 1.0} if kind == "pkm" else {})
    constant = [value for end, value in constants.items() if name.endswith(end)]
    if constant:
        assert (drawn == constant[0]).all()
    elif "query_conv" in name:
        assert (drawn == torch.tensor([0.0, 0.0, 1.0])).all()
    elif drawn.is_floating_point() and drawn.numel() > 50:
        scaled = ("o_proj", "down_proj", "out_proj", "memory_pool.values" if kind == "peer" else "out_proj")
        scale = OUTPUT_SCALE if any(part in name for part in scaled) else 1
        assert drawn.std().item() * scale == pytest.approx(saved.std().item(), rel=0.35)
    if "permutation" in name:
        assert drawn.sort().values.tolist() == list(range(len(drawn)))


@pytest.mark.parametrize("lost", [["row_direction"], ["col_direction"], ["row_direction", "col_direction"]])
def test_lost_directions_are_those_of_the_loaded_cores(lost, tmp_path):
    model = decoder(torch.float32)
    for memory in model.model.memories:
        memory.retrieval.row_direction.mul_(-1)
        memory.retrieval.col_direction.mul_(-1)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(tuple(lost))}
    save_file(tensors, file, metadata={"format": "pt"})
    loaded = UltraMemForCausalLM.from_pretrained(tmp_path)
    # With both lost, the sign is the decomposition's own.
    sign = -1 if len(lost) == 2 else 1
    for ours, theirs in zip(loaded.model.memories, model.model.memories, strict=True):
        for direction in ("row_direction", "col_direction"):
            expected = sign * getattr(theirs.retrieval, direction)
            torch.testing.assert_close(getattr(ours.retrieval, direction), expected)


def test_meta_construction_then_loading(tmp_path):
    model = trained_looking(**DECODERS["spans"])
    with torch.device("meta"):
        empty = UltraMemForCausalLM(model.config)
    assert all(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    empty.load_state_dict(model.state_dict(), assign=True)
    saved = empty.state_dict()
    for name, tensor in model.state_dict().items():
        assert_bit_equal(saved[name], tensor)


def test_meta_construction_then_initialisation(poisoned_memory):
    with torch.device("meta"):
        model = UltraMemForCausalLM(decoder_config())
    model.to_empty(device="cpu")
    model.initialize_weights()
    model.tie_weights()
    drawn, reference = all_tensors(model), all_tensors(UltraMemForCausalLM(decoder_config()))
    for name, tensor in drawn.items():
        assert tensor.float().isfinite().all(), name
        assert tensor.dtype == reference[name].dtype
        if tensor.numel() > 100 and tensor.is_floating_point():
            assert tensor.std().item() == pytest.approx(reference[name].std().item(), rel=0.3), name
    for name in ("model.layers.1.memories.0.permutation", "model.rotary_emb.inv_freq"):
        assert torch.equal(drawn[name], reference[name])
    assert model(token_ids(2, 5), labels=token_ids(2, 5)).loss.isfinite()


@pytest.mark.parametrize("mode", ["dense", "rows"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent(duplicate, mode):
    model = trained_looking()
    model.set_table_gradients(mode)
    copied = duplicate(model)
    assert_same_tensors(copied, model)
    expected = model(token_ids(2, 5)).logits
    assert torch.equal(copied(token_ids(2, 5)).logits, expected)
    copied(token_ids(2, 5), labels=token_ids(2, 5)).loss.backward()
    assert model.model.memory_pool.values.grad is None
    if mode == "rows":
        assert len(copied.model.memory_pool.value_gradients.contributions) == 3
        assert model.model.memory_pool.value_gradients.contributions == []
    with torch.no_grad():
        copied.model.memory_pool.values.zero_()
    assert torch.equal(model(token_ids(2, 5)).logits, expected)
    assert not torch.equal(copied(token_ids(2, 5)).logits, expected)


def test_casting_keeps_directions_and_rotary_frequencies():
    model = trained_looking()
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for cast in (model.bfloat16, model.half, model.double, lambda: model.to(torch.bfloat16), model.float):
        cast()
        for name, buffer in model.named_buffers():
            assert_bit_equal(buffer, kept[name])


def test_a_cast_model_turns_late_positions_as_the_loaded_one_does(tmp_path):
    """In bf16 the angle at position 1,000 would be off by radians."""
    model = decoder(torch.float32, max_position_embeddings=2048, memory=None)
    model.save_pretrained(tmp_path)
    loaded = UltraMemForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    positions = torch.tensor([[1000, 1500, 2000]])
    x = torch.zeros(1, 3, 32)
    expected = model.model.rotary_emb(x, positions)
    for cast in (loaded, model.bfloat16()):
        for ours, theirs in zip(cast.model.rotary_emb(x, positions), expected, strict=True):
            assert torch.equal(ours, theirs)
