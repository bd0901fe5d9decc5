"""The kernels of a decode step against plain PyTorch: odd sizes, both dtypes, any number of threads."""

import pytest
import torch
from torch.nn import functional as F

from tolerances import assert_bit_equal, assert_close
from ultramem.errors import BackendError
from ultramem.ops import decode, use_backend

pytestmark = pytest.mark.usefixtures("kernels")

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture
def kernels():
    with torch.no_grad(), use_backend("cpu"):
        assert decode.runs_on_kernels(torch.empty(1))
        yield


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + 31 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("width", [1, 7, 16, 33, 512, 1040])
@dtypes
def test_linear(dtype, width, num_tokens):
    for num_rows in (1, 15, 16, 50):
        x, weight, bias = draw(num_tokens, width), draw(num_rows, width, dtype=dtype), draw(num_rows, dtype=dtype)
        x /= width**0.5
        expected = F.linear(x.double(), weight.double())
        assert_close(decode.linear(x, weight), expected)
        assert_close(decode.linear(x, weight, bias), expected + bias.double())


@dtypes
def test_the_number_of_threads_changes_no_bit(dtype):
    x, weight = draw(5, 520), draw(333, 520, dtype=dtype)
    results, before = [], torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results.append(decode.linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert_bit_equal(*results)


@pytest.mark.parametrize("width", [1, 7, 48])
@dtypes
def test_rms_norm(dtype, width):
    x, gain = draw(3, width), draw(width, dtype=dtype)
    assert_close(decode.rms_norm(x, gain, 1e-5), F.rms_norm(x, (width,), gain.float(), 1e-5))


@pytest.mark.parametrize(("width", "inner"), [(5, 3), (48, 40), (32, 130)])
@dtypes
def test_gated_ffn(dtype, width, inner):
    residual, x = draw(3, width, seed=1), draw(3, width)
    gate, up, down = draw(inner, width, dtype=dtype), draw(inner, width, dtype=dtype, seed=2), draw(width, inner)
    down = down.to(dtype)
    expected = residual + F.linear(F.silu(F.linear(x, gate.float())) * F.linear(x, up.float()), down.float())
    decode.add_gated_ffn(residual, x, gate, up, down)
    assert_close(residual, expected)


def test_the_gate_of_large_and_small_numbers():
    gate = torch.tensor([[-1e4], [-100.0], [-20.0], [-1e-6], [0.0], [1e-6], [20.0], [100.0], [1e4]])
    num_rows = len(gate)
    residual = torch.zeros(1, num_rows)
    decode.add_gated_ffn(residual, torch.ones(1, 1), gate, torch.ones(num_rows, 1), torch.eye(num_rows))
    assert_close(residual[0], F.silu(gate[:, 0]))
    # The scalar tail and the vectors must agree on the same numbers.
    wide = gate.repeat(16, 1)
    residual = torch.zeros(1, len(wide))
    decode.add_gated_ffn(residual, torch.ones(1, 1), wide, torch.ones(len(wide), 1), torch.eye(len(wide)))
    assert_close(residual[0], F.silu(wide[:, 0]))


@pytest.mark.parametrize("num_tokens", [0, 1, 6])
@dtypes
def test_experts(dtype, num_tokens):
    num_experts, width, inner, num_chosen = 5, 18, 7, 3
    gate_up, down = 0.2 * draw(num_experts, 2 * inner, width), 0.2 * draw(num_experts, width, inner)
    gate_up, down = gate_up.to(dtype), down.to(dtype)
    residual, x, weights = draw(num_tokens, width, seed=1), draw(num_tokens, width), draw(num_tokens, num_chosen)
    # Expert 4 is chosen by nobody, expert 1 by every token.
    index = torch.tensor([[1, 0, 2], [3, 1, 0], [1, 2, 3], [0, 1, 2], [2, 1, 0], [1, 3, 0]])[:num_tokens]
    expected = residual.clone()
    for token in range(num_tokens):
        for expert, weight in zip(index[token], weights[token], strict=True):
            gate, up = F.linear(x[token], gate_up[expert].float()).chunk(2)
            expected[token] += weight * F.linear(F.silu(gate) * up, down[expert].float())
    decode.add_experts(residual, x, gate_up, down, index.contiguous(), weights)
    assert_close(residual, expected)


def test_an_expert_that_does_not_exist_is_refused():
    with pytest.raises(IndexError, match="expert 2 is none of 2"):
        decode.add_experts(
            draw(1, 4), draw(1, 4), draw(2, 6, 4), draw(2, 4, 3), torch.tensor([[0, 2]]), torch.ones(1, 2)
        )


def attention(dtype, width=6, num_heads=4, num_kv_heads=2, position=9, num_tokens=3, **changes):
    """Operands of add_attention, with a cache that is NaN where nothing has been written."""
    hidden = 10
    query_width, kv_width = num_heads * width, num_kv_heads * width
    cache = torch.full((2, num_tokens, num_kv_heads, position + 3, width), torch.nan, dtype=dtype)
    cache[..., :position, :] = draw(2, num_tokens, num_kv_heads, position, width)
    shapes = [(query_width, hidden), (kv_width, hidden), (kv_width, hidden), (hidden, query_width)]
    angles = draw(num_tokens, width)
    operands = {
        "weights": [draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)],
        "biases": [],
        "gains": [draw(query_width, dtype=dtype), draw(kv_width, dtype=dtype)],
        "epsilon": 1e-5,
        "clip": None,
        "scaling": width**-0.5,
        "cosines_Nd": angles.cos(),
        "sines_Nd": angles.sin(),
        "keys_BHTd": cache[0].contiguous(),
        "values_BHTd": cache[1].contiguous(),
        "position": position,
        "mask_BT": None,
    }
    return draw(num_tokens, hidden, seed=1), draw(num_tokens, hidden), {**operands, **changes}


