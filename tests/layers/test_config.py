"""The settings of the memories: what they refuse and how they say it, derived sizes by hand."""

import pytest

from tiny_memories import HIDDEN_SIZE, decoder_config, memory_config
from ultramem.errors import ConfigError
from ultramem.layers import MEMORY_TYPES, UltraMemV2Config


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        *[
            ({name: 0}, rf"memory\.{name} must be at least 1; got 0")
            for name in ("num_keys", "key_dim", "value_dim", "top_k", "num_heads", "num_cores", "rank", "key_expansion")
        ],
        *[
            ({name: -1}, rf"memory\.{name} must not be negative; got -1")
            for name in ("pre_value_dim", "key_balance_weight", "tucker_penalty_weight", "tucker_penalty_margin")
        ],
        ({"key_balance_weight": float("nan")}, r"memory\.key_balance_weight must not be negative; got nan"),
        ({"value_dim": 13}, r"memory\.value_dim \(13\) must be a multiple of memory\.num_cores \(2\)"),
        ({"output_dropout": 1.0}, r"memory\.output_dropout must lie in \[0, 1\); got 1\.0"),
        ({"output_dropout": -0.1}, r"memory\.output_dropout must lie in \[0, 1\); got -0\.1"),
        ({"tables": "ring", "share_ratio": 0.0}, r"memory\.share_ratio must lie in \(0, 1\]; got 0\.0"),
        ({"tables": "ring", "share_ratio": 1.5}, r"memory\.share_ratio must lie in \(0, 1\]; got 1\.5"),
        (
            {"pre_value_activation": "gelu", "pre_value_dim": 0},
            r"memory\.pre_value_activation needs pre-values; memory\.pre_value_dim is 0",
        ),
    ],
)
def test_values_outside_what_is_allowed_are_named(changes, text):
    with pytest.raises(ConfigError, match=text):
        memory_config(**changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"tables": "ring", "share_ratio": 0.3},
            r"share_ratio 0\.3 gives .* less than its own share.*3 memories it must be at least 0\.33",
        ),
        ({"top_k": 37}, r"memory\.top_k must lie between 1 and the 36 slots of a layer; got 37"),
        ({"top_k": 5, "coarse_top_k": 2}, r"memory: top_k must lie between 1 and 4, .*coarse_top_k 2; got 5"),
        ({"coarse_top_k": 7}, r"memory: coarse_top_k must lie between 1 and the 6 keys of a side; got 7"),
        ({"coarse_top_k": 7, "search": "exact"}, r"memory: coarse_top_k must lie between 1 and the 6 keys"),
        ({"search": "signed", "top_k": 19}, r"memory: top_k must lie between 1 and 18, .*'signed'.*got 19"),
    ],
)
def test_sizes_that_do_not_fit_together_are_named(changes, text):
    with pytest.raises(ConfigError, match=text):
        memory_config(**changes).check_sizes(3)


@pytest.mark.parametrize("kind", MEMORY_TYPES)
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"share_ratio": 0.5, "tables": "private"}, r"share_ratio belongs to memory\.tables: ring.* 0\.5 .*'private'"),
        ({"share_ratio": 0.5, "tables": "shared"}, r"share_ratio belongs to memory\.tables: ring.* 0\.5 .*'shared'"),
        ({"tables": "ring"}, r"memory\.tables: ring, which needs it; got share_ratio None with tables 'ring'"),
        ({"num_heads": 0}, r"memory\.num_heads must be at least 1; got 0"),
    ],
    ids=str,
)
def test_what_no_memory_takes_is_named(kind, changes, text):
    with pytest.raises(ConfigError, match=text):
        memory_config(kind, **changes)


@pytest.mark.parametrize("kind", MEMORY_TYPES)
def test_more_slots_than_a_memory_has_are_refused(kind):
    with pytest.raises(ConfigError, match=r"memory\.top_k must lie between 1 and the .* slots of a layer; got 10000"):
        memory_config(kind, top_k=10_000).check_sizes(3)


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        ("ultramem", {"query_conv": -1}, r"memory\.query_conv must not be negative; got -1"),
        ("ultramem", {"value_dim": 13}, r"memory\.value_dim \(13\) must be a multiple of memory\.num_cores \(2\)"),
        ("ultramem", {"top_k": 5, "coarse_top_k": 2}, r"memory: top_k must lie between 1 and 4, .*coarse_top_k 2"),
        ("memory_plus", {"value_dim": 0}, r"memory\.value_dim must be at least 1; got 0"),
        ("pkm", {"value_dim": 0}, r"memory\.value_dim must be at least 1; got 0"),
    ],
    ids=str,
)
def test_what_single_types_refuse_is_named(kind, changes, text):
    with pytest.raises(ConfigError, match=text):
        memory_config(kind, **changes).check_sizes(3)


