"""A tiny data folder in the layout that ``ultramem data prepare`` writes, and configs of tiny runs on it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 64


def write_data_folder(folder: Path, num_train_tokens: int = 4096, num_validation_tokens: int = 200) -> Path:
    """Two training files and one validation file of a second-order pattern with noise, which a model can learn."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, sizes in (("train", [num_train_tokens // 2] * 2), ("validation", [num_validation_tokens])):
        (folder / split).mkdir(parents=True)
        files = []
        for i, size in enumerate(sizes):
            tokens = (np.arange(size) * 7 + rng.integers(0, 2, size)) % (VOCAB_SIZE - 2) + 2
            tokens[63::64] = 0
            name = f"{split}/part-{i:05d}.npy"
            tokens.astype("<u2").tofile(folder / name)
            files.append(name)
        num_tokens = sum(sizes)
        splits[split] = {"num_tokens": num_tokens, "num_bytes": 4 * num_tokens, "num_documents": 1, "files": files}
    vocabulary = {"<eos>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<pad>")), eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    manifest = {
        "format": 1,
        "fingerprint": f"tiny-{num_train_tokens}",
        "dtype": "uint16",
        "vocab_size": VOCAB_SIZE,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "sources": ["synthetic"],
        "seed": 0,
        "splits": splits,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_folder(tmp_path_factory.mktemp("data"))


def tiny_settings(data_folder: Path, save_folder: Path) -> dict[str, Any]:
    """Settings of a memory model with every random element on: 12 steps, some 20 thousand parameters."""
    return {
        "run": {"save_folder": str(save_folder), "seed": 3},
        "model": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "attention_dropout": 0.1,
            "memory": {
                "num_keys": 8,
                "key_dim": 8,
                "value_dim": 8,
                "pre_value_dim": 8,
                "top_k": 4,
                "share_ratio": 0.75,
                "key_balance_weight": 0.01,
                "tucker_penalty_weight": 0.01,
                "output_dropout": 0.1,
            },
        },
        "data": {"folder": str(data_folder), "sequence_length_tokens": 32},
        "optimizer": {"lr": 0.003},
        "schedule": {"warmup_fraction": 0.25},
        "training": {
            "max_steps": 12,
            "global_batch_sequences": 4,
            "micro_batch_sequences": 2,
            "precision": "fp32",
        },
        "validation": {"interval_steps": 5},
        "checkpoint": {"interval_steps": 4, "keep": 2},
        "logging": {"interval_steps": 1, "memory_interval_steps": 4},
    }


@pytest.fixture
def config_path(data_folder: Path, tmp_path: Path) -> Path:
    """A YAML file of the tiny run in a folder of its own."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(data_folder, tmp_path / "run")))
    return path
