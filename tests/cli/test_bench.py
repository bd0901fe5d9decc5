"""``ultramem bench`` and ``ultramem reproduce`` from the command line."""

import json
import sys
from dataclasses import asdict
from functools import partial

import pytest
import torch

from ultramem.benchmarks import report
from ultramem.benchmarks.cases import Case
from ultramem.benchmarks.measure import Timing
from ultramem.benchmarks.twins import ModelCost
from ultramem.errors import ConfigError


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(report, "run_benchmark", partial(report.run_benchmark, bandwidth_buffer_bytes=2**16))


def run(invoke, *arguments):
    result = invoke(*arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


VERBS = {
    "op": (
        "operators.run_operators",
        (
            "--rows",
            300,
            "--width",
            8,
            "--top-k",
            4,
            "--tokens",
            6,
            "--growth-rows",
            "64,128",
            "--dtype",
            "bf16",
            "--no-compile",
        ),
        {"num_rows": 300, "width": 8, "top_k": 4, "num_tokens": 6, "growth_rows": (64, 128), "dtype": "bf16"},
    ),
    "layer": (
        "memory_layers.run_layers",
        ("--hidden-size", 16, "--num-keys", 40, "--tokens", 4, "--product-keys", 30, "--product-tokens", 5),
        {"hidden_size": 16, "num_keys": 40, "num_tokens": 4, "product_keys": 30, "product_tokens": 5},
    ),
    "decode": (
        "decoding.run_decoding",
        ("--family", "tiny", "--layers", 2, "--batch-sizes", "1, 3", "--kv-length", 4),
        {"family": "tiny", "num_layers": 2, "batch_sizes": (1, 3), "kv_length_tokens": 4},
    ),
    "train": (
        "training_step.run_training",
        ("--sequences", 2, "--length", 8, "--fp32"),
        {"num_sequences": 2, "sequence_length_tokens": 8, "bf16": False},
    ),
}


@pytest.fixture
def measured():
    """Made-up cases in place of measurements; returns the sizes and runs that were asked for."""
    asked = []

    def stand_in(sizes, num_runs, *others, **_):
        asked.append((sizes, num_runs, torch.get_num_threads()))
        others[-1]("what runs")
        facts = {"models": [asdict(ModelCost("a model", 1000, 2000, 3000))]}
        times = {name: Timing((seconds,) * num_runs) for name, seconds in (("ours", 0.001), ("theirs", 0.004))}
        reason = {"a peer": "a peer is not installed: pip install 'ultramem[bench]'"}
        return [Case("a case", "some sizes", times, reason, bytes_read=10**6, num_tokens=5, facts=facts)]

    return asked, stand_in


@pytest.mark.parametrize("name", VERBS)
def test_a_benchmark_prints_a_table_and_writes_json(name, invoke, tmp_path, measured, monkeypatch):
    asked, stand_in = measured
    function, options, sizes = VERBS[name]
    monkeypatch.setattr(f"ultramem.benchmarks.{function}", stand_in)
    file = tmp_path / "numbers.json"
    result = run(invoke, "bench", name, *options, "--runs", 8, "--threads", 1, "--json", file)
    ((given, runs, threads),) = asked
    assert {field: getattr(given, field) for field in sizes} == sizes
    assert (runs, threads) == (8, 1)
    flat = " ".join(result.output.split())
    for expected in (
        "threads: 1 on",
        "peak read bandwidth",
        "median of 8 runs",
        "a case: some sizes",
        "1.00 – 1.00",
        "4.00",
        "5,000",
        "a model 1,000 2,000 3,000",
        "a peer: a peer is not installed: pip install 'ultramem[bench]'",
    ):
        assert expected in flat
    numbers = json.loads(file.read_text())
    assert numbers["benchmark"] == name
    (case,) = numbers["cases"]
    assert case["competitors"]["theirs"]["median_s"] == 0.004
    assert len(case["competitors"]["theirs"]["seconds"]) == 8
    assert case["competitors"]["ours"]["bytes_per_s"] == pytest.approx(1e9)
    assert case["unavailable"] == {"a peer": "a peer is not installed: pip install 'ultramem[bench]'"}
    assert all(target["met"] is None for target in numbers["targets"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "op", "--runs", 3), "--runs must be at least 7, so that median and spread mean something; got 3."),
        (("bench", "op", "--rows", 0), "--rows must be at least 1; got 0."),
        (("bench", "layer", "--threads", 0), "--threads must be at least 1; got 0."),
        (
            ("bench", "op", "--growth-rows", "5"),
            "--growth-rows takes 2 comma-separated numbers, each at least 1, for example 1,16; got '5'.",
        ),
        (
            ("bench", "decode", "--batch-sizes", "1,x"),
            "--batch-sizes takes comma-separated numbers, each at least 1, for example 1,16; got '1,x'.",
        ),
        (
            ("bench", "decode", "--device", "mars"),
            "device 'mars' cannot be used here (",
        ),
        (
            ("bench", "decode", "--family", "huge"),
            "there is no family of models 'huge'; there are tiny, small, base, 227m, 1b.",
        ),
        (("reproduce", "figure1", "--kv-length", 0), "--kv-length must be at least 1; got 0."),
        (("reproduce", "figure1", "--runs", 1), "--runs must be at least 7, so that median and spread mean something"),
    ],
)
def test_wrong_numbers_are_named(arguments, message, invoke):
    error = invoke(*arguments).exception
    assert isinstance(error, ConfigError)
    assert str(error).startswith(message)


