"""Both initialisations: the standard deviations that they draw, the scale of scores and of the output."""

import math

import pytest
import torch

from ultramem.layers import MemoryPool, RingWindow, UltraMemV2, UltraMemV2Config

MID = {"num_keys": 40, "key_dim": 48, "value_dim": 48, "pre_value_dim": 40, "top_k": 12}
MID_SIZE = {"hidden_size": 160, "num_memories": 4, "ffn_ratio": 2.5}

PUBLISHED = {
    "num_keys": 360,
    "key_dim": 192,
    "value_dim": 192,
    "pre_value_dim": 192,
    "top_k": 32,
    "tables": "ring",
    "share_ratio": 0.5,
}
PUBLISHED_SIZE = {"hidden_size": 768, "num_memories": 20, "ffn_ratio": 2496 / 768}

# Enough rows that two slots of a token rarely meet; the published pool of 2.6M would not fit beside other tests.
MOST_ROWS = 60_000


def build(config, hidden_size, num_memories, ffn_ratio, seed=0):
    """A layer and a pool as the decoder draws them, the pool folded onto at most `MOST_ROWS` rows."""
    torch.manual_seed(seed)
    layer = UltraMemV2(hidden_size, config, num_memories, memory_index=1)
    num_rows = min(layer.window.num_rows, MOST_ROWS)
    layer.window = RingWindow(layer.window.offset % num_rows, layer.window.size, num_rows)
    std = config.table_std(hidden_size, num_memories, ffn_ratio, float(layer.retrieval.simulate().var()))
    return layer.eval(), MemoryPool(num_rows, config.value_dim, config.pre_value_dim, std)


VARIANTS = {
    "mid": (MID, MID_SIZE),
    "published": (PUBLISHED, PUBLISHED_SIZE),
    "shared": ({**MID, "tables": "ring", "share_ratio": 0.6}, MID_SIZE),
    "heads": ({**MID, "num_heads": 2}, MID_SIZE),
    "one_core": ({**MID, "num_cores": 1}, MID_SIZE),
    "four_cores": ({**MID, "num_cores": 4, "rank": 3}, MID_SIZE),
    "query_per_rank": ({**MID, "query_per_rank": True}, MID_SIZE),
    "no_pre_values": ({**MID, "pre_value_dim": 0}, MID_SIZE),
    "projected": ({**MID, "key_expansion": 2, "projection": "project"}, MID_SIZE),
    "summed": ({**MID, "key_expansion": 2}, MID_SIZE),
    "signed": ({**MID, "search": "signed"}, MID_SIZE),
    "exact": ({**MID, "search": "exact"}, MID_SIZE),
    "wide_top_k": ({**MID, "top_k": 60, "coarse_top_k": 16}, MID_SIZE),
}


