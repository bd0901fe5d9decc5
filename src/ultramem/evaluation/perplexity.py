"""Loss of a causal language model on token files: nats per token, perplexity, bits per byte, tokens per second."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import PreTrainedModel

from ultramem.errors import DataError
from ultramem.evaluation.mode import evaluating
from ultramem.model.packing import document_positions


@dataclass(frozen=True)
class PerplexityResult:
    """What was measured on one split.

    Attributes:
        loss: mean negative log-likelihood in nats per predicted token.
        num_tokens: predicted tokens.
        bits_per_byte: bits needed per UTF-8 byte of text, `loss / ln 2 · (tokens of the split / bytes of the split)`.
            The split's tokens include the one that ends each document, so its cost is counted, and the number compares
            models with different tokenizers. With `max_tokens` the split's average bytes per token stand in for those
            of the part that was read. None if the split's bytes are not known.
        duration_s: wall-clock seconds of the evaluation.
    """

    loss: float
    num_tokens: int
    bits_per_byte: float | None
    duration_s: float

    @property
    def perplexity(self) -> float:
        """exp(loss): infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def tokens_per_s(self) -> float:
        """Predicted tokens per second of wall-clock time."""
        return self.num_tokens / self.duration_s

    def to_dict(self) -> dict[str, Any]:
        """All fields and derived numbers by name, ready for JSON."""
        return {**asdict(self), "perplexity": self.perplexity, "tokens_per_s": self.tokens_per_s}


def evaluate_perplexity(
    model: PreTrainedModel,
    token_files: Sequence[str | Path],
    *,
    token_dtype: str = "uint16",
    sequence_length_tokens: int,
    batch_size: int = 8,
    bytes_per_token: float | None = None,
    dtype: torch.dtype = torch.float32,
    max_tokens: int | None = None,
    document_end: int | None = None,
    progress: Callable[[int], None] | None = None,
    share_batches: bool = False,
) -> PerplexityResult:
    """Measure the loss on raw token files.

    Each file is cut into windows of `sequence_length_tokens` inputs; a window's last label is the next window's first
    input, so that every token but the first of each file is predicted exactly once, the last partial window included.
    A token sees its own window only; windows run across the ends of documents, as they do in training.

    Args:
        model: any causal language model of `transformers`; its mode (train or eval) is left as it was.
        token_files: headerless little-endian token ids, read through memory maps.
        token_dtype: "uint16" or "uint32", as the data's manifest says.
        sequence_length_tokens: inputs per window, at least 1.
        batch_size: windows per forward pass.
        bytes_per_token: UTF-8 bytes of the split over its tokens, for bits per byte; None if unknown.
        dtype: arithmetic of the matrix products (autocast when it is not float32); the loss is always summed in fp64
            from fp32 logits.
        max_tokens: predict only the first so many tokens; None for all.
        document_end: the token that ends a document, for a model trained with masked documents: a token then sees its
            own document only. None lets it see the whole window.
        progress: called after each batch with the number of tokens it predicted.
        share_batches: each of several processes measures every n-th batch, and all get the result of the whole. They
            call this together, and run equally many forward passes, as models need that FSDP has split.

    Returns:
        The measured loss and what follows from it.

    Raises:
        DataError: no token can be predicted, a file does not hold whole tokens, or it holds an id that the model's
            vocabulary lacks.
    """
    if sequence_length_tokens < 1 or batch_size < 1 or (max_tokens is not None and max_tokens < 1):
        raise DataError(
            f"sequence length {sequence_length_tokens}, batch size {batch_size} and maximum of tokens {max_tokens} "
            f"must each be at least 1."
        )
    with evaluating(model):
        start_s = time.perf_counter()
        loss_sum, num_tokens = 0.0, 0
        batches = iterate_windows(token_files, token_dtype, sequence_length_tokens, batch_size, max_tokens)
        share = _own_share(batches) if share_batches else ((*batch, True) for batch in batches)
        for input_ids_BT, labels_BT, counts in share:
            batch_loss = _sum_of_losses(model, input_ids_BT, labels_BT, dtype, document_end)
            if not counts:
                continue
            loss_sum += batch_loss
            num_tokens += labels_BT.numel()
            if progress is not None:
                progress(labels_BT.numel())
        if share_batches:
            loss_sum, num_tokens = _total(loss_sum, num_tokens, model.device)
        duration_s = time.perf_counter() - start_s
    if num_tokens == 0:
        names = ", ".join(str(file) for file in token_files) or "no files"
        raise DataError(f"nothing to predict in {names}: at least two tokens are needed. Prepare more text.")
    loss = loss_sum / num_tokens
    bits_per_byte = None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
    return PerplexityResult(loss, num_tokens, bits_per_byte, duration_s)


