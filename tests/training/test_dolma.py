"""What `dolma tokens` writes trains unchanged; dolma needs older packages and lives in an environment of its own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tiny_sources import write_config
from tiny_training import metrics_lines
from ultramem.data.sources import expand_patterns
from ultramem.training.batches import build_data_loader
from ultramem.training.run import resolve_config, train

# The last two only spare pip a search through hundreds of versions for the ones that dolma's s3fs asks for.
PACKAGES = ("dolma==1.2.1", "aiobotocore==2.5.4", "boto3==1.28.17")


@pytest.fixture(scope="module")
def dolma(tmp_path_factory) -> Path:
    """The command, freshly installed. A registry that cannot be reached or an install that fails is a failure."""
    folder = tmp_path_factory.mktemp("dolma")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    result = subprocess.run([*pip, "install", "--quiet", "--no-compile", *PACKAGES], capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(PACKAGES)} could not be installed from the registry:\n{result.stderr}"
    return folder / "bin" / "dolma"


def write_documents(folder: Path, num_words: int) -> list[list[int]]:
    """40 documents in a .jsonl file, and a bare tokenizer file that knows their words; returns their token ids."""
    folder.mkdir(parents=True)
    vocabulary = {"<eos>": 0, "<pad>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, num_words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, num_words, 20 + i).tolist() for i in range(40)]
    with (folder / "documents.jsonl").open("w") as file:
        for i, ids in enumerate(documents):
            text = " ".join(f"w{token}" for token in ids)
            file.write(json.dumps({"id": str(i), "text": text, "source": "tiny"}) + "\n")
    return documents


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "num_words"), [("uint16", 300), ("uint32", 70_000)])
def test_dolma_tokens_trains_unchanged(dolma, tmp_path, dtype, num_words):
    documents = write_documents(tmp_path / "text", num_words)
    command = [str(dolma), "tokens", "--documents", str(tmp_path / "text" / "documents.jsonl")]
    command += ["--destination", str(tmp_path / "tokens"), "--dtype", dtype, "--seed", "0", "--processes", "1"]
    command += ["--tokenizer.name_or_path", str(tmp_path / "text" / "tokenizer.json")]
    command += ["--tokenizer.eos_token_id", "0", "--tokenizer.pad_token_id", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    files = expand_patterns([str(tmp_path / "tokens" / "part-*.npy")])
    tokens = np.concatenate([np.fromfile(file, np.dtype(dtype).newbyteorder("<")) for file in files]).tolist()
    ends = [i + 1 for i, token in enumerate(tokens) if token == 0]
    written = [tokens[start : end - 1] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    assert sorted(written) == sorted(documents)

    data = {
        "files": [str(tmp_path / "tokens" / "part-*.npy")],
        "tokenizer": str(tmp_path / "text" / "tokenizer.json"),
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    path = write_config(tmp_path / "c.yaml", data, tmp_path / "run", training={"max_steps": 2})
    config, manifest = resolve_config(path)
    assert (manifest.dtype, manifest.vocab_size) == (dtype, num_words)
    loader = build_data_loader(config, manifest)
    loader.reshuffle(1)
    batch = next(iter(loader))["input_ids"]
    sequences = {tuple(tokens[i : i + 32]) for i in range(0, len(tokens) - 31, 32)}
    assert {tuple(sequence) for sequence in batch.tolist()} <= sequences
    assert train(config, manifest).name == "step2-hf"
    assert [line["step"] for line in metrics_lines(tmp_path / "run")] == [1, 2]
