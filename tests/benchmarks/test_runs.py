"""The benchmarks from end to end at tiny sizes: who competes, on what, and what is reported."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from tolerances import assert_close
from ultramem.benchmarks import memory_layers, operators, training_step
from ultramem.benchmarks.compiling import compiled
from ultramem.benchmarks.decoding import DecodeSizes, run_decoding
from ultramem.benchmarks.memory_layers import LayerSizes, run_layers
from ultramem.benchmarks.operators import EMBEDDING_BAG, REFERENCE_ROWS, OperatorSizes, run_operators
from ultramem.benchmarks.plain_layer import plain_ultramem_v2
from ultramem.benchmarks.report import print_report, run_benchmark
from ultramem.benchmarks.targets import (
    DENSE,
    DENSE_GRADIENTS,
    FUSED,
    MOE,
    OLMO2,
    OLMOE,
    OURS,
    PLAIN,
    REFERENCE,
    ROW_GRADIENTS,
    ROWS,
    TARGETS,
    ULTRA_MEM,
    V2,
)
from ultramem.benchmarks.training_step import TrainSizes, run_training
from ultramem.errors import BackendError, ConfigError, PeerError
from ultramem.model import UltraMemConfig
from ultramem.ops import RowGradients

ROOT = Path(__file__).parents[2]
TINY_OPERATORS = OperatorSizes(
    num_rows=300, width=8, top_k=4, num_tokens=6, scatter_rows=50, num_keys=12, growth_rows=(64, 128), growth_width=4
)
TINY_LAYERS = LayerSizes(
    hidden_size=16, num_keys=8, key_dim=8, value_dim=8, top_k=4, num_tokens=6, product_keys=8, product_tokens=4
)


def competitors(case):
    return set(case.timings) | set(case.unavailable)


@pytest.fixture
def no_peers(monkeypatch):
    def missing(name):
        raise PeerError(f"{name} is not installed: pip install 'ultramem[bench]'")

    monkeypatch.setattr("ultramem.benchmarks.peers.load_peer", missing)


@pytest.mark.parametrize(("dtype", "element_bytes"), [("fp32", 4), ("bf16", 2)])
def test_operators(dtype, element_bytes, monkeypatch):
    monkeypatch.setattr(operators, "SINGLE_TOKEN_CALLS", 3)
    sizes = replace(TINY_OPERATORS, dtype=dtype)
    cases = {case.name: case for case in run_operators(sizes, 7, use_compile=False)}
    lookups = {OURS, FUSED, REFERENCE, PLAIN}
    assert {name: competitors(case) for name, case in cases.items()} == {
        "lookup, 6 tokens": lookups,
        "lookup, 1 token": lookups,
        "bag": {OURS, EMBEDDING_BAG, PLAIN},
        "lookup, forward + backward": {OURS, ROWS, REFERENCE, REFERENCE_ROWS, PLAIN},
        "scatter": {OURS, REFERENCE, "index_add_"},
        "scatter, rows": {OURS, REFERENCE, "sparse_coo_tensor.coalesce"},
        "product_topk": {OURS, REFERENCE},
        "growth": {"64 rows", "128 rows"},
    }
    assert cases["lookup, 6 tokens"].bytes_read == 6 * 4 * (8 + 8) * element_bytes
    assert cases["bag"].bytes_read == 6 * 4 * 8 * element_bytes
    assert not any(case.unavailable for case in cases.values())
    assert [name for name, case in cases.items() if dtype not in case.sizes] == ["product_topk"] * (dtype == "bf16")
    assert not any(case.at_target_sizes for case in cases.values())
    assert all(len(timing.seconds) == 7 for case in cases.values() for timing in case.timings.values())


@pytest.mark.parametrize("dtype", operators.DTYPES)
def test_every_way_to_look_up_gives_the_same_gradients(dtype, monkeypatch):
    """They stay behind where a run left them: on the tables, or in collectors."""
    sizes, collectors, found = replace(TINY_OPERATORS, dtype=dtype), [], {}
    tables, idx_NK = operators._tables(sizes, sizes.scatter_rows), torch.randperm(sizes.scatter_rows)[:24].view(6, 4)
    monkeypatch.setattr(operators, "_tables", lambda *_: tables)
    monkeypatch.setattr(operators._Draws, "indices", lambda _: [idx_NK])
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    monkeypatch.setattr(
        operators, "RowGradients", lambda *sizes: collectors.append(RowGradients(*sizes)) or collectors[-1]
    )
    for name, build in operators._lookup_gradients(sizes, use_compile=False).items():
        collectors.clear()
        build().prepare()()
        assert all((table.grad is None) == bool(collectors) for table in tables)
        rows = [
            torch.zeros(table.shape).index_copy(0, *each.coalesce())
            for each, table in zip(collectors, tables, strict=False)
        ]
        found[name] = rows or [table.grad.float() for table in tables]
    assert set(found) == {OURS, ROWS, REFERENCE, REFERENCE_ROWS, PLAIN}
    for name, gradients in found.items():
        for ours, theirs in zip(gradients, found[REFERENCE], strict=True):
            assert theirs.abs().max() > 0
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02, msg=name)


def test_the_names_of_the_targets_are_those_of_the_cases():
    sizes = OperatorSizes()
    assert f"lookup, {sizes.num_tokens:,} tokens" in {target.case for target in TARGETS}
    growth = next(target for target in TARGETS if target.case == "growth")
    assert (growth.against, growth.ours) == tuple(f"{count:,} rows" for count in sizes.growth_rows)


@pytest.mark.usefixtures("no_peers")
def test_layers_without_the_peers():
    cases = {case.name: case for case in run_layers(TINY_LAYERS, 7, use_compile=False)}
    assert list(cases) == ["forward", "forward + backward"] + [
        f"{name} {kind}" for name in ("PEER", "PKM") for kind in ("forward", "forward + backward")
    ]
    assert competitors(cases["forward"]) == {OURS, REFERENCE, PLAIN, ULTRA_MEM}
    assert competitors(cases["forward + backward"]) == {OURS, ROWS, REFERENCE, PLAIN, ULTRA_MEM}
    assert competitors(cases["PEER forward"]) == {OURS, REFERENCE, "PEER-pytorch"}
    assert competitors(cases["PKM forward"]) == {OURS, REFERENCE, "product-key-memory"}
    assert cases["PKM forward"].unavailable == {
        "product-key-memory": "product-key-memory is not installed: pip install 'ultramem[bench]'"
    }
    assert REFERENCE in cases["forward"].timings


def test_the_pool_that_a_compiler_sees_into_reads_what_the_pool_reads():
    config = memory_layers.UltraMemV2Config(num_keys=8, key_dim=8, value_dim=8, pre_value_dim=8, top_k=4)
    layer, pool = memory_layers.UltraMemV2(16, config), memory_layers.UltraMemV2.make_pool(16, config)
    plain = memory_layers._PlainPool(pool.num_rows, 8, 8, std=None)
    plain.values, plain.pre_values = pool.values, pool.pre_values
    x = torch.randn(5, 16)
    torch.testing.assert_close(layer(x, plain).output, layer(x, pool).output)


@pytest.mark.parametrize("changes", [{}, {"num_heads": 2, "num_cores": 1, "top_k": 9, "coarse_top_k": 5, "rank": 3}])
def test_the_layer_in_plain_pytorch_is_the_layer(changes):
    settings = {"num_keys": 8, "key_dim": 8, "value_dim": 8, "pre_value_dim": 6, "top_k": 4} | changes
    config = memory_layers.UltraMemV2Config(**settings)
    layer = memory_layers.UltraMemV2(16, config, num_memories=2, memory_index=1)
    pool = memory_layers.UltraMemV2.make_pool(16, config, num_memories=2)
    x = torch.randn(3, 5, 16, requires_grad=True)
    plain, expected = plain_ultramem_v2(layer, pool, x), layer(x, pool).output
    assert_close(plain, expected)
    operands = [x, *layer.parameters(), *pool.parameters()]
    weights = torch.randn_like(expected)
    gradients = (torch.autograd.grad((output * weights).sum(), operands) for output in (plain, expected))
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs)


def test_a_compiler_that_cannot_is_reported():
    def broken(x):
        raise RuntimeError("no compiler here\nand many more lines")

    with pytest.raises(BackendError, match=r"torch\.compile cannot compile this here: .*no compiler here$"):
        compiled(broken)(torch.ones(1))


def test_only_the_first_call_of_a_compiled_function_is_guarded(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    double = compiled(lambda x: 2 * x)
    assert double(3) == 6
    monkeypatch.setattr("ultramem.benchmarks.compiling.warnings", None)
    assert double(4) == 8


def test_decoding():
    sizes = DecodeSizes("tiny", 2, (1, 3), 8)
    cases = run_decoding(sizes, 7)
    assert [case.name for case in cases] == ["batch 1", "batch 3"]
    for case in cases:
        assert set(case.timings) == {V2, DENSE, MOE, OLMO2, OLMOE}
        assert not case.at_target_sizes
        read = case.facts["bytes_read_by"]
        assert read[V2]["num_rows"] > 0
        assert read[MOE]["num_experts"] > 0
        assert read[OLMO2]["bytes_read"] == read[DENSE]["bytes_read"]
        assert [model["name"] for model in case.facts["models"]] == [V2, DENSE, MOE]
    assert "KV length 8" in cases[0].sizes


def test_a_training_step_changes_the_weights():
    (case,) = run_training(TrainSizes(2, 8), 7)
    assert set(case.timings) == {DENSE_GRADIENTS, ROW_GRADIENTS, training_step.REFERENCE_STEP, DENSE}
    assert case.num_tokens == 16
    for table_gradients in ("dense", "rows"):
        config = UltraMemConfig(**training_step.DEMO_MEMORY)
        step = training_step._step(config, TrainSizes(2, 8), table_gradients, "reference")
        timed = step.prepare()
        cells = dict(zip(timed.__code__.co_freevars, (cell.cell_contents for cell in timed.__closure__), strict=True))
        before = {name: value.detach().clone() for name, value in cells["model"].named_parameters()}
        timed()
        still = [name for name, value in cells["model"].named_parameters() if torch.equal(before[name], value)]
        assert still == []


@pytest.mark.parametrize(("name", "settings"), [("demo", "DEMO_MEMORY"), ("demo_dense", "DEMO_DENSE")])
def test_the_training_models_are_the_demos(name, settings):
    config = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8"))
    assert getattr(training_step, settings) == config["model"]
    assert config["training"]["precision"] == "bf16"
    sizes = TrainSizes()
    assert sizes.num_sequences == config["training"]["global_batch_sequences"]
    assert sizes.sequence_length_tokens == config["data"]["sequence_length_tokens"]


def test_a_report_prints_and_serialises_everything():
    ticks = []
    report = run_benchmark(
        "decode",
        lambda runs, tick: run_decoding(DecodeSizes("tiny", 2, (1,), 8), runs, tick),
        7,
        1,
        ticks.append,
        bandwidth_buffer_bytes=2**16,
    )
    assert ticks[:5] == [f"batch 1: {name}" for name in (V2, DENSE, MOE, OLMO2, OLMOE)]
    numbers = json.loads(json.dumps(report.to_dict()))
    assert numbers["benchmark"] == "decode"
    assert numbers["device"]["threads"] == 1
    assert numbers["peak_read_bytes_per_s"] > 0
    (case,) = numbers["cases"]
    assert case["competitors"][V2]["num_runs"] == 7
    assert case["bytes_read_by"][V2]["bytes_read"] > 0
    assert {target["met"] for target in numbers["targets"]} == {None}
    console = Console(width=150, record=True, file=io.StringIO())
    print_report(report, console)
    text = console.export_text()
    for expected in ("threads: 1 on", "peak read bandwidth", "median of 7 runs", V2, OLMOE, "not judged: other sizes"):
        assert expected in text
    assert "batch 256" not in text


def test_too_few_runs_have_no_spread():
    with pytest.raises(ConfigError, match="--runs must be at least 7, so that median and spread mean something; got 6"):
        run_benchmark("op", lambda runs, tick: [], 6)
    with pytest.raises(ConfigError, match="--threads must be at least 1; got 0"):
        run_benchmark("op", lambda runs, tick: [], 7, 0)
