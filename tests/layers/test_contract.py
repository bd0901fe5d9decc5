"""What every memory layer keeps, whatever its type and settings."""

import dataclasses

import pytest
import torch

from tiny_memories import HIDDEN_SIZE, NUM_MEMORIES, SMALL, VARIANTS, memory_config, memory_layer, tokens
from tolerances import assert_bit_equal, assert_close
from ultramem.layers import MEMORY_TYPES

# The variants, and whether training, whose compilation is tested every time; the other variants are slow tests.
COMPILED = {("default", True), ("losses", True), ("expansion_projected", False), ("exact", False)}

variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def named_tensors(layer, pool):
    yield from (layer.state_dict() | {f"pool.{name}": tensor for name, tensor in pool.state_dict().items()}).items()


class WithPool(torch.nn.Module):
    """A layer that owns its pool: one module to differentiate."""

    def __init__(self, layer, pool):
        super().__init__()
        self.layer, self.pool = layer, pool

    def forward(self, x):
        return self.layer(x, self.pool)


@variants
def test_output_has_the_shape_and_dtype_of_the_input(changes):
    layer, pool = memory_layer(**changes)
    for shape in ((5,), (2, 3), (1, 2, 3), (0,), (2, 0)):
        result = layer(tokens(*shape), pool)
        assert result.output.shape == (*shape, HIDDEN_SIZE)
        assert result.output.dtype == torch.float64
        assert result.statistics == {}
        assert set(result.losses) == ({"key_balance", "tucker_penalty"} if "key_balance_weight" in changes else set())


@variants
def test_tokens_do_not_see_each_other(changes):
    layer, pool = memory_layer(**changes)
    layer.eval()
    x = tokens(2, 5)
    expected = layer(x, pool).output
    order = torch.tensor([3, 0, 4, 1, 2])
    assert_close(layer(x[:, order], pool).output, expected[:, order])
    assert_close(layer(x[1, 2], pool).output, expected[1, 2])
    changed = x.clone()
    changed[0, 2] += 1
    others = torch.tensor([0, 1, 3, 4])
    output = layer(changed, pool).output
    assert_close(output[:, others], expected[:, others])
    assert (output[0, 2] - expected[0, 2]).abs().max() > 1e-3


@variants
def test_every_parameter_and_the_input_get_a_gradient(changes, poisoned_memory):
    layer, pool = memory_layer(**changes)
    x = tokens(40).requires_grad_()
    result = layer(x, pool)
    (result.output.square().sum() + sum(result.losses.values())).backward()
    for name, parameter in [*layer.named_parameters(), *pool.named_parameters(), ("x", x)]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    # Every core, rank, side and head learns.
    assert (layer.retrieval.cores.grad.abs() > 0).all()
    assert (layer.retrieval.keys.grad.abs().sum((2, 3)) > 0).all()


@variants
def test_only_rows_of_the_window_get_a_gradient(changes):
    layer, pool = memory_layer(**changes)
    layer(tokens(40), pool).output.square().sum().backward()
    touched = pool.values.grad.abs().sum(1).nonzero().flatten()
    window = (torch.arange(layer.window.size) + layer.window.offset) % pool.num_rows
    assert 0 < len(touched) < pool.num_rows
    assert torch.isin(touched, window).all()


@variants
def test_first_derivatives(changes):
    whole = WithPool(*memory_layer(**changes)).eval()
    names, values = zip(*whole.named_parameters(), strict=True)

    def outputs(x, *values):
        result = torch.func.functional_call(whole, dict(zip(names, values, strict=True)), (x,))
        return result.output, *result.losses.values()

    assert torch.autograd.gradcheck(outputs, (tokens(3).requires_grad_(), *values), fast_mode=True)


