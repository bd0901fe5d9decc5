"""``ultramem bench`` and ``ultramem reproduce`` from the command line."""

import json
import sys
from functools import partial

import pytest

from ultramem.benchmarks import report
from ultramem.errors import ConfigError


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(report, "peak_read_bandwidth", partial(report.peak_read_bandwidth, buffer_bytes=2**16))
    monkeypatch.setattr(report, "run_benchmark", partial(report.run_benchmark, bandwidth_buffer_bytes=2**16))


def run(invoke, *arguments):
    result = invoke(*arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


TINY = {
    "op": ("--rows", 300, "--width", 8, "--top-k", 4, "--tokens", 6, "--growth-rows", "64,128", "--no-compile"),
    "layer": (
        *("--hidden-size", 16, "--num-keys", 40, "--tokens", 4, "--product-keys", 40, "--product-tokens", 4),
        "--no-compile",
    ),
    "decode": ("--family", "tiny", "--layers", 2, "--batch-sizes", "1, 2", "--kv-length", 4),
    "train": ("--sequences", 2, "--length", 8),
}


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_prints_a_table_and_writes_json(name, invoke, tmp_path):
    file = tmp_path / "numbers.json"
    result = run(invoke, "bench", name, *TINY[name], "--runs", 7, "--threads", 1, "--json", file)
    assert "threads: 1 on" in result.output
    assert "peak read bandwidth" in result.output
    assert "median of 7 runs" in result.output
    numbers = json.loads(file.read_text())
    assert numbers["benchmark"] == name
    for case in numbers["cases"]:
        assert case["case"] in result.output
        assert case["competitors"]
        assert all(len(timing["seconds"]) == 7 for timing in case["competitors"].values())
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
            ("bench", "decode", "--family", "huge"),
            "there is no family of models 'huge'; there are tiny, small, base, 227m.",
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
    third = run(invoke, *arguments[:-1], 2, "--output", tmp_path / "figure", "--restart")
    assert "measuring 6 points" in third.output


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
