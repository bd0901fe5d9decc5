"""The GPU benchmark: what it says without a GPU, and its whole program at tiny sizes under Triton's interpreter."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


SCRIPT = ROOT / "benchmarks" / "gpu_operators.py"


@pytest.fixture
def main(monkeypatch):
    """The program, as a function of its arguments."""
    specification = importlib.util.spec_from_file_location("gpu_operators", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    # Dataclasses look their module up by name.
    monkeypatch.setitem(sys.modules, "gpu_operators", module)
    specification.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu_operators.py", *arguments])
        return module.main()

    return run


def test_without_a_gpu_it_says_what_is_missing(main, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main() == 2
    assert capsys.readouterr().err.startswith("This benchmark needs a CUDA device, and PyTorch finds none here. Run it")


def test_cpu_tensors_need_the_interpreter(main, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main("--device", "cpu", "--tiny") == 2
    assert "TRITON_INTERPRET=1 set before python starts" in capsys.readouterr().err


@pytest.mark.slow
def test_tiny_sizes_run_through_the_interpreter(tmp_path):
    path = tmp_path / "figures.json"
    result = subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", "--tiny", "--runs", "1", "--json", path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    compared = re.search(r"parity: (\d+) of (\d+) comparisons with the references agree", result.stdout)
    assert compared[1] == compared[2] == "7"
    figures = json.loads(path.read_text())
    assert figures["torch"] == torch.__version__
    rows = {row["operator"]: row for row in figures["measurements"]}
    assert rows.keys() == {
        "gather_dot", "bag", "bag, 2 cores", "embedding_bag", "scatter to rows", "scatter",
        "scatter, reference", "product_topk", "product_topk, reference",
    }  # fmt: skip
    # 6 slots of one row of 8 bf16 each, their indices and weights, and 3 tokens of 8 bf16.
    assert rows["bag"]["bytes_moved"] == 6 * 8 * 2 + 6 * 8 + 6 * 2 + 3 * 8 * 2
    assert rows["bag"]["peer_ratio"] == rows["embedding_bag"]["median_s"] / rows["bag"]["median_s"]
    for name, row in rows.items():
        assert name in result.stdout
        assert len(row["times_s"]) == 1
        assert row["of_copy"] == row["bytes_per_s"] / row["copy_bytes_per_s"]
