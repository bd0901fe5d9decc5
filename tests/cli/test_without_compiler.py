"""Without a compiler everything works, more slowly, and one line says why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
VERBS = {
    "generate": ("{model}", "--prompt", "The capital", "--max-new-tokens", "6"),
    "bench": (
        *("layer", "--runs", "7", "--hidden-size", "16", "--num-keys", "40", "--tokens", "4"),
        *("--product-keys", "40", "--product-tokens", "4", "--json", "{folder}/numbers.json"),
    ),
    "train": (
        *(str(CONFIGS / "demo.yaml"), "run.save_folder={folder}/run", "data.folder={data}", "--scale", "tiny"),
        *("data.sequence_length_tokens=16", "training.max_tokens=128", "training.global_batch_sequences=4"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_without_a_compiler_there_is_one_reason_and_a_result(verb, model_folder, data_folder, tmp_path):
    """Processes of their own, in which no kernel was loaded before."""
    (tmp_path / "empty").mkdir()
    arguments = [part.format(model=model_folder, data=data_folder, folder=tmp_path) for part in VERBS[verb]]
    done = subprocess.run(
        [sys.executable, "-m", "ultramem.cli", verb, *arguments],
        env={
            **{name: value for name, value in os.environ.items() if name not in ("CXX", "ULTRAMEM_OPS")},
            "PATH": str(tmp_path / "empty"),
            "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("operators run on their plain PyTorch reference, several times slower") == 1
    assert done.stderr.count("there is no C++ compiler (c++) on the PATH; install g++") == 1
    result = {"generate": "The capital", "bench": "reference path", "train": "step2-hf"}[verb]
    assert result in done.stdout
    assert not list((tmp_path / "extensions").glob("*/"))