def test_where_json_goes_is_checked_before_anything_is_measured(invoke, tmp_path):
    error = invoke("bench", "op", "--json", tmp_path / "none" / "numbers.json").exception
    assert isinstance(error, ConfigError)
    assert "there is no folder" in str(error)


def test_the_training_benchmark_names_its_extra(invoke, monkeypatch):
    monkeypatch.setitem(sys.modules, "ultramem.benchmarks.training_step", None)
    monkeypatch.delitem(sys.modules, "ultramem.benchmarks.training_step")
    monkeypatch.setitem(sys.modules, "ultramem.training.config", None)
    for name in [name for name in sys.modules if name.startswith("ultramem.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "olmo_core.config", None)
    error = invoke("bench", "train").exception
    assert isinstance(error, ConfigError)
    assert str(error) == "the training benchmark needs the package olmo_core: pip install 'ultramem[train]'"


def test_a_figure_is_measured_and_measured_again(invoke, tmp_path, monkeypatch):
    from ultramem.benchmarks import figures

    monkeypatch.setitem(figures._QUICK_SIZES, "figure1", (figures.Size("tiny", 2),))
    arguments = ("reproduce", "figure1", "--quick", "--batch-sizes", "1,2", "--kv-length", 4, "--threads", 1)
    first = run(invoke, *arguments, "--output", tmp_path / "figure")
    assert "measuring 6 points" in first.output
    assert (tmp_path / "figure/figure1.png").stat().st_size > 5000
    second = run(invoke, *arguments, "--output", tmp_path / "figure")
    assert "nothing left to measure: 6 of 6 points" in second.output
    error = invoke(*arguments[:-1], 2, "--output", tmp_path / "figure").exception
    assert isinstance(error, ConfigError)
    assert "threads 1 → 2" in str(error)
    third = run(invoke, *arguments, "--output", tmp_path / "figure", "--restart")
    assert "measuring 6 points" in third.output


def test_a_figure_names_its_extra_before_anything_is_measured(invoke, tmp_path, monkeypatch):
    for name in ("drawing", "reproduction"):
        monkeypatch.delitem(sys.modules, f"ultramem.benchmarks.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    error = invoke("reproduce", "figure1", "--quick", "--output", tmp_path / "figure").exception
    assert isinstance(error, ConfigError)
    assert str(error) == "drawing needs the package matplotlib: pip install 'ultramem[bench]'"
    assert not (tmp_path / "figure").exists()


def test_an_interrupted_figure_says_how_to_go_on(invoke, tmp_path, monkeypatch):
    from ultramem.benchmarks import figures

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(figures, "_measure", interrupt)
    monkeypatch.setitem(figures._QUICK_SIZES, "figure1", (figures.Size("tiny", 2),))
    result = invoke("reproduce", "figure1", "--quick", "--output", tmp_path)
    assert result.exit_code == 130
    assert "stopped: 0 of 9 points are in" in result.output
    assert "the same command goes on from there" in result.output
