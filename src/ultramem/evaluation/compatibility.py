"""Whether a data folder can be used with a checkpoint: its splits, and one vocabulary on both sides."""

from pathlib import Path

from ultramem.data.manifest import DataManifest, DataSplit
from ultramem.data.tokenizer import stored_vocabulary
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
    of_data = manifest.tokenizer_path
    files = (model_folder / "tokenizer.json", of_data / "tokenizer.json" if of_data.is_dir() else of_data)
    if all(file.is_file() for file in files):
        model_vocabulary, data_vocabulary = (stored_vocabulary(file) for file in files)
        if model_vocabulary != data_vocabulary:
            raise DataError(
                f"the tokens in {data} were made with another tokenizer than that of {model_folder} (their "
                f"tokenizer.json files hold different vocabularies). {remedy}"
            )