def test_values_of_another_width_need_an_output_projection():
    config = memory_config("pkm", value_dim=9, output_proj=False)
    text = r"memory\.output_proj: false needs memory\.value_dim to be the model's width 14; got 9"
    with pytest.raises(ConfigError, match=text):
        MEMORY_TYPES["pkm"].layer(HIDDEN_SIZE, config)
    with pytest.raises(ConfigError, match=r"needs memory\.value_dim to be the model's width 32; got 9"):
        decoder_config(memory={"type": "pkm", "value_dim": 9, "output_proj": False})
    assert MEMORY_TYPES["pkm"].layer(9, config).out_proj is None


def test_a_share_of_one_over_any_number_of_layers_is_allowed():
    """1/49 · 49 is less than 1 in floating point."""
    for num_memories in range(1, 200):
        memory_config(tables="ring", share_ratio=1 / num_memories).check_sizes(num_memories)


@pytest.mark.parametrize(
    ("share_ratio", "num_memories"), [(0.3333, 3), (0.333, 3), (0.1429, 7), (0.1428, 7), (0.0204, 49)]
)
def test_a_rounded_share_is_allowed_and_floors(share_ratio, num_memories):
    config = memory_config(tables="ring", share_ratio=share_ratio, num_keys=12)
    config.check_sizes(num_memories)
    assert config.window_side(num_memories) in (11, 12)


@pytest.mark.parametrize(("share_ratio", "num_memories"), [(0.33, 3), (0.142, 7), (0.1, 4)])
def test_a_share_too_small_for_rounding_is_named(share_ratio, num_memories):
    with pytest.raises(ConfigError, match=r"less than its own share .* or tables: private for exactly that share"):
        memory_config(tables="ring", share_ratio=share_ratio).check_sizes(num_memories)


def test_a_share_without_a_single_row_is_named():
    config = memory_config(tables="ring", share_ratio=0.3333, num_keys=1, top_k=1)
    with pytest.raises(ConfigError, match=r"share_ratio 0\.3333 gives a layer less than its own share"):
        config.check_sizes(3)


def test_whole_numbers_are_fractions_too():
    config = memory_config(
        tables="ring", share_ratio=1, output_dropout=0, key_balance_weight=1, tucker_penalty_margin=0
    )
    assert config.window_side(3) == 10


def test_the_default_coarse_top_k_fits_the_side():
    assert memory_config(top_k=4).resolved_coarse_top_k(3) == 4
    assert memory_config(top_k=20).resolved_coarse_top_k(3) == 6
    assert memory_config(top_k=20, coarse_top_k=5).resolved_coarse_top_k(3) == 5
    assert memory_config(top_k=20, key_expansion=2).resolved_coarse_top_k(3) == 12


def test_published_sizes_by_hand():
    """The 227M/1.2B run: 20 layers of width 768, n = 360, share 0.5, kd = V = U = 192, k = 32."""
    widths = {"key_dim": 192, "value_dim": 192, "pre_value_dim": 192}
    config = UltraMemV2Config(num_keys=360, top_k=32, tables="ring", share_ratio=0.5, **widths)
    assert config.side(20) == 1138
    keys, query, linears, small = 2 * 1138 * 192 * 2, 768 * 384, 2 * 768 * 192, 2 * 192 + 2 * 4
    assert config.dense_parameters(768, 20) == keys + query + linears + small
    assert config.table_parameters(768, 20) == 20 * 360**2 * 384
    assert config.table_elements_per_token(768) == 32 * 384
    # linears, fine scores, coarse scores, the 32 × 32 grid, the two cores' scores of 32 slots, the lookups
    macs = query + linears + keys + 2 * 1138 * 2 + 32 * 4 + 32 * 32 * 2 + 32 * 2 * 6 + 32 * 384
    assert config.flops_per_token(768, 20) == 2 * macs


def test_rows_read_by_a_batch_are_at_most_the_window_and_at_least_one_tokens():
    config = memory_config()
    row = config.value_dim + config.pre_value_dim
    assert config.table_elements_per_step(10**6, HIDDEN_SIZE, 3) == pytest.approx(36 * row)
    # Four draws from 36 rows rarely meet.
    assert 0.9 * 4 * row < config.table_elements_per_step(1, HIDDEN_SIZE, 3) < 4 * row
