"""A tiny data folder in the layout of ``ultramem data prepare``, settings of tiny runs on it, and ways to run them."""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ultramem.cli.train import train

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
        splits[split]["file_tokens"] = sizes
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
                "tables": "ring",
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


def start_training(config_path: Path, *overrides: str) -> multiprocessing.Process:
    """Runs ``ultramem train`` in a child of a server process that has imported everything."""
    return start_process(train_quietly, config_path, list(overrides))


def start_process(function: Callable[..., object], *arguments: Any, environment: dict[str, str] | None = None) -> Any:
    """Runs a function in a child of a server process that has imported everything."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ultramem.training.run", "tiny_training"])
    # A daemon ends with the tests, also where an assertion leaves it running.
    process = context.Process(target=_call, args=(environment or {}, function, *arguments), daemon=True)
    process.start()
    return process


def _call(environment: dict[str, str], function: Callable[..., object], *arguments: Any) -> None:
    os.environ.update(environment)
    function(*arguments)


def start_processes(function: Callable[..., object], *arguments: Any, num_processes: int = 2) -> list[Any]:
    """Starts as many children with the environment that torchrun would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
    return [
        start_process(function, *arguments, environment={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num_processes)
    ]


def start_parallel_training(config_path: Path, *overrides: str) -> list[Any]:
    """Runs ``ultramem train`` in two processes that write the same log."""
    return start_processes(train_quietly, config_path, list(overrides))


def run_parallel_training(config_path: Path, *overrides: str) -> None:
    """Trains to the end in two processes."""
    for process in start_parallel_training(config_path, *overrides):
        finish_training(process, config_path)


def train_quietly(config_path: Path, overrides: list[str]) -> None:
    """Trains in this process, whose output goes to a file beside the configuration."""
    log = os.open(Path(config_path).with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    train(config_path, overrides)


def run_training(config_path: Path, *overrides: str) -> None:
    """Trains to the end in a process of its own."""
    finish_training(start_training(config_path, *overrides), config_path)


def finish_training(process: multiprocessing.Process, config_path: Path, timeout_s: float = 600) -> None:
    """Waits for a training to end well; one that hangs is killed. The limit is for hanging only, not for slowness."""
    process.join(timeout_s)
    is_hanging = process.is_alive()
    if is_hanging:
        process.kill()
        process.join()
    log = Path(config_path).with_suffix(".log")
    text = log.read_text() if log.exists() else "no output"
    assert not is_hanging, f"the training did not end within {timeout_s:g} s and was killed: {text}"
    assert process.exitcode == 0, f"the training ended with status {process.exitcode}: {text}"


def training_state(step_folder: Path, scratch: Path) -> dict[str, Any]:
    """Everything that a training state holds: weights, buffers, moments, data position, random states."""
    from olmo_core.distributed.checkpoint import unshard_checkpoint

    files = unshard_checkpoint(step_folder / "model_and_optim", scratch, save_overwrite=True, quiet=True)
    model, optim = (torch.load(file, weights_only=False) for file in files)
    trainer = torch.load(step_folder / "train" / "rank0.pt", weights_only=False)
    return {
        "model": model,
        "optim": optim,
        **{key: trainer[key] for key in ("global_step", "data_loader", "epoch", "rng")},
    }


def assert_same_state(first: Any, second: Any, path: str = "state") -> None:
    """Every tensor and number in two nested states is equal, bit for bit."""
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_same_state(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), path
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same_state(a, b, f"{path}[{i}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), f"{path}: {(first != second).sum()} of {first.numel()} elements differ"
    elif hasattr(first, "tolist"):
        assert first.tolist() == second.tolist(), path
    else:
        assert first == second, path


def metrics_lines(run_folder: Path) -> list[dict[str, float]]:
    """The lines of ``metrics.jsonl`` without what depends on the clock."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if not key.startswith("throughput/tokens per")} for line in lines]


def tiny_model(**changes: Any) -> Any:
    """The tiny run's model; ``memory=None`` makes it dense."""
    from ultramem.model import UltraMemConfig, UltraMemForCausalLM

    settings = tiny_settings(Path(), Path())["model"] | {"vocab_size": VOCAB_SIZE, "eos_token_id": 0, "pad_token_id": 1}
    torch.manual_seed(0)
    return UltraMemForCausalLM(UltraMemConfig(**settings | changes))
