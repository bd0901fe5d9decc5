"""What every memory layer keeps, whatever its type and settings: shapes, dependence, gradients, counts."""

import dataclasses

import pytest
import torch

from tiny_memories import HIDDEN_SIZE, NUM_MEMORIES, VARIANTS, drawn_layer, memory_config, memory_layer, tokens
from tolerances import assert_bit_equal, assert_close

variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
LOOKING_BACK = {name: changes for name, changes in VARIANTS.items() if changes.get("query_conv", 0) > 1}
independent = pytest.mark.parametrize(
    "changes", [changes for name, changes in VARIANTS.items() if name not in LOOKING_BACK],
    ids=[name for name in VARIANTS if name not in LOOKING_BACK],
)  # fmt: skip


def learning(layer):
    """The mode in which every parameter acts: batch norm takes the query's bias out again in training."""
    return layer.eval() if getattr(layer.config, "query_norm", None) == "batch" else layer.train()


def named_parameters(layer, pool):
    return [*layer.named_parameters(), *((f"pool.{name}", table) for name, table in pool.named_parameters())]


def auxiliary_losses(config):
    return {name for name in ("key_balance", "tucker_penalty") if getattr(config, f"{name}_weight", 0)}


class WithPool(torch.nn.Module):
    """A layer that owns its pool: one module to differentiate."""

    def __init__(self, layer, pool):
        super().__init__()
        self.layer, self.pool = layer, pool

    def forward(self, x):
        return self.layer(x, self.pool)


@variants
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_output_has_the_shape_and_dtype_of_the_input(changes, training):
    layer, pool = memory_layer(**changes)
    layer.train(training)
    for shape in ((5,), (2, 3), (1, 2, 3), (0,), (2, 0)):
        result = layer(tokens(*shape), pool)
        assert result.output.shape == (*shape, HIDDEN_SIZE)
        assert result.output.dtype == torch.float64
        assert result.statistics == {}
        assert set(result.losses) == auxiliary_losses(layer.config)
        assert all(loss.isfinite() for loss in result.losses.values())


@independent
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


@pytest.mark.parametrize("changes", LOOKING_BACK.values(), ids=LOOKING_BACK)
def test_queries_look_back_as_far_as_the_config_says(changes):
    layer, pool = memory_layer(**changes)
    layer.eval()
    num_past = layer.config.num_past_tokens
    assert num_past == changes["query_conv"] - 1
    x = tokens(2, 7)
    expected = layer(x, pool).output
    changed = x.clone()
    changed[0, 2] += 1
    difference = (layer(changed, pool).output - expected).abs().amax(-1)
    reached = [2 <= place <= 2 + num_past for place in range(7)]
    assert (difference[0] > 1e-3).tolist() == reached
    assert (difference[0] < 1e-12).tolist() == [not place for place in reached]
    assert (difference[1] < 1e-12).all()


@pytest.mark.parametrize("changes", LOOKING_BACK.values(), ids=LOOKING_BACK)
def test_past_tokens_continue_a_sequence(changes):
    layer, pool = memory_layer(**changes)
    layer.eval()
    num_past, x = layer.config.num_past_tokens, tokens(2, 7)
    expected = layer(x, pool).output
    for start in range(8):
        # More than is needed never comes; less stands for the start of the sequence.
        past = x[:, max(0, start - num_past) : start]
        assert_close(layer(x[:, start:], pool, past).output, expected[:, start:])
    assert not torch.allclose(layer(x[:, 3:], pool).output[:, 0], expected[:, 3])


@variants
def test_every_parameter_and_the_input_get_a_gradient(changes, poisoned_memory):
    layer, pool = memory_layer(**changes)
    learning(layer)
    x = tokens(40).requires_grad_()
    result = layer(x, pool)
    (result.output.square().sum() + sum(result.losses.values())).backward()
    for name, parameter in [*named_parameters(layer, pool), ("x", x)]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 1e-9, name
    # Every core, rank, side and head learns.
    if hasattr(layer.retrieval, "cores"):
        assert (layer.retrieval.cores.grad.abs() > 0).all()
    assert (layer.retrieval.keys.grad.abs().sum((2, 3)) > 0).all()


