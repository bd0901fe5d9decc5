"""Training batches from the token files of a data folder."""

import numpy as np
from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDataset
from olmo_core.data.data_loader import NumpyDataLoaderBase

from ultramem.data.manifest import DataManifest
from ultramem.errors import DataError
from ultramem.training.config import RunConfig

DTYPES = {"uint16": np.uint16, "uint32": np.uint32}


def build_data_loader(config: RunConfig, manifest: DataManifest) -> NumpyDataLoaderBase:
    """OLMo-core's loader over the training split: shuffled by the run's seed, resumable at any batch.

    Each file is cut into sequences of ``data.sequence_length_tokens``; a file's tail is left out.

    Raises:
        DataError: the split holds less than one batch (OLMo-core would loop over empty epochs for ever).
    """
    dataset = NumpyFSLDataset(
        *map(str, manifest.splits["train"].files),
        sequence_length=config.data.sequence_length_tokens,
        pad_token_id=manifest.pad_token_id,
        eos_token_id=manifest.eos_token_id,
        vocab_size=manifest.vocab_size,
        dtype=DTYPES[manifest.dtype],
        include_instance_metadata=False,
    )
    if len(dataset) < config.training.global_batch_sequences:
        raise DataError(
            f"the training split of '{manifest.folder}' has {len(dataset)} sequences of "
            f"{config.data.sequence_length_tokens} tokens, fewer than one batch of "
            f"{config.training.global_batch_sequences}: lower 'training.global_batch_sequences' or "
            "'data.sequence_length_tokens', or prepare more text"
        )
    return NumpyDataLoaderConfig(
        global_batch_size=config.global_batch_tokens,
        seed=config.run.seed,
        work_dir=str(config.save_folder / "data_order"),
        # Reading a memory map is quick; OLMo-core's reader threads would outlive the run.
        num_threads=0,
    ).build(dataset)