@pytest.mark.parametrize(("settings", "sizes"), VARIANTS.values(), ids=VARIANTS)
def test_paper_scheme_meets_its_targets(settings, sizes):
    """Mean selected score within 10 % of 1 and output standard deviation within 1.5 of √(0.032·κ/L)."""
    layer, pool = build(UltraMemV2Config(**settings), **sizes)
    x = torch.randn(1500, sizes["hidden_size"], generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        scores = layer.retrieval(x).scores_NHKC
        output = layer(x, pool).output
    assert scores.mean().item() == pytest.approx(1, abs=0.1)
    # Per core, too: cores are drawn alike, and no core's share is fixed by the gains.
    assert scores.mean((0, 1, 2)).min().item() > 0.3
    target = math.sqrt(0.032 * sizes["ffn_ratio"] / sizes["num_memories"])
    assert target / 1.5 < output.std().item() < target * 1.5
    assert output.mean().abs().item() < 0.2 * target


def test_paper_scheme_draws_the_published_standard_deviations():
    layer, _ = build(UltraMemV2Config(**MID), **MID_SIZE)
    for linear in (layer.retrieval.query_proj, layer.pre_proj, layer.out_proj):
        assert linear.bias is None
        assert linear.weight.std().item() == pytest.approx(math.sqrt(2 / (5 * 160)), rel=0.03)
    assert layer.retrieval.keys.std().item() == pytest.approx(48**-0.5, rel=0.03)
    assert_uniform_cores(UltraMemV2Config(**MID))
    gains = torch.cat([layer.retrieval.query_norm, layer.retrieval.key_norm])
    assert (gains == gains[0]).all()


def test_released_scheme_draws_the_released_standard_deviations():
    config = UltraMemV2Config(**{**MID, "init": "released", "key_expansion": 2, "projection": "project"})
    layer, pool = build(config, **MID_SIZE)
    for tensor, std in (
        (layer.retrieval.query_proj.weight, 48**-0.5),
        (layer.retrieval.keys, 48**-0.5),
        (layer.out_proj.weight, (4 * 48) ** -0.5),
        (layer.pre_proj.weight, 160**-0.5),
        (pool.values, 0.02),
        (pool.pre_values, 0.02),
    ):
        assert tensor.mean().item() == pytest.approx(0, abs=0.1 * std)
        assert tensor.std().item() == pytest.approx(std, rel=0.03)
    assert_uniform_cores(config)
    for gain in (layer.retrieval.query_norm, layer.retrieval.key_norm):
        assert gain.tolist() == pytest.approx([48**-0.4] * 48)


def assert_uniform_cores(config):
    cores = torch.cat([build(config, **MID_SIZE, seed=seed)[0].retrieval.cores.flatten() for seed in range(12)])
    assert 0 <= cores.min() < 0.1
    assert 0.9 < cores.max() < 1
    assert cores.mean().item() == pytest.approx(0.5, abs=0.1)
    assert cores.std().item() == pytest.approx(12**-0.5, rel=0.2)


def test_table_std_by_hand():
    """σ⁴ = 0.2·κ·D / (k·H·(1+σ_s²)·U·V·L); without pre-values W_pre and U drop out: 0.08·κ·D / (k·H·(1+σ_s²)·V·L)."""
    config = UltraMemV2Config(num_keys=40, value_dim=8, pre_value_dim=4, top_k=3, num_heads=2)
    assert config.table_std(100, 5, 3.0, 0.5) ** 4 == pytest.approx(0.2 * 3 * 100 / (6 * 1.5 * 32 * 5))
    bare = UltraMemV2Config(num_keys=40, value_dim=8, pre_value_dim=0, top_k=3, num_heads=2)
    assert bare.table_std(100, 5, 3.0, 0.5) ** 2 == pytest.approx(0.08 * 3 * 100 / (6 * 1.5 * 8 * 5))
    released = UltraMemV2Config(num_keys=40, init="released")
    assert released.table_std(100, 5, 3.0, 0.5) == 0.02


@pytest.mark.parametrize("num_keys", [1, 2, 4])
def test_selecting_the_whole_grid_leaves_scores_in_bounds(num_keys):
    """Their mean is about zero whatever the gain."""
    for seed in range(5):
        config = UltraMemV2Config(**{**MID, "num_keys": num_keys, "top_k": num_keys**2})
        torch.manual_seed(seed)
        layer = UltraMemV2(160, config, 1)
        assert 0.1 < layer.retrieval.simulate().square().mean().sqrt().item() < 15


def test_simulating_is_repeatable_and_leaves_the_ambient_generator_alone():
    layer, _ = build(UltraMemV2Config(**MID), **MID_SIZE)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = layer.retrieval.simulate()
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, layer.retrieval.simulate())
    assert not torch.equal(first, layer.retrieval.simulate(seed=1))


def test_gains_that_bring_scores_to_one_are_found_whatever_the_gains_were():
    """Scores are of degree four in a common gain of both norms."""
    layer, _ = build(UltraMemV2Config(**MID), **MID_SIZE)
    unit = layer.retrieval.simulate(gains=1.0)
    torch.testing.assert_close(layer.retrieval.simulate(gains=2.0), 16 * unit, rtol=1e-3, atol=1e-3)
