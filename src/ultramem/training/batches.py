"""Training batches from the token files of one source or of a mixture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from olmo_core.data import DataCollator, NumpyDataLoaderConfig, NumpyFSLDataset, TokenizerConfig
from olmo_core.data.composable import ComposableDataLoaderConfig, InstanceSource, MixingInstanceSource
from olmo_core.data.composable.instance_source import Instance
from olmo_core.data.data_loader import TextDataLoaderBase

from ultramem.data.manifest import DataManifest, MixtureSource
from ultramem.errors import DataError
from ultramem.training.config import RunConfig

DTYPES = {"uint16": np.uint16, "uint32": np.uint32}


def build_data_loader(config: RunConfig, manifest: DataManifest) -> TextDataLoaderBase:
    """OLMo-core's loader over the training split: shuffled by the run's seed, resumable at any batch.

    Each file is cut into sequences of ``data.sequence_length_tokens``; a file's tail is left out. The order is a
    function of the seed and the data alone: with n processes each reads every n-th sequence of a batch.

    Raises:
        DataError: the split holds less than one batch (OLMo-core would loop over empty epochs for ever), or a source of
            a mixture less than one sequence.
    """
    if manifest.mixture:
        return _build_mixture_loader(config, manifest)
    dataset = _open_dataset(manifest.splits["train"].files, config, manifest)
    _check_size(len(dataset), config, f"the training split of '{manifest.folder}'")
    return NumpyDataLoaderConfig(
        global_batch_size=config.global_batch_tokens,
        seed=config.run.seed,
        work_dir=str(_work_dir(config)),
        # Reading a memory map is quick; OLMo-core's reader threads would outlive the run.
        num_threads=0,
    ).build(dataset, collator=_collator(manifest))


def _build_mixture_loader(config: RunConfig, manifest: DataManifest) -> TextDataLoaderBase:
    """One pass of ``data.mixture_tokens``: from every source its share of whole sequences, shuffled together.

    A source with fewer sequences than its share is read several times, each sequence equally often but for one; from a
    larger one a random part is taken, without repetition.
    """
    length = config.data.sequence_length_tokens
    mixture_tokens = config.data.mixture_tokens
    assert mixture_tokens is not None
    sources = [_Sequences(source, config, manifest) for source in manifest.mixture]
    # Each source's share is rounded down to whole sequences: with one more each, the pass holds all that was asked for.
    num_sequences = -(-mixture_tokens // length) + len(sources)
    _check_size(num_sequences - len(sources), config, f"a mixture of {mixture_tokens:,} tokens ('data.mixture_tokens')")
    specs = []
    for sequences, source in zip(sources, manifest.mixture, strict=True):
        if source.weight * num_sequences < 1:
            raise DataError(
                f"the weight of '{source.name}' ({source.weight:.2g}) gives it less than one of the {num_sequences} "
                f"sequences of {length} tokens: raise its weight or leave it out"
            )
        passes = source.weight * num_sequences / len(sequences)
        specs.append(
            # One more than is needed: it is a limit, and the weights decide.
            MixingInstanceSource.Spec(sequences, source.weight, max_repetition_factor=passes + 1, label=source.name)
        )
    mixed = MixingInstanceSource(*specs, work_dir=_work_dir(config), seed=config.run.seed, num_instances=num_sequences)
    return ComposableDataLoaderConfig(
        tokenizer=TokenizerConfig(
            vocab_size=manifest.vocab_size, eos_token_id=manifest.eos_token_id, pad_token_id=manifest.pad_token_id
        ),
        global_batch_size=config.global_batch_tokens,
        seed=config.run.seed,
        work_dir=str(_work_dir(config)),
        num_threads=0,
        display_source_visualization=False,
    ).build(mixed, collator=_collator(manifest))


class _Collator(DataCollator):
    """OLMo-core's, with an error for the user where a file holds what is no token."""

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        """Stacks sequences to a batch."""
        try:
            return super().__call__(items)
        except ValueError as error:
            raise DataError(
                f"a batch holds ids outside of the vocabulary of {self.vocab_size} tokens: a token file is damaged or "
                f"was made with another tokenizer, or 'data.dtype' is not its type ({error})"
            ) from error


def _collator(manifest: DataManifest) -> DataCollator:
    return _Collator(pad_token_id=manifest.pad_token_id, vocab_size=manifest.vocab_size)


class _Sequences(InstanceSource):
    """The sequences of one source's files, as an ingredient of a mixture.

    Its fingerprint is that of the content. OLMo-core's own source of token files hashes their paths: a data folder that
    was moved would not resume.
    """

    def __init__(self, source: MixtureSource, config: RunConfig, manifest: DataManifest) -> None:
        length = config.data.sequence_length_tokens
        super().__init__(work_dir=_work_dir(config), sequence_length=length, label=source.name)
        self._content = source.fingerprint
        self._dataset = _open_dataset(source.files, config, manifest)
        if not len(self._dataset):
            raise DataError(
                f"the source '{source.name}' holds no sequence of {length} tokens: lower 'data.sequence_length_tokens' "
                "or leave the source out"
            )

    @property
    def fingerprint(self) -> str:
        """Identity of the sequences."""
        return f"{self._content}-{self.sequence_length}"

    @property
    def num_tokens(self) -> int:
        """Tokens in whole sequences."""
        return len(self._dataset) * self.sequence_length

    def children(self) -> list[InstanceSource]:
        """None: it reads files."""
        return []

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, idx: int) -> Instance:
        return {"input_ids": self._dataset[self.validate_index(idx)]["input_ids"]}


def _open_dataset(files: tuple[Path, ...], config: RunConfig, manifest: DataManifest) -> NumpyFSLDataset:
    return NumpyFSLDataset(
        *map(str, files),
        sequence_length=config.data.sequence_length_tokens,
        pad_token_id=manifest.pad_token_id,
        eos_token_id=manifest.eos_token_id,
        vocab_size=manifest.vocab_size,
        dtype=DTYPES[manifest.dtype],
        include_instance_metadata=False,
    )


def _check_size(num_sequences: int, config: RunConfig, what: str) -> None:
    if num_sequences < config.training.global_batch_sequences:
        raise DataError(
            f"{what} has {num_sequences} sequences of {config.data.sequence_length_tokens} tokens, fewer than one "
            f"batch of {config.training.global_batch_sequences}: lower 'training.global_batch_sequences' or "
            "'data.sequence_length_tokens', or prepare more text"
        )


def _work_dir(config: RunConfig) -> Path:
    return config.save_folder / "data_order"
