"""The FFN: settings and their errors, OLMoE's block to the bit, router losses, costs."""

import copy
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeMLP, OlmoeSparseMoeBlock

from tolerances import assert_bit_equal, assert_close
from ultramem import UltraMemConfig, UltraMemForCausalLM
from ultramem.errors import ConfigError
from ultramem.model.ffn import DenseFFNConfig, FFNOutput, MoEFFNConfig, build_ffn, make_ffn_config, router_losses

HIDDEN_SIZE, EXPERT_SIZE = 16, 24
MOE = {"type": "moe", "num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": EXPERT_SIZE}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
IMPLEMENTATIONS = ["grouped_linear", "eager", "batched_mm", "grouped_mm"]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def decoder_config(ffn, **settings):
    sizes = {
        "vocab_size": 61,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "memory": None,
    }
    return UltraMemConfig(ffn=ffn, **{**sizes, **settings})


def moe_decoder(dtype=torch.float32, ffn=(), **settings):
    torch.manual_seed(0)
    config = decoder_config({**MOE, **dict(ffn)}, **{"initializer_range": 0.3, **settings})
    return UltraMemForCausalLM(config).to(dtype).eval()


def fill(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module


def moe_ffn(dtype=torch.float64, **changes):
    return fill(build_ffn(decoder_config({**MOE, **changes}))).to(dtype)


def olmoe_block(dtype=torch.float64, implementation="eager", **changes):
    config = OlmoeConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=EXPERT_SIZE,
        num_experts=6,
        num_experts_per_tok=2,
        experts_implementation=implementation,
        **changes,
    )
    return fill(OlmoeSparseMoeBlock(config)).to(dtype)


def tokens(*shape, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, HIDDEN_SIZE, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def token_ids(*shape, seed=1):
    return torch.randint(2, 61, shape, generator=torch.Generator().manual_seed(seed))


def run_with_gradients(block, x):
    """Output and the gradients of input and weights; a block of OLMoE returns the output alone."""
    result = block(x)
    output = result.output if isinstance(result, FFNOutput) else result
    (output.double() * torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)).sum().backward()
    return output, [x.grad, *(parameter.grad for parameter in block.parameters())]


# Settings.


def test_no_settings_are_a_dense_ffn():
    for settings in (None, {}, {"type": "dense"}):
        assert make_ffn_config(settings) == DenseFFNConfig()
    assert decoder_config(None).ffn == {"type": "dense"}


def test_defaults_are_those_of_olmoe():
    config = make_ffn_config({"type": "moe"})
    theirs = OlmoeConfig()
    for name in ("num_experts", "num_experts_per_tok", "norm_topk_prob", "router_aux_loss_coef"):
        assert getattr(config, name) == getattr(theirs, name)
    assert config.router_z_loss_coef == 0.001


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "mixture"}, r"ffn\.type must be one of dense, moe; got 'mixture'"),
        (
            {"type": "dense", "num_experts": 4},
            r"ffn\.num_experts is no setting of an FFN of type dense; allowed are type",
        ),
        ({"num_experts": 4}, r"ffn\.num_experts is no setting of an FFN of type dense"),
        ({"type": "moe", "experts": 4}, r"ffn\.experts is no setting of an FFN of type moe; allowed are .*num_experts"),
        ({"type": "moe", "num_experts": 0}, r"ffn\.num_experts must be at least 1; got 0"),
        ({"type": "moe", "num_experts_per_tok": 0}, r"ffn\.num_experts_per_tok must be at least 1; got 0"),
        ({"type": "moe", "intermediate_size": 0}, r"ffn\.intermediate_size must be at least 1; got 0"),
        ({"type": "moe", "num_experts": 4}, r"ffn\.num_experts_per_tok \(8\) must be at most ffn\.num_experts \(4\)"),
        ({"type": "moe", "router_aux_loss_coef": -1}, r"ffn\.router_aux_loss_coef must not be negative; got -1"),
        ({"type": "moe", "router_z_loss_coef": math.nan}, r"ffn\.router_z_loss_coef must not be negative; got nan"),
        ({"type": "moe", "num_experts": "8"}, r"ffn: .*num_experts"),
        ({"type": "moe", "experts_implementation": "fast"}, r"ffn: .*experts_implementation"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    for make in (make_ffn_config, decoder_config):
        with pytest.raises(ConfigError, match=message):
            make(settings)


def test_experts_share_the_width_of_the_dense_ffn():
    assert MoEFFNConfig(num_experts_per_tok=4).expert_size(512) == 128
    assert MoEFFNConfig(num_experts_per_tok=4, intermediate_size=7).expert_size(512) == 7
    ffn = build_ffn(decoder_config({"type": "moe", "num_experts": 4, "num_experts_per_tok": 3}))
    assert ffn.experts.down_proj.shape == (4, HIDDEN_SIZE, 16)
    with pytest.raises(ConfigError, match=r"intermediate_size \(48\) // ffn\.num_experts_per_tok \(49\) = 0"):
        decoder_config({"type": "moe", "num_experts_per_tok": 49})


# The dense FFN.


def test_the_dense_ffn_is_that_of_olmoe():
    config = decoder_config(None)
    ours, theirs = fill(build_ffn(config)), fill(OlmoeMLP(config))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = tokens(2, 3, dtype=torch.float32)
    output, logits = ours(x)
    assert_bit_equal(output, theirs(x))
    assert logits is None
    assert ours.output_weight is ours.down_proj.weight


# The mixture of experts.


@dtypes
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_one_block_is_that_of_olmoe(dtype, norm_topk_prob):
    ours, theirs = (make(dtype, norm_topk_prob=norm_topk_prob) for make in (moe_ffn, olmoe_block))
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }
    x = tokens(3, 5, dtype=dtype)
    actual = run_with_gradients(ours, x)
    expected = run_with_gradients(theirs, tokens(3, 5, dtype=dtype))
    # bf16: each of a token's experts is rounded before the sum, in another order.
    tolerance = {"rtol": 0.03, "atol": 0.06} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_block_is_bit_equal_to_the_grouped_implementation_of_olmoe(dtype):
    x = tokens(3, 5, dtype=dtype)
    actual = run_with_gradients(moe_ffn(dtype), x)
    expected = run_with_gradients(olmoe_block(dtype, "grouped_mm"), tokens(3, 5, dtype=dtype))
    assert_bit_equal(actual[0], expected[0])
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_router_logits_are_those_of_the_gate():
    ffn, x = moe_ffn(), tokens(3, 5)
    assert_close(ffn(x).router_logits, x.reshape(15, HIDDEN_SIZE) @ ffn.gate.weight.T)


