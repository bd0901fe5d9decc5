"""The GPU benchmark: what it says without a GPU, and its whole program at tiny sizes under Triton's interpreter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def run_benchmark(*arguments, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_operators.py", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_without_a_gpu_it_says_what_is_missing():
    result = run_benchmark()
    assert result.returncode == 2
    assert result.stderr.startswith("This benchmark needs a CUDA device, and PyTorch finds none here.")
    assert "Traceback" not in result.stderr


def test_cpu_tensors_need_the_interpreter():
    result = run_benchmark("--device", "cpu", "--tiny")
    assert result.returncode == 2
    assert "TRITON_INTERPRET=1 set before python starts" in result.stderr


def test_tiny_sizes_run_through_the_interpreter(tmp_path):
    path = tmp_path / "figures.json"
    result = run_benchmark("--device", "cpu", "--tiny", "--runs", "1", "--json", path, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    compared = re.search(r"parity: (\d+) of (\d+) comparisons with the references agree", result.stdout)
    assert compared[1] == compared[2] == "9"
    figures = json.loads(path.read_text())
    assert figures["torch"] == torch.__version__
    rows = {row["operator"]: row for row in figures["measurements"]}
    assert rows.keys() == {
        "gather_dot", "bag", "bag, 2 cores", "embedding_bag", "scatter to rows, sorted", "scatter, atomic",
        "scatter, reference", "product_topk", "product_topk, reference",
    }  # fmt: skip
    # 6 slots of one row of 8 bf16 each, their indices and weights, and 3 tokens of 8 bf16.
    assert rows["bag"]["bytes_moved"] == 6 * 8 * 2 + 6 * 8 + 6 * 2 + 3 * 8 * 2
    assert rows["bag"]["peer_ratio"] == rows["embedding_bag"]["median_s"] / rows["bag"]["median_s"]
    for name, row in rows.items():
        assert name in result.stdout
        assert len(row["times_s"]) == 1
        assert row["of_copy"] == row["bytes_per_s"] / figures["copy_bytes_per_s"]
