"""Initialisation of UltraMem and the product-key family: the scale of scores and output, what the schemes draw."""

import math

import pytest
import torch

from tiny_memories import HIDDEN_SIZE, memory_config
from ultramem.layers import MEMORY_TYPES, draw_pool

HIDDEN, NUM_BLOCKS, NUM_MEMORIES = 160, 8, 3
TUCKER = {"num_keys": 40, "key_dim": 48, "value_dim": 48, "top_k": 12}
ADDITIVE = {"num_keys": 40, "key_dim": 24, "top_k": 12, "num_heads": 2}


def build(kind, seed=0, **settings):
    """The second of three memories and their pool in a decoder of eight blocks, as it draws them."""
    torch.manual_seed(seed)
    config = MEMORY_TYPES[kind].config(**settings)
    layers = [MEMORY_TYPES[kind].layer(HIDDEN, config, NUM_MEMORIES, index) for index in range(NUM_MEMORIES)]
    pool = MEMORY_TYPES[kind].layer.make_pool(HIDDEN, config, NUM_MEMORIES, draw=False)
    draw_pool(pool, layers, NUM_BLOCKS, 2.5)
    return layers[1].eval(), pool


def inputs():
    return torch.randn(1500, HIDDEN, generator=torch.Generator().manual_seed(7))


def assert_std(tensor, std):
    assert tensor.mean().item() == pytest.approx(0, abs=0.1 * std)
    assert tensor.std().item() == pytest.approx(std, rel=0.04)


ULTRAMEM = {
    "default": {},
    "no_expansion": {"key_expansion": 1},
    "expansion": {"key_expansion": 3},
    "heads": {"num_heads": 2},
    "one_core": {"num_cores": 1},
    "cores_and_ranks": {"num_cores": 4, "rank": 3},
    "query_conv": {"query_conv": 4},
    "signed": {"search": "signed"},
    "wide_top_k": {"top_k": 60, "coarse_top_k": 16},
    "shared": {"tables": "shared"},
    "ring": {"tables": "ring", "share_ratio": 0.6},
}


@pytest.mark.parametrize("changes", ULTRAMEM.values(), ids=ULTRAMEM)
def test_paper_scheme_of_ultramem_meets_its_targets(changes):
    """Mean selected score within 10 % of 1 and output standard deviation within 1.5 of √(1/(2L))."""
    layer, pool = build("ultramem", **{**TUCKER, **changes})
    x = inputs()
    with torch.no_grad():
        scores, output = layer.retrieval(x).scores_NHKC, layer(x, pool).output
    assert scores.mean().item() == pytest.approx(1, abs=0.1)
    # Cores are drawn alike, and no core's share is fixed by the gains.
    assert scores.mean((0, 1, 2)).min().item() > 0.3
    target = math.sqrt(1 / (2 * NUM_BLOCKS))
    assert target / 1.5 < output.std().item() < target * 1.5
    assert output.mean().abs().item() < 0.2 * target


def test_paper_scheme_of_ultramem_draws_the_published_standard_deviations():
    layer, pool = build("ultramem", **TUCKER, num_heads=2, key_expansion=2)
    assert_std(layer.retrieval.query_proj.weight, 48**-0.5)
    assert_std(layer.retrieval.keys, 48**-0.5)
    assert_std(layer.out_proj.weight, (4 * 48) ** -0.5)
    # E/(2·k·H·L)
    assert_std(pool.values, math.sqrt(4 / (2 * 12 * 2 * NUM_BLOCKS)))
    assert layer.retrieval.query_norm.tolist() == layer.retrieval.key_norm.tolist()


def test_released_scheme_of_ultramem():
    layer, pool = build("ultramem", **TUCKER, init="released")
    assert_std(layer.retrieval.query_proj.weight, 48**-0.5)
    assert_std(layer.out_proj.weight, (4 * 48) ** -0.5)
    assert_std(pool.values, 0.02)
    for gain in (layer.retrieval.query_norm, layer.retrieval.key_norm):
        assert gain.tolist() == pytest.approx([48**-0.33] * 48)


@pytest.mark.parametrize("taps", [1, 4])
def test_a_query_convolution_starts_as_nothing(taps):
    layer, pool = build("ultramem", **TUCKER, query_conv=taps)
    plain, _ = build("ultramem", **TUCKER)
    plain.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if "query_conv" not in name})
    x = inputs()[:20]
    with torch.no_grad():
        torch.testing.assert_close(layer(x, pool).output, plain(x, pool).output)