def test_gradients_are_derivatives():
    ffn, x = moe_ffn(), tokens(2, 2)
    # The router's softmax is in fp32 whatever the dtype, so differences of its weights would measure that rounding.
    experts = {"gate_up_proj": ffn.experts.gate_up_proj, "down_proj": ffn.experts.down_proj}
    _, weights, index = ffn.gate(x.detach().reshape(-1, HIDDEN_SIZE))
    weights = weights.detach().requires_grad_()

    def output(x, weights, *values):
        named = dict(zip(experts, values, strict=True))
        return torch.func.functional_call(ffn.experts, named, (x.reshape(-1, HIDDEN_SIZE), index, weights))

    assert torch.autograd.gradcheck(output, (x, weights, *experts.values()), fast_mode=True)


@dtypes
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
@pytest.mark.usefixtures("poisoned_memory")
def test_no_tokens_give_no_output_and_zero_gradients(dtype, shape):
    ffn = moe_ffn(dtype)
    x = tokens(*shape, dtype=dtype)
    output, gradients = run_with_gradients(ffn, x)
    assert output.shape == x.shape
    assert not any(gradient.any() for gradient in gradients)


@dtypes
@pytest.mark.usefixtures("poisoned_memory")
def test_experts_that_nobody_chose_get_zero_gradients(dtype):
    ffn = moe_ffn(dtype, num_experts=64)
    _, gradients = run_with_gradients(ffn, tokens(3, dtype=dtype))
    visited = gradients[2].flatten(1).any(1)
    assert 2 <= visited.sum() <= 6
    assert not any(gradient.isnan().any() for gradient in gradients)


@dtypes
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_its_gradients_in_one_graph(dtype):
    ffn = moe_ffn(dtype)
    eager = run_with_gradients(copy.deepcopy(ffn), tokens(2, 5, dtype=dtype))
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    result = run_with_gradients(compiled, tokens(2, 5, dtype=dtype))
    torch.testing.assert_close(result, eager)


def test_under_autocast_experts_multiply_in_bf16_and_keep_fp32_weights():
    ffn, x = moe_ffn(torch.float32), tokens(2, 5, dtype=torch.float32)
    expected = moe_ffn(torch.bfloat16)(x.bfloat16()).output
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ffn(x).output
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected.float(), rtol=0.03, atol=0.03)
    assert (output - ffn(x).output).abs().max() > 1e-3
    output.sum().backward()
    assert {parameter.grad.dtype for parameter in ffn.parameters()} == {torch.float32}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_of_the_experts_says_the_same(implementation):
    ids = token_ids(2, 7)
    expected = moe_decoder()(ids).logits
    chosen = moe_decoder(ffn={"experts_implementation": implementation})
    assert chosen.config._experts_implementation == implementation
    assert_close(chosen(ids).logits, expected)
    switched = moe_decoder()
    switched.set_experts_implementation(implementation)
    assert switched.model.layers[1].mlp.experts.config._experts_implementation == implementation
    assert_bit_equal(switched(ids).logits, chosen(ids).logits)