def expected_attention(residual, x, o):
    """The same in plain PyTorch; returns also what must stand in the cache."""
    width, position = o["keys_BHTd"].shape[3], o["position"]
    biases = [bias.float() for bias in o["biases"]] or [None] * 4
    query, key, value = (
        F.linear(x, weight.float(), bias) for weight, bias in zip(o["weights"][:3], biases[:3], strict=True)
    )
    query, key = (
        F.rms_norm(tensor, tensor.shape[1:], gain.float(), o["epsilon"])
        for tensor, gain in zip((query, key), o["gains"], strict=True)
    )
    if o["clip"] is not None:
        query, key, value = (tensor.clamp(-o["clip"], o["clip"]) for tensor in (query, key, value))
    query, key, value = (tensor.unflatten(1, (-1, width)) for tensor in (query, key, value))

    def rotate(tensor):
        first, second = tensor.chunk(2, dim=-1)
        cosines, sines = o["cosines_Nd"][:, None], o["sines_Nd"][:, None]
        return tensor * cosines + torch.cat([-second, first], dim=-1) * sines

    dtype = o["keys_BHTd"].dtype
    key, value = rotate(key).to(dtype), value.to(dtype)
    keys = torch.cat([o["keys_BHTd"][:, :, :position], key[:, :, None]], dim=2)
    values = torch.cat([o["values_BHTd"][:, :, :position], value[:, :, None]], dim=2)
    mask = None if o["mask_BT"] is None else o["mask_BT"][:, None, None]
    attended = F.scaled_dot_product_attention(
        rotate(query)[:, :, None],
        keys.float(),
        values.float(),
        attn_mask=mask,
        scale=o["scaling"],
        enable_gqa=True,
    )
    return residual + F.linear(attended.flatten(1), o["weights"][3].float(), biases[3]), keys, values


MASK = torch.tensor([[0] * 4 + [1] * 6, [1] * 10, [1, 0] * 4 + [1, 1]]).bool()
VARIANTS = {
    "odd width": {},
    "whole vectors": {"width": 32},
    "one token": {"num_tokens": 1},
    "nothing before": {"position": 0},
    "every head its own": {"num_kv_heads": 4},
    "many tokens": {"width": 16, "position": 37},
    "mask": {"mask_BT": MASK},
    "mask, whole vectors": {"mask_BT": MASK, "width": 16},
    "clip": {"clip": 0.3},
    "empty batch": {"num_tokens": 0},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@dtypes
def test_attention(dtype, changes):
    residual, x, operands = attention(dtype, **changes)
    expected, keys, values = expected_attention(residual, x, operands)
    decode.add_attention(residual, x, **operands)
    # A product that lies at the middle of two bf16 numbers may be stored as either.
    assert_close(residual, expected, None if dtype == torch.float32 else torch.bfloat16)
    past = operands["position"] + 1
    assert_close(operands["keys_BHTd"][:, :, :past], keys)
    assert_close(operands["values_BHTd"][:, :, :past], values)
    assert operands["keys_BHTd"][:, :, past:].isnan().all()


def test_attention_with_biases():
    residual, x, operands = attention(torch.float32)
    operands["biases"] = [draw(len(weight), seed=7 + i) for i, weight in enumerate(operands["weights"])]
    expected, _, _ = expected_attention(residual, x, operands)
    decode.add_attention(residual, x, **operands)
    assert_close(residual, expected)


def test_a_full_cache_is_refused():
    residual, x, operands = attention(torch.float32)
    with pytest.raises(IndexError, match="the KV cache holds 12 tokens and is full"):
        decode.add_attention(residual, x, **{**operands, "position": 12})


def test_where_the_kernels_cannot_stand_in():
    weight = torch.empty(4, 4)
    assert decode.runs_on_kernels(weight.bfloat16())
    assert not decode.runs_on_kernels(weight.T[:, :2])
    with torch.enable_grad():
        assert not decode.runs_on_kernels(weight)
    with torch.autocast("cpu"):
        assert not decode.runs_on_kernels(weight)
    with use_backend("reference"):
        assert not decode.runs_on_kernels(weight)
    with use_backend("auto"):
        assert not decode.runs_on_kernels(weight.double())


def test_kernels_that_were_asked_for_and_cannot_be_built_are_an_error(monkeypatch):
    monkeypatch.setattr("ultramem.ops.backends._why_not_here", lambda backend: "there is no C++ compiler")
    with pytest.raises(BackendError, match="there is no C\\+\\+ compiler"):
        decode.runs_on_kernels(torch.empty(4, 4))
    with use_backend("auto"):
        assert not decode.runs_on_kernels(torch.empty(4, 4))
