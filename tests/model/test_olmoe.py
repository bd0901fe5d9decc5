"""Interchange with OLMoE: same logits to the bit both ways, through memory and through folders."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import OlmoeConfig, OlmoeForCausalLM

from tiny_models import tiny_llama
from tolerances import assert_bit_equal
from ultramem import UltraMemConfig, UltraMemForCausalLM
from ultramem.errors import CheckpointError, ConfigError
from ultramem.model.inspection import check_weights, load_config
from ultramem.model.olmoe import config_from_olmoe, config_to_olmoe, from_olmoe, to_olmoe

# Nothing at its default.
SETTINGS = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "gelu",
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-4,
    "pad_token_id": 3,
    "bos_token_id": 4,
    "eos_token_id": [5, 6],
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    "attention_bias": True,
    "attention_dropout": 0.1,
    "clip_qkv": 3.0,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "router_aux_loss_coef": 0.02,
    "norm_topk_prob": True,
}
VARIANTS = {
    "all": SETTINGS,
    "plain": {
        **SETTINGS,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "clip_qkv": None,
        "hidden_act": "silu",
    },
}
variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


def olmoe(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**{**SETTINGS, **settings})).to(dtype).eval()
    with torch.no_grad():
        # Norms and biases differ from their initial values.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    # Rotary frequencies in fp32, as `from_pretrained` gives them in any dtype; the cast has rounded them.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def token_ids():
    return torch.randint(7, 61, (3, 9), generator=torch.Generator().manual_seed(1))


def assert_same_logits(one, other):
    ids, mask = token_ids(), torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4] = 0
    for attention_mask in (None, mask):
        assert_bit_equal(*(model(ids, attention_mask=attention_mask).logits for model in (one, other)))


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_the_same_to_the_bit_both_ways(settings, dtype):
    theirs = olmoe(dtype, **settings)
    ours = from_olmoe(theirs)
    assert isinstance(ours, UltraMemForCausalLM)
    assert (ours.dtype, ours.training) == (dtype, False)
    assert_same_logits(ours, theirs)
    back = to_olmoe(ours)
    assert isinstance(back, OlmoeForCausalLM)
    assert_same_logits(back, theirs)
    for name, tensor in theirs.state_dict().items():
        assert_bit_equal(back.state_dict()[name], tensor)
    for model in (ours, back):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == settings["tie_word_embeddings"]


def test_gradients_are_the_same():
    theirs, ids = olmoe(), token_ids()
    ours = from_olmoe(theirs)
    theirs(ids, labels=ids, output_router_logits=True).loss.backward()
    output = ours(ids, labels=ids)
    # A loss that OLMoE in transformers has not.
    (output.loss - output.auxiliary_losses["router_z"]).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_the_weights_are_copied():
    theirs = olmoe()
    ours = from_olmoe(theirs)
    back = to_olmoe(ours)
    before = ours(token_ids()).logits
    for model in (theirs, back):
        torch.nn.init.zeros_(model.model.norm.weight)
    assert_bit_equal(ours(token_ids()).logits, before)


@variants
def test_every_setting_is_carried_over(settings):
    theirs = OlmoeConfig(**settings)
    ours = config_from_olmoe(theirs)
    assert ours.memory is None
    assert ours.intermediate_size == 3 * 24
    assert ours.ffn_config.expert_size(ours.intermediate_size) == 24
    assert ours.ffn["router_z_loss_coef"] == 0.001
    assert config_to_olmoe(ours).to_dict() == theirs.to_dict()
    # Later changes to one do not reach the other.
    ours.rope_parameters["rope_theta"] = 7.0
    assert theirs.rope_parameters["rope_theta"] == settings["rope_parameters"]["rope_theta"]


def test_generation_settings_are_carried_over():
    theirs = olmoe()
    theirs.generation_config.max_new_tokens = 3
    ours = from_olmoe(theirs)
    assert ours.generation_config.max_new_tokens == 3
    assert (
        ours.generate(token_ids(), do_sample=False).tolist() == theirs.generate(token_ids(), do_sample=False).tolist()
    )


@variants
def test_a_folder_that_olmoe_saved_loads_into_ours(settings, tmp_path):
    theirs = olmoe(**settings)
    theirs.save_pretrained(tmp_path)
    for path in (tmp_path, str(tmp_path)):
        assert_same_logits(from_olmoe(path), theirs)


@variants
def test_what_ours_becomes_saves_itself_as_olmoe_does(settings, tmp_path):
    theirs = olmoe(**settings)
    theirs.save_pretrained(tmp_path / "theirs")
    to_olmoe(from_olmoe(theirs)).save_pretrained(tmp_path / "ours")
    loaded = OlmoeForCausalLM.from_pretrained(tmp_path / "ours")
    assert_same_logits(loaded, theirs)
    names = []
    for folder in ("ours", "theirs"):
        with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as weights:
            names.append(sorted(weights.keys()))
    assert names[0] == names[1]
    assert "model.layers.0.mlp.experts.5.gate_proj.weight" in names[0]
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("ours", "theirs")]
    assert configs[0] == configs[1]


@variants
def test_our_own_folders_are_checked_and_load(settings, tmp_path):
    ours = from_olmoe(olmoe(**settings))
    ours.save_pretrained(tmp_path)
    summary = check_weights(tmp_path, load_config(tmp_path))
    assert summary.num_tensors == len(ours.state_dict()) - settings["tie_word_embeddings"]
    loaded = UltraMemForCausalLM.from_pretrained(tmp_path)
    assert_same_logits(loaded, ours)
    for name, tensor in loaded.state_dict().items():
        assert_bit_equal(tensor, ours.state_dict()[name])


def test_weights_of_other_experts_are_noticed(tmp_path):
    from_olmoe(olmoe()).save_pretrained(tmp_path)
    config = load_config(tmp_path)
    config.ffn["num_experts"] = 7
    with pytest.raises(
        CheckpointError, match=r"mlp\.experts\.down_proj has shape \[6, 32, 24\] instead of \[7, 32, 24\]"
    ):
        check_weights(tmp_path, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": {"type": "ultramem_v2"}}, r"memory is of type 'ultramem_v2'; OLMoE has no memories"),
        ({"ffn": {"type": "dense"}}, r"ffn\.type is 'dense'; OLMoE's FFN is a mixture of experts"),
    ],
)
def test_what_olmoe_has_not_is_refused(changes, message):
    sizes = {name: value for name, value in SETTINGS.items() if name in UltraMemConfig.__dataclass_fields__}
    moe = {"type": "moe", "num_experts": 4, "num_experts_per_tok": 2}
    config = UltraMemConfig(**{**sizes, "ffn": moe, "memory": None, **changes})
    with pytest.raises(ConfigError, match=message):
        config_to_olmoe(config)
    with torch.device("meta"):
        model = UltraMemForCausalLM(config)
    with pytest.raises(ConfigError, match=message):
        to_olmoe(model)


def test_other_models_and_missing_folders_are_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"llama' holds a model of type 'llama'; expected 'olmoe'"):
        from_olmoe(tmp_path / "llama")
    with pytest.raises(CheckpointError, match=r"no OLMoE model can be read at '.*nowhere'"):
        from_olmoe(tmp_path / "nowhere")
    OlmoeConfig(**SETTINGS).save_pretrained(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"no OLMoE model can be read at '.*empty'"):
        from_olmoe(tmp_path / "empty")


def test_loading_an_olmoe_folder_directly_says_how(tmp_path):
    olmoe().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model_type must be 'ultramem'; got 'olmoe'.*from_olmoe"):
        UltraMemForCausalLM.from_pretrained(tmp_path)