def test_transformers_own_argument_chooses_the_implementation(tmp_path):
    moe_decoder().save_pretrained(tmp_path)
    assert UltraMemForCausalLM.from_pretrained(tmp_path).config._experts_implementation == "grouped_linear"
    loaded = UltraMemForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert loaded.model.layers[0].mlp.experts.config._experts_implementation == "eager"


# Losses of the router.


def test_the_model_reports_its_losses_and_adds_them_to_the_loss():
    model, ids = moe_decoder(), token_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    seen = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda *arguments: seen.append(arguments[-1].router_logits))
    output = model(ids, attention_mask=mask, labels=ids)
    assert output.auxiliary_losses == router_losses(tuple(seen), model.config.ffn_config, mask)
    without = moe_decoder(ffn={"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0})
    plain = without(ids, attention_mask=mask, labels=ids)
    assert not plain.auxiliary_losses
    torch.testing.assert_close(output.loss, plain.loss + sum(output.auxiliary_losses.values()))


# In the decoder.


def test_initial_standard_deviations():
    config = decoder_config({"type": "moe", "num_experts": 16}, hidden_size=64, intermediate_size=256)
    block = UltraMemForCausalLM(config).model.layers[1]
    std = (2 / (5 * 64)) ** 0.5
    for weight, expected in [
        (block.mlp.gate.weight, std),
        (block.mlp.experts.gate_up_proj, std),
        (block.mlp.experts.down_proj, std / 2),
    ]:
        assert abs(weight.mean()) < 0.1 * expected
        assert weight.std().item() == pytest.approx(expected, rel=0.06)


@pytest.mark.usefixtures("fresh_compiler")
def test_the_decoder_compiles_in_one_graph():
    model, ids = moe_decoder(), token_ids(2, 7)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, output = (run(ids, labels=ids, use_cache=False) for run in (model, compiled))
    assert_close(output.loss, expected.loss)
    assert_close(output.logits, expected.logits)
    output.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    expected.loss.backward()
    torch.testing.assert_close(gradients, [parameter.grad for parameter in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_tensor_survives_saving_bit_for_bit(dtype, tmp_path):
    model = moe_decoder(dtype)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = UltraMemForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.ffn == model.config.ffn
    saved = model.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    for name, tensor in loaded.state_dict().items():
        assert_bit_equal(tensor, saved[name])


def test_decoding_with_a_cache_says_the_same_as_without():
    model, ids = moe_decoder(torch.float64), token_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    ids[1, :2] = 1
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    cached, uncached = (model.generate(ids, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert torch.equal(cached, uncached)


# Costs.


@pytest.mark.parametrize("ffn", [None, MOE, {**MOE, "intermediate_size": None, "num_experts_per_tok": 3}], ids=str)
def test_counts_are_those_of_the_module(ffn):
    config = decoder_config(ffn)
    module, costs = build_ffn(config), config.ffn_config
    sizes = (config.hidden_size, config.intermediate_size)
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    assert costs.dense_parameters(*sizes) + costs.expert_parameters(*sizes) == num_parameters
    x = tokens(1, 7, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() == 7 * costs.flops_per_token(*sizes)
    assert costs.flops_per_token(*sizes) == 2 * costs.active_parameters(*sizes)


def test_a_token_costs_what_the_dense_ffn_costs_and_the_router():
    sizes = (64, 512)
    moe, dense = MoEFFNConfig(), DenseFFNConfig()
    assert moe.active_parameters(*sizes) - moe.dense_parameters(*sizes) == dense.active_parameters(*sizes)
    assert moe.expert_parameters(*sizes) == 8 * dense.active_parameters(*sizes)


def test_elements_read_by_a_decode_step():
    sizes, router = (64, 512), 64 * 64
    moe = MoEFFNConfig()
    assert moe.elements_per_step(1, *sizes) == pytest.approx(moe.active_parameters(*sizes))
    assert moe.elements_per_step(10_000, *sizes) == router + moe.expert_parameters(*sizes)
    # Distinct experts of 5 tokens that each draw 8 of 64 without replacement.
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(4_000, 5, 64, generator=generator).topk(8).indices.flatten(1)
    distinct = torch.zeros(4_000, 64).scatter_(1, draws, 1.0).sum(1).mean().item()
    expected = router + distinct * 3 * 64 * 64
    assert moe.elements_per_step(5, *sizes) == pytest.approx(expected, rel=0.01)
    dense = DenseFFNConfig()
    assert dense.elements_per_step(1, *sizes) == dense.elements_per_step(100, *sizes) == 3 * 64 * 512
