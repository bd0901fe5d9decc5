"""What every memory layer keeps in other states and precisions: meta, saved, compiled, bf16, autocast."""

import pytest
import torch

from memory_types import memory_type
from tiny_memories import HIDDEN_SIZE, MEMORY_INDEX, NUM_MEMORIES, VARIANTS, memory_config, memory_layer, tokens
from tolerances import assert_bit_equal, assert_close
from ultramem.layers import MEMORY_TYPES

# The variants, and whether training, whose compilation is tested every time; the others are slow tests.
COMPILED = {(f"{kind}-{name}", training) for kind in MEMORY_TYPES for name, training in memory_type(kind).COMPILED}

variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def named_tensors(layer, pool):
    return layer.state_dict() | {f"pool.{name}": tensor for name, tensor in pool.state_dict().items()}


@variants
def test_meta_construction_then_loading(changes):
    expected, expected_pool = memory_layer(**changes)
    config = memory_config(**changes)
    kind = MEMORY_TYPES[config.type].layer
    with torch.device("meta"):
        layer = kind(HIDDEN_SIZE, config, NUM_MEMORIES, MEMORY_INDEX)
        pool = kind.make_pool(HIDDEN_SIZE, config, NUM_MEMORIES)
    assert all(tensor.is_meta for tensor in named_tensors(layer, pool).values())
    layer, pool = layer.to_empty(device="cpu").double().eval(), pool.to_empty(device="cpu").double()
    layer.load_state_dict(expected.state_dict())
    pool.load_state_dict(expected_pool.state_dict())
    theirs = named_tensors(expected, expected_pool)
    for name, tensor in named_tensors(layer, pool).items():
        assert_bit_equal(tensor, theirs[name])
    assert torch.equal(layer(tokens(5), pool).output, expected.eval()(tokens(5), expected_pool).output)


@variants
def test_save_and_load_keep_every_bit(changes, tmp_path):
    layer, pool = memory_layer(dtype=torch.float32, **changes)
    torch.save([layer.state_dict(), pool.state_dict()], tmp_path / "layer.pt")
    shuffled = {"shuffle_seed": 7} if hasattr(layer, "permutation") else {}
    other, other_pool = memory_layer(dtype=torch.float32, seed=99, **changes, **shuffled)
    for name, tensor in named_tensors(other, other_pool).items():
        # Gains are the same by design, the directions of a core of rank one too.
        if not name.endswith(("_norm", "_direction")):
            assert not torch.equal(tensor, named_tensors(layer, pool)[name]), name
    for target, state in zip((other, other_pool), torch.load(tmp_path / "layer.pt", weights_only=True), strict=True):
        target.load_state_dict(state)
    for name, tensor in named_tensors(other, other_pool).items():
        assert_bit_equal(tensor, named_tensors(layer, pool)[name])
    x = tokens(5, dtype=torch.float32)
    assert torch.equal(other.eval()(x, other_pool).output, layer.eval()(x, pool).output)


@pytest.mark.parametrize(
    ("name", "training"),
    [
        pytest.param(name, training, marks=[] if (name, training) in COMPILED else pytest.mark.slow)
        for name in VARIANTS
        for training in (False, True)
        if not training or (name, training) in COMPILED
    ],
)
def test_compiles_without_a_graph_break(name, training, fresh_compiler):
    layer, pool = memory_layer(**VARIANTS[name])
    x = tokens(6).requires_grad_()
    layer.train(training)
    layer.refresh_retrieval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (layer, compiled):
        result = run(x, pool)
        assert_close(result.output, layer(x, pool).output)
        loss = result.output.square().sum() + sum(result.losses.values())
        gradients.append(torch.autograd.grad(loss, [x, *layer.parameters(), *pool.parameters()]))
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs)


@variants
def test_bf16_layer_is_close_to_the_exact_one(changes):
    layer, pool = memory_layer(dtype=torch.bfloat16, **changes)
    layer.eval()
    x = tokens(64, dtype=torch.bfloat16).requires_grad_()
    result = layer(x, pool)
    assert result.output.dtype == torch.bfloat16
    (result.output.float().square().sum() + sum(result.losses.values())).backward()
    assert all(p.grad.isfinite().all() for p in [*layer.parameters(), *pool.parameters()])
    expected = layer.double()(x.double(), pool.double()).output
    # Rounded queries may select other slots near ties, so that only the direction of the whole is compared.
    similarity = torch.nn.functional.cosine_similarity(result.output.double().flatten(), expected.flatten(), dim=0)
    assert similarity > 0.97


@variants
def test_autocast_searches_in_fp32(changes):
    layer, pool = memory_layer(dtype=torch.float32, **changes)
    layer.eval()
    x = tokens(6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        retrieved = layer.retrieval(x)
        result = layer(x, pool)
    assert retrieved.scores_NHKC.dtype == torch.float32
    assert result.output.dtype == (torch.float32 if layer.out_proj is None else torch.bfloat16)
    # The only rounding before the scores is that of the query projection.
    weight, bias = layer.retrieval.query_proj.weight.bfloat16(), layer.retrieval.query_proj.bias
    rounded = torch.nn.functional.linear(x.bfloat16(), weight, None if bias is None else bias.bfloat16())
    layer.retrieval.query_proj = torch.nn.Identity()
    exact = layer.retrieval(rounded)
    assert torch.equal(retrieved.slots_NHK, exact.slots_NHK)
    assert torch.equal(retrieved.scores_NHKC, exact.scores_NHKC)
    assert all(loss.dtype == torch.float32 for loss in result.losses.values())


@variants
def test_autocast_trains_every_parameter(changes):
    layer, pool = memory_layer(dtype=torch.float32, **changes)
    x = tokens(6, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(x, pool)
    (result.output.float().square().sum() + sum(result.losses.values())).backward()
    for parameter in (x, *layer.parameters(), *pool.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@variants
def test_casting_rounds_parameters_alone(changes):
    """Directions and running statistics stay fp32: rounded, they would select other slots or stand still."""
    layer, _ = memory_layer(dtype=torch.float32, **changes)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    for cast in (layer.bfloat16, layer.double, lambda: layer.to("cpu", torch.float16)):
        cast()
        for name, buffer in layer.named_buffers():
            assert_bit_equal(buffer, before[name])
    assert all(parameter.dtype == torch.float16 for parameter in layer.parameters())
