"""Training batches and validation sequences from the token files of a data folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDataset
from olmo_core.data.data_loader import NumpyDataLoaderBase
from torch import Tensor

from ultramem.errors import ConfigError, DataError
from ultramem.training.config import RunConfig

DTYPES = {"uint16": np.uint16, "uint32": np.uint32}


def build_dataset(config: RunConfig, manifest: dict[str, Any], split: str) -> NumpyFSLDataset:
    """The token files of one split, cut into sequences of ``data.sequence_length_tokens``; a file's tail is left out.

    Raises:
        DataError: a token file is missing or has another size than the manifest says, or the split is shorter than one
            sequence.
    """
    folder = Path(config.data.folder or "")
    description = manifest["splits"][split]
    paths = [folder / name for name in description["files"]]
    item_bytes = DTYPES[manifest["dtype"]](0).itemsize
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"token file '{missing[0]}' is missing: run `ultramem data prepare` again for '{folder}'")
    num_bytes = sum(path.stat().st_size for path in paths)
    if num_bytes != description["num_tokens"] * item_bytes:
        raise DataError(
            f"the {split} files in '{folder}' hold {num_bytes // item_bytes} tokens, but manifest.json says "
            f"{description['num_tokens']}: a file was cut or changed; run `ultramem data prepare` again"
        )
    dataset = NumpyFSLDataset(
        *map(str, paths),
        sequence_length=config.data.sequence_length_tokens,
        pad_token_id=manifest["pad_token_id"],
        eos_token_id=manifest["eos_token_id"],
        vocab_size=manifest["vocab_size"],
        dtype=DTYPES[manifest["dtype"]],
        include_instance_metadata=False,
    )
    if len(dataset) == 0:
        raise DataError(
            f"the {split} split of '{folder}' has {description['num_tokens']} tokens, fewer than one sequence of "
            f"{config.data.sequence_length_tokens}: lower 'data.sequence_length_tokens' or prepare more text"
        )
    return dataset


def build_data_loader(config: RunConfig, manifest: dict[str, Any]) -> NumpyDataLoaderBase:
    """OLMo-core's loader over the training split: shuffled by the run's seed, resumable at any batch.

    Raises:
        ConfigError: the split holds less than one batch (OLMo-core would loop over empty epochs for ever).
    """
    dataset = build_dataset(config, manifest, "train")
    if len(dataset) < config.training.global_batch_sequences:
        raise ConfigError(
            f"'training.global_batch_sequences' is {config.training.global_batch_sequences}, but the training split "
            f"has only {len(dataset)} sequences of {config.data.sequence_length_tokens} tokens: lower it or prepare "
            "more text"
        )
    return NumpyDataLoaderConfig(
        global_batch_size=config.global_batch_tokens,
        seed=config.run.seed,
        work_dir=str(config.save_folder / "data_order"),
        # Reading a memory map is quick; OLMo-core's reader threads would outlive the run.
        num_threads=0,
    ).build(dataset)


def validation_batches(
    config: RunConfig, manifest: dict[str, Any], rank: int = 0, world_size: int = 1
) -> Iterator[Tensor]:
    """Sequences of the validation split in file order, at most ``validation.tokens`` tokens, batched for the forward.

    Args:
        config: the run.
        manifest: of the data folder.
        rank: this process; it gets every ``world_size``-th sequence.
        world_size: number of processes.

    Yields:
        int64 [sequences, tokens], of at most the micro-batch's number of sequences.
    """
    dataset = build_dataset(config, manifest, "validation")
    num_sequences = len(dataset)
    if config.validation.tokens is not None:
        num_sequences = min(num_sequences, -(-config.validation.tokens // config.data.sequence_length_tokens))
    indices = range(rank, num_sequences, world_size)
    size = config.micro_batch_sequences
    for start in range(0, len(indices), size):
        yield torch.stack([dataset[i]["input_ids"].long() for i in indices[start : start + size]])
