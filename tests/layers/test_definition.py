"""The layers against their definitions written out in loops, for every variant of their settings."""

import pytest
import torch

from memory_types import memory_type
from naive_memories import naive_fine_scores
from naive_operators import naive_bag, naive_product_topk
from tiny_memories import HIDDEN_SIZE, VARIANTS, memory_layer, tokens
from tolerances import assert_close
from ultramem.layers import MemoryPool

variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def assert_equals_naive(layer, pool, x):
    with torch.no_grad():
        expected, slots = memory_type(layer.config.type).naive(layer, pool, x)
        result = layer(x, pool, return_statistics=True)
    assert_close(result.output, expected)
    assert [sorted(row) for row in result.statistics["slots_NK"].tolist()] == [sorted(row) for row in slots]


@pytest.mark.parametrize("memory_index", [0, 2])
@variants
def test_output_and_slots_are_those_of_the_definition(changes, memory_index):
    layer, pool = memory_layer(memory_index=memory_index, **changes)
    assert_equals_naive(layer.eval(), pool, tokens(3))


BATCH = [name for name, changes in VARIANTS.items() if changes.get("query_norm") == "batch"]


@pytest.mark.parametrize("name", BATCH)
def test_batch_norm_takes_the_batchs_statistics_in_training(name):
    layer, pool = memory_layer(**VARIANTS[name])
    assert_equals_naive(layer.train(), pool, tokens(5))


def test_statistics_describe_the_lookup():
    layer, pool = memory_layer(num_heads=2, key_expansion=2)
    layer.eval()
    x = tokens(2, 3)
    output, losses, statistics = layer(x, pool, return_statistics=True)
    assert losses == {}
    assert set(statistics) == {"slots_NK", "scores_NK", "output_std", "singular_values"}
    retrieved = layer.retrieval(x.view(6, -1))
    virtual = layer.permutation[retrieved.slots_NHK.flatten(1)].long()
    assert torch.equal(statistics["slots_NK"], virtual)
    assert statistics["slots_NK"].dtype == torch.int64
    assert statistics["slots_NK"].max() < layer.num_slots == 4 * layer.window.size
    assert_close(statistics["scores_NK"], retrieved.scores_NHKC.mean(-1).flatten(1))
    assert statistics["output_std"].item() == pytest.approx(output.std().item(), rel=1e-5)
    expected = torch.linalg.svdvals(layer.retrieval.cores.float().sum(0))
    assert torch.equal(statistics["singular_values"], expected)
    assert not any(statistic.requires_grad for statistic in statistics.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 2},
        {"query_per_rank": True, "rank": 3},
        {"search": "signed", "coarse_top_k": 5},
        {"type": "ultramem", "num_heads": 2, "num_cores": 3},
    ],
    ids=["heads", "query_per_rank", "signed", "ultramem"],
)
def test_recall_is_the_share_of_the_exact_slots_that_were_found(changes):
    layer, pool = memory_layer(**changes)
    x, config, retrieval = tokens(5), layer.config, layer.retrieval
    with torch.no_grad():
        measured = layer(x, pool, return_statistics="recall").statistics["recall_M"]
        scores = naive_fine_scores(retrieval, x, config.rank, config.num_queries > 1)
        directions = retrieval.row_direction.double(), retrieval.col_direction.double()
        m = retrieval.coarse_top_k
        found, exact = (
            naive_product_topk(*scores, retrieval.cores, *directions, config.top_k, m, search)
            for search in (config.search, "exact")
        )
    shares = [len(set(a) & set(b)) / config.top_k for a, b in zip(found, exact, strict=True)]
    expected = torch.tensor(shares, dtype=torch.float64).view(5, config.num_heads).mean(1)
    assert 0 < expected.mean() < 1
    assert_close(measured, expected)


def test_recall_is_measured_where_asked_for_and_where_the_search_is_inexact():
    inexact, pool = memory_layer()
    assert "recall_M" not in inexact(tokens(2), pool, return_statistics=True).statistics
    for changes in ({"search": "exact"}, {"type": "pkm"}, {"type": "memory_plus"}, {"type": "peer"}):
        layer, pool = memory_layer(**changes)
        assert "recall_M" not in layer(tokens(2), pool, return_statistics="recall").statistics


def test_a_search_that_keeps_all_keys_finds_everything():
    layer, pool = memory_layer(coarse_top_k=6)
    assert layer(tokens(3), pool, return_statistics="recall").statistics["recall_M"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 2048])