@variants
def test_layer_in_rows_mode_gives_the_same_numbers(changes):
    layer, pool = memory_layer(**changes)
    expected = layer(tokens(9), pool).output
    expected.square().sum().backward()
    dense = {name: parameter.grad.clone() for name, parameter in layer.named_parameters() if parameter.grad is not None}
    tables = {name: parameter.grad.clone() for name, parameter in pool.named_parameters()}
    layer.zero_grad()
    pool.zero_grad()
    pool.set_table_gradients("rows")
    output = layer(tokens(9), pool).output
    assert torch.equal(output, expected)
    output.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is None) == (name not in dense)
        assert parameter.grad is None or torch.equal(parameter.grad, dense[name]), name
    for name, collector in (("values", pool.value_gradients), ("pre_values", pool.pre_value_gradients)):
        if name not in tables:
            assert collector is None
            continue
        rows, gradients = collector.coalesce()
        assert getattr(pool, name).grad is None
        assert_close(torch.zeros_like(tables[name]).index_copy(0, rows, gradients), tables[name])


@variants
def test_counts_are_those_of_the_built_module(changes):
    config = memory_config(**changes)
    layer, pool = memory_layer(config)
    assert config.dense_parameters(HIDDEN_SIZE, NUM_MEMORIES) == sum(p.numel() for p in layer.parameters())
    assert config.table_parameters(HIDDEN_SIZE, NUM_MEMORIES) == sum(p.numel() for p in pool.parameters())
    selected = layer(tokens(1), pool, return_statistics=True).statistics["slots_NK"].numel()
    assert selected == config.num_selected
    row = config.value_dim + config.pre_value_dim
    assert config.table_elements_per_token(HIDDEN_SIZE) == selected * row
    rows = layer.window.size
    for batch_size in (1, 64):
        expected = rows * (1 - (1 - 1 / rows) ** (batch_size * selected)) * row
        assert config.table_elements_per_step(batch_size, HIDDEN_SIZE, NUM_MEMORIES) == pytest.approx(expected, rel=1e-12)


@variants
def test_flops_are_those_that_the_counter_sees(changes):
    config = dataclasses.replace(memory_config(**changes), key_balance_weight=0.0, tucker_penalty_weight=0.0)
    layer, pool = memory_layer(config)
    x = tokens(5)
    with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        layer.eval()(x, pool)
    assert counter.get_total_flops() == 5 * config.flops_per_token(HIDDEN_SIZE, NUM_MEMORIES)


@variants
def test_meta_construction_then_loading(changes):
    expected, expected_pool = memory_layer(**changes)
    config = memory_config(**changes)
    kind = MEMORY_TYPES[config.type].layer
    with torch.device("meta"):
        layer = kind(HIDDEN_SIZE, config, NUM_MEMORIES, 1)
        pool = kind.make_pool(HIDDEN_SIZE, config, NUM_MEMORIES)
    assert all(tensor.is_meta for _, tensor in named_tensors(layer, pool))
    layer, pool = layer.to_empty(device="cpu").double().eval(), pool.to_empty(device="cpu").double()
    layer.load_state_dict(expected.state_dict())
    pool.load_state_dict(expected_pool.state_dict())
    for (name, ours), (_, theirs) in zip(
        named_tensors(layer, pool), named_tensors(expected, expected_pool), strict=True
    ):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
    assert torch.equal(layer(tokens(5), pool).output, expected.eval()(tokens(5), expected_pool).output)


@variants
def test_save_and_load_keep_every_bit(changes, tmp_path):
    layer, pool = memory_layer(dtype=torch.float32, **changes)
    torch.save([layer.state_dict(), pool.state_dict()], tmp_path / "layer.pt")
    other, other_pool = memory_layer(dtype=torch.float32, seed=99, **{**changes, "shuffle_seed": 7})
    assert not torch.equal(other.permutation, layer.permutation)
    for target, state in zip((other, other_pool), torch.load(tmp_path / "layer.pt", weights_only=True), strict=True):
        target.load_state_dict(state)
    for (_, ours), (_, theirs) in zip(named_tensors(other, other_pool), named_tensors(layer, pool), strict=True):
        assert_bit_equal(ours, theirs)
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
    layer.retrieval.refresh()
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
    x = tokens(64, dtype=torch.bfloat16).requires_grad_()
    result = layer(x, pool)
    assert result.output.dtype == torch.bfloat16
    (result.output.float().square().sum() + sum(result.losses.values())).backward()
    assert all(p.grad.isfinite().all() for p in [*layer.parameters(), *pool.parameters()])
    expected = layer.double().eval()(x.double(), pool.double()).output
    # Rounded queries may select other slots near ties, so that only the direction of the whole is compared.
    similarity = torch.nn.functional.cosine_similarity(result.output.double().flatten(), expected.flatten(), dim=0)
    assert similarity > 0.97