def _own_share(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
    """Every n-th batch for this one of n processes, and whether it counts.

    Where the last round has no batch left for a process, it gets one of another's that does not count.
    """
    rank, num_processes = _process()
    num_left = 0
    for index, batch in enumerate(batches):
        place = index % num_processes
        if place == 0:
            first = batch
        if place == rank:
            own = batch
        num_left = (place + 1) % num_processes
        if num_left == 0:
            yield *own, True
    if num_left:
        yield (*own, True) if rank < num_left else (*first, False)


def _total(loss_sum: float, num_tokens: int, device: torch.device) -> tuple[float, int]:
    """Sums over all processes."""
    if _process()[1] == 1:
        return loss_sum, num_tokens
    sums = torch.tensor([loss_sum, num_tokens], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return float(sums[0]), int(sums[1])


def _process() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def iterate_windows(
    token_files: Sequence[str | Path],
    token_dtype: str,
    sequence_length_tokens: int,
    batch_size: int,
    max_tokens: int | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut token files into windows; arguments as for `evaluate_perplexity`.

    Yields:
        (inputs, labels), both [B, T] int64; a shorter window at a file's end comes in a batch of its own.

    Raises:
        DataError: a file cannot be read or does not hold whole tokens.
    """
    remaining_tokens = math.inf if max_tokens is None else max_tokens
    for file in token_files:
        tokens = _open_tokens(Path(file), token_dtype)
        num_predictions = int(min(max(len(tokens) - 1, 0), remaining_tokens))
        remaining_tokens -= num_predictions
        num_windows, rest_tokens = divmod(num_predictions, sequence_length_tokens)
        for first in range(0, num_windows, batch_size):
            num_rows = min(batch_size, num_windows - first)
            yield _cut(tokens, first * sequence_length_tokens, num_rows, sequence_length_tokens)
        if rest_tokens:
            yield _cut(tokens, num_windows * sequence_length_tokens, 1, rest_tokens)


def _open_tokens(file: Path, token_dtype: str) -> np.ndarray:
    item_dtype = np.dtype(token_dtype).newbyteorder("<")
    try:
        num_bytes = file.stat().st_size
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror}). Prepare the data again: `ultramem data prepare`."
        ) from error
    if num_bytes % item_dtype.itemsize:
        raise DataError(
            f"{file} holds {num_bytes} bytes, not a multiple of the {item_dtype.itemsize} of a {token_dtype} token: it "
            f"is cut off. Prepare the data again: `ultramem data prepare`."
        )
    # An empty file cannot be mapped.
    return np.memmap(file, dtype=item_dtype, mode="r") if num_bytes else np.empty(0, item_dtype)


def _cut(tokens: np.ndarray, start: int, num_rows: int, length_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    flat = torch.from_numpy(tokens[start : start + num_rows * length_tokens + 1].astype(np.int64))
    return flat[:-1].view(num_rows, length_tokens), flat[1:].view(num_rows, length_tokens)


@torch.inference_mode()
def _sum_of_losses(
    model: PreTrainedModel,
    input_ids_BT: torch.Tensor,
    labels_BT: torch.Tensor,
    dtype: torch.dtype,
    document_end: int | None,
) -> float:
    vocab_size = model.config.vocab_size
    largest = int(max(input_ids_BT.max(), labels_BT.max()))
    if largest >= vocab_size:
        raise DataError(
            f"the data holds token {largest}, but the model's vocabulary has only {vocab_size} entries: they were made "
            f"with different tokenizers. Prepare the data with the model's tokenizer."
        )
    device = model.device
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
    inputs = {"input_ids": input_ids_BT.to(device)}
    if document_end is not None:
        inputs["position_ids"] = document_positions(inputs["input_ids"], document_end)
    with autocast:
        logits_BTW = model(**inputs, use_cache=False).logits
    labels_BT = labels_BT.to(device)
    # Row by row: a whole batch of fp32 logits is the largest tensor of the evaluation.
    losses = [
        F.cross_entropy(logits_TW.float(), labels_T, reduction="none").double().sum()
        for logits_TW, labels_T in zip(logits_BTW, labels_BT, strict=True)
    ]
    return float(torch.stack(losses).sum())
