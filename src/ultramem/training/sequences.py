"""Which sequences a batch holds, by their place in the order in which a run reads the data, and what is in them."""

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from olmo_core.data.composable import InstanceSource
from olmo_core.data.data_loader import DataLoaderBase, NumpyDataLoaderBase
from torch import Tensor

from ultramem.data.manifest import DataManifest
from ultramem.data.tokenizer import load_tokenizer_with_ids
from ultramem.errors import ConfigError
from ultramem.training.batches import build_data_loader
from ultramem.training.config import RunConfig


def describe_batch(loader: DataLoaderBase, config: RunConfig) -> str:
    """Where the batch that a loader gave last is in the data, over all processes, and how to look at it."""
    size = config.training.global_batch_sequences
    last = loader.batches_processed * size
    sequences = f"{last - size}-{last - 1}"
    return (
        f"the batch is sequences {sequences} in the order of epoch {loader.epoch} with seed {config.run.seed} (to read "
        f"it: `ultramem train {config.save_folder / 'config.yaml'} --show-sequences {loader.epoch}:{sequences}`)"
    )


@dataclass(frozen=True)
class TrainingSequence:
    """One sequence of the training data.

    Attributes:
        position: its place in the order of an epoch, from 0.
        source: the file and the tokens of it, or of a mixture the source.
        tokens_T: token ids, int64 [T].
    """

    position: int
    source: str
    tokens_T: Tensor


def read_sequences(
    config: RunConfig, manifest: DataManifest, epoch: int, first: int, last: int
) -> Iterator[TrainingSequence]:
    """Training sequences by their place in the order in which a run reads them.

    Args:
        config: the run.
        manifest: the data's.
        epoch: from 1.
        first: the first sequence, from 0.
        last: the last sequence, included.

    Raises:
        ConfigError: there are no such sequences.
        DataError: see :func:`build_data_loader`.
    """
    loader = build_data_loader(config, manifest)
    num_sequences = len(loader.dataset) if isinstance(loader, NumpyDataLoaderBase) else loader.total_instances
    if not (epoch >= 1 and 0 <= first <= last < num_sequences):
        raise ConfigError(
            f"there are no sequences {first}-{last} in epoch {epoch}: an epoch, from 1, has the sequences "
            f"0-{num_sequences - 1}"
        )
    loader.reshuffle(epoch)
    for position, index in enumerate(loader.get_global_indices()[first : last + 1].tolist(), start=first):
        if isinstance(loader, NumpyDataLoaderBase):
            tokens, source = loader.dataset[index]["input_ids"], _place(index, config, manifest)
        else:
            tokens, source = loader.get_instance(index)["input_ids"], _source(index, loader.sources_for_this_epoch[0])
        yield TrainingSequence(position, source, tokens)


def _source(index: int, mixture: InstanceSource) -> str:
    """Source of a sequence of a mixture, which holds one source's after the other's."""
    ends = list(accumulate(len(sampled) for sampled in mixture.children()))
    return str(mixture.children()[bisect_right(ends, index)].label)


def _place(index: int, config: RunConfig, manifest: DataManifest) -> str:
    """File and tokens of a sequence of the training split."""
    length, split = config.data.sequence_length_tokens, manifest.splits["train"]
    ends = list(accumulate(num_tokens // length for num_tokens in split.file_tokens))
    number = bisect_right(ends, index)
    first_token = (index - (ends[number - 1] if number else 0)) * length
    return f"{split.files[number]}, tokens {first_token:,}-{first_token + length - 1:,}"


def print_sequences(config: RunConfig, manifest: DataManifest, text: str) -> None:
    """Prints where sequences come from, and their text as Python writes it, on one line each.

    Args:
        config: the run.
        manifest: the data's.
        text: ``EPOCH:FIRST-LAST`` or ``EPOCH:NUMBER``.

    Raises:
        ConfigError: the text is something else, or there are no such sequences.
    """
    numbers = re.fullmatch(r"(\d+):(\d+)(?:-(\d+))?", text)
    if numbers is None:
        raise ConfigError(f"'{text}' names no sequences: give EPOCH:FIRST-LAST, e.g. 1:128-143")
    epoch, first, last = int(numbers[1]), int(numbers[2]), int(numbers[3] or numbers[2])
    tokenizer = load_tokenizer_with_ids(manifest.tokenizer_path, manifest.eos_token_id, manifest.pad_token_id)
    for sequence in read_sequences(config, manifest, epoch, first, last):
        print(f"sequence {sequence.position} ({sequence.source}): {tokenizer.decode(sequence.tokens_T.tolist())!r}")