@variants
def test_autocast_searches_in_fp32(changes):
    layer, pool = memory_layer(dtype=torch.float32, **changes)
    x = tokens(6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        retrieved = layer.retrieval(x)
        result = layer(x, pool)
    assert retrieved.scores_NHKC.dtype == torch.float32
    assert result.output.dtype == torch.bfloat16
    # The only rounding before the scores is that of the query projection.
    rounded = torch.nn.functional.linear(x.bfloat16(), layer.retrieval.query_proj.weight.bfloat16())
    query = rounded.view(len(x), 2, layer.retrieval.num_queries, -1)
    exact = layer.retrieval._search(query, layer.retrieval.query_norm, layer.retrieval.key_norm)
    assert torch.equal(retrieved.slots_NHK, exact.slots_NHK)
    assert torch.equal(retrieved.scores_NHKC, exact.scores_NHKC)
    assert all(loss.dtype == torch.float32 for loss in result.losses.values())


# One change per setting.
CHANGES = {
    "num_keys": {"num_keys": 7},
    "key_dim": {"key_dim": 10},
    "value_dim": {"value_dim": 14},
    "pre_value_dim": {"pre_value_dim": 9},
    "top_k": {"top_k": 5},
    "coarse_top_k": {"coarse_top_k": 3},
    "num_heads": {"num_heads": 2},
    "num_cores": {"num_cores": 3},
    "rank": {"rank": 3},
    "key_expansion": {"key_expansion": 2},
    "projection": {"key_expansion": 2, "projection": "project"},
    "tables": {"tables": "shared"},
    "share_ratio": {"tables": "ring", "share_ratio": 0.7},
    "query_per_rank": {"query_per_rank": True},
    "pre_value_activation": {"pre_value_activation": "gelu"},
    "search": {"search": "exact"},
    "key_balance_weight": {"key_balance_weight": 0.1},
    "tucker_penalty_weight": {"tucker_penalty_weight": 0.1},
    "tucker_penalty_margin": {"tucker_penalty_weight": 0.1, "tucker_penalty_margin": 0.05},
    "output_dropout": {"output_dropout": 0.5},
    "init": {"init": "released"},
    "shuffle_seed": {"shuffle_seed": 1},
}
BASES = {"share_ratio": {"tables": "ring", "share_ratio": 0.4}, "projection": {"key_expansion": 2}, "tucker_penalty_margin": {"tucker_penalty_weight": 0.1}}


def observed(changes):
    """Everything that a setting could show in: structure, drawn tensors, output, losses."""
    layer, pool = memory_layer(**changes)
    result = layer(tokens(20), pool)
    drawn = [tensor for _, tensor in sorted(named_tensors(layer, pool))]
    return [*drawn, result.output.detach(), *[loss.detach() for _, loss in sorted(result.losses.items())]]


def test_every_setting_is_covered():
    # The type names the class; placement belongs to the decoder (tests/model).
    names = {field.name for field in dataclasses.fields(memory_config())} - {"type", "placement", "position"}
    assert names == set(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_something(name):
    before, after = observed(BASES.get(name, {})), observed(CHANGES[name])
    same = len(before) == len(after) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, after, strict=True)
    )
    assert not same


def test_the_same_settings_and_seed_draw_the_same_layer():
    for ours, theirs in zip(observed({}), observed(dict(SMALL)), strict=True):
        assert torch.equal(ours, theirs)