@variants
def test_only_rows_of_the_window_get_a_gradient(changes):
    layer, pool = memory_layer(**changes)
    layer(tokens(40), pool).output.square().sum().backward()
    window = (torch.arange(layer.window.size) + layer.window.offset) % pool.num_rows
    for table in pool.parameters():
        touched = table.grad.abs().sum(1).nonzero().flatten()
        assert len(touched) > 0
        assert torch.isin(touched, window).all()


def assert_gradients_are_those_of_finite_differences(whole):
    names, values = zip(*whole.named_parameters(), strict=True)

    def outputs(x, *values):
        result = torch.func.functional_call(whole, dict(zip(names, values, strict=True)), (x,))
        return result.output, *result.losses.values()

    assert torch.autograd.gradcheck(outputs, (tokens(3).requires_grad_(), *values), fast_mode=True)


@variants
def test_gradients_are_those_of_finite_differences(changes):
    assert_gradients_are_those_of_finite_differences(WithPool(*memory_layer(**changes)).eval())


@pytest.mark.parametrize("kind", ["memory_plus", "pkm", "peer"])
def test_gradients_pass_through_the_batchs_statistics(kind):
    layer, pool = memory_layer(type=kind, query_norm="batch", key_norm=True)
    assert_gradients_are_those_of_finite_differences(WithPool(layer, pool).train())


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
def test_a_zeroed_layer_adds_nothing_and_can_learn(changes):
    layer, pool = memory_layer(**changes)
    learning(layer)
    layer.zero_output(pool)
    output = layer(tokens(9), pool).output
    assert (output == 0).all()
    (output - 1).square().sum().backward()
    with torch.no_grad():
        for _, parameter in named_parameters(layer, pool):
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    assert (layer(tokens(9), pool).output.abs() > 0).any(-1).all()


@variants
def test_counts_are_those_of_the_built_module(changes):
    config = memory_config(**changes)
    layer, pool = memory_layer(config)
    assert config.dense_parameters(HIDDEN_SIZE, NUM_MEMORIES) == sum(p.numel() for p in layer.parameters())
    assert config.table_parameters(HIDDEN_SIZE, NUM_MEMORIES) == sum(p.numel() for p in pool.parameters())
    assert pool.num_rows == config.num_rows(NUM_MEMORIES) == layer.window.num_rows
    selected = layer(tokens(1), pool, return_statistics=True).statistics["slots_NK"].numel()
    assert selected == config.num_selected
    row = sum(table.shape[1] for table in pool.parameters())
    assert config.table_elements_per_token(HIDDEN_SIZE) == selected * row
    rows = layer.window.size
    for batch_size in (1, 64):
        expected = rows * (1 - (1 - 1 / rows) ** (batch_size * selected)) * row
        elements = config.table_elements_per_step(batch_size, HIDDEN_SIZE, NUM_MEMORIES)
        assert elements == pytest.approx(expected, rel=1e-12)


@variants
def test_flops_are_those_that_the_counter_sees(changes):
    config = memory_config(**changes)
    # Auxiliary losses are training's.
    config = dataclasses.replace(config, **{f"{name}_weight": 0.0 for name in auxiliary_losses(config)})
    layer, pool = memory_layer(config)
    x = tokens(5)
    with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        layer.eval()(x, pool)
    assert counter.get_total_flops() == 5 * config.flops_per_token(HIDDEN_SIZE, NUM_MEMORIES)


@variants
def test_every_tensor_is_drawn(changes, poisoned_memory):
    layer, pool = drawn_layer(memory_config(**changes))
    for name, tensor in [*layer.state_dict().items(), *pool.state_dict().items()]:
        assert tensor.double().isfinite().all(), name
    for name, parameter in named_parameters(layer, pool):
        # Biases and shifts start at zero.
        assert parameter.any() != name.endswith(("bias", "query_shift")), name


@variants
def test_the_same_settings_and_seed_draw_the_same_layer(changes):
    config = memory_config(**changes)
    first, again, other = (drawn_layer(config, seed) for seed in (0, 0, 1))
    for ours, theirs in zip(first, again, strict=True):
        for name, tensor in ours.state_dict().items():
            assert_bit_equal(tensor, theirs.state_dict()[name])
    assert not torch.equal(first[0].retrieval.keys, other[0].retrieval.keys)
    assert not torch.equal(first[1].values, other[1].values)
