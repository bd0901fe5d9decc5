"""``ultramem plot`` from the command line, on a run of ``ultramem train`` and on made-up ones."""

import json
import os
import sys
from pathlib import Path

import pytest

from ultramem.errors import ConfigError, DataError

CONFIGS = Path(__file__).parents[2] / "configs"


def write_run(folder, **metrics):
    folder.mkdir(parents=True)
    rows = [{"step": step, "train/CE loss": 5.0 - step, "throughput/total tokens": step * 10} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row | metrics) + "\n" for row in rows))
    return folder


def test_a_trained_run_has_every_panel(invoke, data_folder, tmp_path):
    settings = [
        f"run.save_folder={tmp_path}/run",
        f"data.folder={data_folder}",
        "data.sequence_length_tokens=16",
        "model={hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2}",
        "model.memory={num_keys: 8, value_dim: 8, pre_value_dim: 8, top_k: 4, key_balance_weight: 0.01}",
        "training={max_steps: 4, global_batch_sequences: 4, precision: fp32}",
        "validation.interval_steps=2",
        "logging={interval_steps: 1, memory_interval_steps: 2, tensorboard: false}",
    ]
    trained = invoke("train", CONFIGS / "demo.yaml", *settings)
    assert trained.exit_code == 0, trained.output
    for axis in ("steps", "tokens", "flops"):
        result = invoke("plot", tmp_path / "run", "--axis", axis)
        assert result.exit_code == 0, result.output
        assert result.output == f"plots: {tmp_path}/run/plots/index.html\n"
    assert {path.stem for path in (tmp_path / "run/plots").glob("*.png")} == {
        "loss",
        "validation_bits_per_byte",
        "train_key_balance",
        "throughput",
        "learning_rate",
        "grad_norm",
        "coverage",
        "divergence",
        "top1_score",
        "mean_score",
        "output_std",
        "search_recall",
        "singular_value_1",
        "singular_value_2",
    }


def test_several_runs_are_drawn_beside_each_other(invoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a/run", "b/run", "c/other"):
        write_run(tmp_path / folder)
    assert invoke("plot", "a/run", "c/other").output == "plots: plots/index.html\n"
    assert "<h1>run · other</h1>" in Path("plots/index.html").read_text()
    invoke("plot", "a/run", "b/run", "--output", "deep/er")
    # The folders' names alone would not tell them apart.
    assert "<h1>a/run · b/run</h1>" in Path("deep/er/index.html").read_text()


def test_mistakes_are_named(invoke, tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "file").touch()
    for arguments, kind, message in (
        ((run, f"{run}/../run"), ConfigError, "A run is named twice"),
        ((tmp_path / "absent",), DataError, "absent/metrics.jsonl cannot be read as metrics"),
        ((run, "--axis", "flops"), DataError, "run has no 'throughput/total petaflops'"),
        ((run, "--output", tmp_path / "file"), ConfigError, f"cannot be written to {tmp_path}/file (File exists)"),
    ):
        error = invoke("plot", *arguments).exception
        assert isinstance(error, kind)
        assert message in str(error)
    assert "is not one of" in invoke("plot", run, "--axis", "time").output


def test_without_matplotlib_it_says_what_to_install(invoke, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("ultramem.evaluation.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("matplotlib", "matplotlib.axes"):
        monkeypatch.setitem(sys.modules, name, None)
    error = invoke("plot", write_run(tmp_path / "run")).exception
    assert isinstance(error, ConfigError)
    assert str(error) == "drawing needs the package matplotlib: pip install 'ultramem[train]'"


@pytest.mark.parametrize("name", ["index.html", "loss.png"])
def test_a_plot_that_cannot_be_replaced_is_an_error_for_the_user(invoke, tmp_path, name):
    run = write_run(tmp_path / "run")
    os.makedirs(run / "plots" / name)
    error = invoke("plot", run).exception
    assert isinstance(error, ConfigError)
    assert "(Is a directory): name another folder with --output" in str(error)