def test_recall_is_measured_on_tokens_from_the_first_to_the_last(num_tokens):
    layer, pool = memory_layer()
    x = tokens(num_tokens)
    recall = layer(x, pool, return_statistics="recall").statistics["recall_M"]
    num_sampled = min(num_tokens, 64)
    places = [n * (num_tokens - 1) // max(1, num_sampled - 1) for n in range(num_sampled)]
    assert places[-1] == num_tokens - 1
    assert len(set(places)) == num_sampled
    # Positions in sequences of 32 tokens.
    assert num_tokens < 2048 or len({place % 32 for place in places}) > 16
    assert not recall.requires_grad
    for start in range(0, num_sampled, 32):
        chosen = x[places[start : start + 32]]
        alone = layer(chosen, pool, return_statistics="recall").statistics["recall_M"]
        assert torch.equal(alone, recall[start : start + 32])


def test_dropout_acts_in_training_only():
    layer, pool = memory_layer(output_dropout=0.5)
    plain, _ = memory_layer()
    x = tokens(200)
    expected = plain(x, pool).output
    assert torch.equal(layer.eval()(x, pool).output, expected)
    output = layer.train()(x, pool).output
    dropped = output == 0
    assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert_close(output[~dropped], 2 * expected[~dropped])


def test_the_permutation_is_a_seeded_bijection_of_its_own():
    layers = [memory_layer(seed=seed, memory_index=index)[0] for seed, index in ((0, 0), (5, 0), (0, 1))]
    first, other_ambient_seed, other_memory = (layer.permutation for layer in layers)
    assert first.sort().values.tolist() == list(range(layers[0].num_slots))
    assert torch.equal(first, other_ambient_seed)
    assert not torch.equal(first, other_memory)
    assert not torch.equal(first, memory_layer(memory_index=0, shuffle_seed=1)[0].permutation)


def test_the_permutation_is_the_same_on_every_process():
    """Literal values: another process, machine or day must draw these."""
    layer, _ = memory_layer(memory_index=1, shuffle_seed=4)
    assert layer.permutation.dtype == torch.int32
    assert layer.permutation[:8].tolist() == [4, 25, 19, 22, 20, 26, 29, 7]


def test_the_first_memorys_default_permutation_is_no_identity():
    layer, _ = memory_layer(memory_index=0)
    assert layer.permutation.tolist() != list(range(layer.num_slots))


def test_layers_read_rows_through_their_own_windows():
    """Zero every row but those of one memory's private share: only that memory answers."""
    x = tokens(4)
    for zeroed_except in range(3):
        for index in range(3):
            layer, pool = memory_layer(memory_index=index)
            with torch.no_grad():
                own = torch.arange(pool.num_rows) // 36 == zeroed_except
                pool.values[~own] = 0
            assert bool(layer.eval()(x, pool).output.any()) == (index == zeroed_except)


def test_a_pool_of_the_layers_settings_holds_its_rows():
    layer, pool = memory_layer()
    assert (pool.values.shape, pool.pre_values.shape) == ((108, 12), (108, 10))
    assert pool.num_rows == layer.window.num_rows
    assert isinstance(pool, MemoryPool)
    without, bare = memory_layer(pre_value_dim=0)
    assert without.pre_proj is None
    assert bare.pre_values is None


def test_printing_names_the_sizes():
    layer, _ = memory_layer()
    assert "window=36+36 of 108 rows, slots=36" in repr(layer)
    assert "keys=6, key_dim=8, rank=2, top_k=4, search=two_stage" in repr(layer)
    assert layer.hidden_size == HIDDEN_SIZE


def test_autocast_keeps_the_products_in_the_tables_precision(monkeypatch):
    """The projections round to bf16; dot products with the pre-values and the weights made of them do not."""
    layer, pool = memory_layer(dtype=torch.float32)
    x = tokens(6, dtype=torch.float32)
    read, plain = [], pool.read
    monkeypatch.setattr(pool, "read", lambda rows, *rest: (read.append((rows, plain(rows, *rest))), read[0][1])[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = layer.retrieval(x).scores_NHKC.flatten(1, 2)
        projected = layer.pre_proj(x)
        layer(x, pool)
    ((rows, pooled),) = read
    assert projected.dtype == torch.bfloat16
    pre = torch.einsum("nku,nu->nk", pool.pre_values[rows].double(), projected.double())
    assert_close(pooled, naive_bag(rows, scores * pre[..., None], pool.values.double()), torch.float32)
    assert pooled.dtype == torch.float32


def test_a_type_without_its_file_is_named():
    with pytest.raises(
        ModuleNotFoundError, match=r"'lookup' has no tests: add tests/memory_types/lookup\.py with SIZES, "
    ):
        memory_type("lookup")


def test_a_file_that_lacks_a_name_is_told(monkeypatch):
    module = memory_type("pkm")
    monkeypatch.delattr(module, "DECODER")
    monkeypatch.delattr(module, "naive")
    with pytest.raises(AttributeError, match=r"tests/memory_types/pkm\.py lacks DECODER, naive; "):
        memory_type("pkm")
