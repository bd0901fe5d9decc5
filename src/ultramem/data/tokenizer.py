"""Tokenizers: loaded from a folder, a file or the hub, or trained on a corpus."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ultramem.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"

MINIMUM_TRAINED_VOCABULARY = 256 + 2
"""Every byte, the end of a text, and padding."""

# Names by which published tokenizer files call the end of a text and padding; a bare file does not say which they are.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>")
_PADDING_NAMES = (PADDING, "<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>")

_ALLOWED = "give a tokenizer folder, a tokenizer.json file, a name on the hub, or train:N (for example train:4096)"


def trained_vocabulary_size(name: str) -> int | None:
    """The N of "train:N", or None for any other name.

    Raises:
        ConfigError: N is no number, or leaves no room for the 256 bytes and the two special tokens.
    """
    if not name.startswith("train:"):
        return None
    count = name.removeprefix("train:")
    if not count.isdecimal() or int(count) < MINIMUM_TRAINED_VOCABULARY:
        raise ConfigError(
            f"tokenizer {name!r}: train:N needs a whole number N of at least {MINIMUM_TRAINED_VOCABULARY} "
            f"(256 bytes and 2 special tokens), for example train:4096"
        )
    return int(count)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text can be encoded, and decoding gives it back unchanged.

    Args:
        texts: the training texts.
        vocab_size: number of tokens, the 256 bytes and the two special tokens included.

    Returns:
        A tokenizer whose token 0 ends a text and whose token 1 is padding.

    Raises:
        DataError: the texts hold too few distinct words for so many tokens.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocab_size:
        raise DataError(
            f"tokenizer 'train:{vocab_size}': the corpus gives only {backend.get_vocab_size():,} tokens; "
            f"ask for at most that many, or give more text"
        )
    return _wrap(backend, END_OF_TEXT, PADDING)


def load_tokenizer(name: str, eos_token: str | None = None) -> PreTrainedTokenizerFast:
    """Load an existing tokenizer.

    Args:
        name: a Hugging Face tokenizer folder, a bare tokenizer.json-style file, or a name on the hub.
        eos_token: the token that ends a text; None takes the tokenizer's own.

    Returns:
        A fast tokenizer with an end-of-text and a padding token (the former, if it has no padding of its own).

    Raises:
        DataError: nothing can be loaded from there, it is no fast tokenizer, or it has no end-of-text token.
    """
    path = Path(name)
    tokenizer = _load_file(path, eos_token) if path.is_file() else _load_pretrained(name)
    vocabulary = tokenizer.get_vocab()
    if eos_token is not None:
        if eos_token not in vocabulary:
            raise DataError(f"tokenizer {name!r}: there is no token {eos_token!r}; give --eos-token one that it has")
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer {name!r} names no end-of-text token, which has to end each document; "
            f"name one of its {len(vocabulary):,} tokens with --eos-token"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerFast, declared: int | None = None) -> int:
    """Size of the embedding that a model of this tokenizer needs.

    Args:
        tokenizer: any fast tokenizer.
        declared: the size that the model will have (published models round up), or None.

    Returns:
        `declared`, or the largest token id plus one.

    Raises:
        DataError: the tokenizer has ids outside of the declared size, or above 32 bits.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    if declared is not None and size > declared:
        raise DataError(
            f"the tokenizer has {size:,} tokens and does not fit --vocab-size {declared:,}; "
            f"raise it to at least {size:,} or choose a smaller tokenizer"
        )
    if (declared or size) - 1 > np.iinfo(np.uint32).max:
        raise DataError(f"a vocabulary of {declared or size:,} tokens does not fit 32-bit token files")
    return declared or size


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian type of the token files: uint16 where every id fits, else uint32."""
    return np.dtype("<u2") if vocab_size - 1 <= np.iinfo(np.uint16).max else np.dtype("<u4")


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Iterator[list[int]]:
    """Token ids of each text, without special tokens.

    A text that spells a special token is encoded letter by letter: only `prepare` may end a document.

    Args:
        tokenizer: any fast tokenizer.
        texts: the texts.

    Yields:
        One list of ids per text, in order.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False):
            yield encoding.ids
    finally:
        backend.encode_special_tokens = False


def load_tokenizer_with_ids(path: Path, eos_token_id: int | None, pad_token_id: int | None) -> PreTrainedTokenizerFast:
    """Load a tokenizer and name its special tokens by their ids, as the command that made the token files did.

    Args:
        path: a Hugging Face tokenizer folder or a bare tokenizer.json-style file.
        eos_token_id: the token that ends a text; None takes the tokenizer's own.
        pad_token_id: the token for padding; None takes the tokenizer's own.

    Raises:
        DataError: nothing can be loaded from there, an id is not one of its tokens, or none ends a text.
    """
    if not path.exists():
        raise DataError(
            f"there is no tokenizer file or folder '{path}'; give a tokenizer folder or a tokenizer.json file"
        )
    tokenizer = _load_file(path, None) if path.is_file() else _load_pretrained(str(path))
    for key, token_id in (("eos_token", eos_token_id), ("pad_token", pad_token_id)):
        if token_id is None:
            continue
        token = tokenizer.convert_ids_to_tokens(token_id) if token_id >= 0 else None
        if token is None:
            raise DataError(
                f"the tokenizer '{path}' has no token {token_id}, given as {key}_id: its ids are 0 to "
                f"{vocabulary_size(tokenizer) - 1}"
            )
        setattr(tokenizer, key, token)
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer '{path}' does not say which token ends a document: give its id, eos_token_id")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stored_vocabulary(file: Path) -> tuple[Any, ...]:
    """What decides which text a token id stands for; settings of padding and truncation do not.

    Args:
        file: a tokenizer.json.

    Raises:
        DataError: it is none.
    """
    try:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        model = tokenizer["model"]
    except (ValueError, KeyError) as error:
        raise DataError(f"{file} is not a tokenizer file ({error!r}). Copy it again.") from error
    added = {(entry["id"], entry["content"]) for entry in tokenizer.get("added_tokens", [])}
    return model.get("type"), model.get("vocab"), model.get("merges"), added


def _wrap(backend: Tokenizer, eos_token: str | None, pad_token: str | None) -> PreTrainedTokenizerFast:
    """A transformers tokenizer that `AutoTokenizer` loads back, and that decodes without tidying blanks."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos_token, pad_token=pad_token, clean_up_tokenization_spaces=False
    )


def _load_file(path: Path, eos_token: str | None) -> PreTrainedTokenizerFast:
    """Read a bare file of the `tokenizers` library."""
    try:
        backend = Tokenizer.from_file(str(path))
    # The library raises bare exceptions.
    except Exception as error:
        raise DataError(f"tokenizer file {path} is not a tokenizer.json of the tokenizers library ({error})") from error
    names = backend.get_vocab()
    eos_token = eos_token if eos_token in names else next((name for name in _END_NAMES if name in names), None)
    return _wrap(backend, eos_token, next((name for name in _PADDING_NAMES if name in names), None))


def _load_pretrained(name: str) -> PreTrainedTokenizerFast:
    """Read a folder, or a name on the hub."""
    # Asking the hub for a mistyped path would only delay the answer.
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.endswith(".json")):
        raise DataError(f"there is no tokenizer file or folder {name!r}; {_ALLOWED}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    # transformers raises OSError, ValueError, KeyError, ImportError, … by what is missing in the folder or on the hub.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"no tokenizer could be loaded from {name!r} ({reason}); {_ALLOWED}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(
            f"tokenizer {name!r} is a {type(tokenizer).__name__}, without a fast form; give one with a tokenizer.json"
        )
    return tokenizer