@pytest.mark.parametrize("kind", ["memory_plus", "pkm", "peer"])
@pytest.mark.parametrize(
    "norms",
    [{"query_norm": "rms"}, {"query_norm": "batch"}, {"key_norm": True}, {"query_norm": "rms", "key_norm": True}],
    ids=str,
)
def test_simulated_gains_bring_the_mean_selected_score_to_one(kind, norms):
    layer, _ = build(kind, **ADDITIVE, **norms, init="paper")
    retrieval = layer.retrieval
    # In training batch norm takes the batch's statistics, as the simulation did.
    retrieval.train()
    with torch.no_grad():
        assert retrieval(inputs()).scores_NHKC.mean().item() == pytest.approx(1, abs=0.1)
    gains = [gain for gain in (retrieval.query_norm, retrieval.key_norm) if gain is not None]
    assert len(gains) == len(norms)
    assert len({number for gain in gains for number in gain.tolist()}) == 1
    released, _ = build(kind, **ADDITIVE, **norms, init="released")
    for gain in (released.retrieval.query_norm, released.retrieval.key_norm):
        assert gain is None or (gain == 1).all()


@pytest.mark.parametrize("kind", ["memory_plus", "pkm", "peer"])
def test_without_norms_both_schemes_are_the_same(kind):
    ours, theirs = (build(kind, **ADDITIVE, init=init)[0].state_dict() for init in ("paper", "released"))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_batch_norm_starts_with_standard_statistics_and_moves_towards_the_batchs():
    layer, pool = build("pkm", **ADDITIVE, query_norm="batch", init="paper")
    retrieval, x = layer.retrieval, inputs()
    assert (retrieval.query_mean == 0).all()
    assert (retrieval.query_variance == 1).all()
    layer(x, pool)
    assert (retrieval.query_mean == 0).all()
    with torch.no_grad():
        query = retrieval.query_proj(x)
        layer.train()(x, pool)
        torch.testing.assert_close(retrieval.query_mean, 0.1 * query.mean(0))
        torch.testing.assert_close(retrieval.query_variance, 0.9 + 0.1 * query.var(0, correction=0))
        for _ in range(60):
            layer(x, pool)
        expected = layer(x, pool).output
        torch.testing.assert_close(layer.eval()(x, pool).output, expected, rtol=0.05, atol=0.05)


def test_one_token_has_no_statistics():
    layer, pool = build("pkm", **ADDITIVE, query_norm="batch")
    with torch.no_grad():
        expected = layer.eval()(inputs()[:1], pool).output
        assert torch.equal(layer.train()(inputs()[:1], pool).output, expected)
    assert (layer.retrieval.query_mean == 0).all()


@pytest.mark.parametrize(("kind", "value_dim"), [("memory_plus", 30), ("pkm", 30), ("pkm", None), ("peer", None)])
def test_rows_of_the_product_key_family(kind, value_dim):
    settings = {} if value_dim is None else {"value_dim": value_dim}
    layer, pool = build(kind, **ADDITIVE, **settings)
    for table in pool.parameters():
        assert_std(table, (value_dim or HIDDEN) ** -0.5)
    assert pool.values.shape[1] == (value_dim or HIDDEN)
    assert (pool.pre_values is not None) == (kind == "peer")
    bound = (2 * 24) ** -0.5
    assert layer.retrieval.keys.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert_std(layer.retrieval.keys, bound / math.sqrt(3))


def test_table_std_by_hand():
    ultramem = memory_config("ultramem", top_k=3, num_heads=2, key_expansion=3)
    assert ultramem.table_std(100, 5, 3.0, 0.5) ** 2 == pytest.approx(9 / (2 * 6 * 5))
    assert memory_config("ultramem", init="released").table_std(100, 5) == 0.02
    assert memory_config("pkm", value_dim=9).table_std(HIDDEN_SIZE) == pytest.approx(1 / 3)
    for kind in ("pkm", "peer", "memory_plus"):
        assert memory_config(kind).table_std(HIDDEN_SIZE) == pytest.approx(HIDDEN_SIZE**-0.5)
