"""Whether a data folder can be used with a checkpoint: its splits, and one vocabulary on both sides."""

import json
from pathlib import Path
from typing import Any

from ultramem.data.manifest import DataManifest, DataSplit
from ultramem.errors import DataError


def split_of(manifest: DataManifest, name: str) -> DataSplit:
    """The part of the data with this name.

    Raises:
        DataError: there is no such part.
    """
    if name not in manifest.splits:
        raise DataError(
            f"{manifest.folder} has no split '{name}', only {', '.join(sorted(manifest.splits))}: name one of these."
        )
    return manifest.splits[name]


def check_same_vocabulary(model_folder: Path, model_vocab_size: int, manifest: DataManifest) -> None:
    """Make sure that the data's token ids mean to the model what they meant to the tokenizer.

    Where both folders hold a `tokenizer.json`, its vocabulary and merges must be the same; the data's vocabulary must
    fit into the model's either way (a model may pad its own).

    Args:
        model_folder: a model folder.
        model_vocab_size: entries of the model's embedding.
        manifest: of a data folder.

    Raises:
        DataError: the vocabularies differ.
    """
    remedy = "Evaluate on data prepared with the model's tokenizer: `ultramem data prepare … --tokenizer MODEL_FOLDER`."
    data = manifest.folder
    if manifest.vocab_size > model_vocab_size:
        raise DataError(
            f"the tokens in {data} come from a vocabulary of {manifest.vocab_size}, the model in {model_folder} has "
            f"only {model_vocab_size}. {remedy}"
        )
    files = (model_folder / "tokenizer.json", manifest.tokenizer_folder / "tokenizer.json")
    if all(file.is_file() for file in files):
        of_model, of_data = (_vocabulary(file) for file in files)
        if of_model != of_data:
            raise DataError(
                f"the tokens in {data} were made with another tokenizer than that of {model_folder} (their "
                f"tokenizer.json files hold different vocabularies). {remedy}"
            )


def _vocabulary(file: Path) -> tuple[Any, ...]:
    """What decides which text a token id stands for; settings of padding and truncation do not."""
    try:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        model = tokenizer["model"]
    except (ValueError, KeyError) as error:
        raise DataError(f"{file} is not a tokenizer file ({error!r}). Copy it again.") from error
    added = {(entry["id"], entry["content"]) for entry in tokenizer.get("added_tokens", [])}
    return model.get("type"), model.get("vocab"), model.get("merges"), added
