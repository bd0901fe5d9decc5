"""Raw token files and second data folders beside the tiny one, and runs' settings that read them."""

import json
import shutil
from pathlib import Path

import numpy as np
import yaml

from tiny_training import VOCAB_SIZE, tiny_settings
from ultramem.data.sources import RawSettings


def write_raw(folder: Path, numbers, dtype="<u2", name="part-0-00000.npy") -> Path:
    """A headerless token file; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    np.asarray(numbers).astype(dtype).tofile(folder / name)
    return folder / name


def pattern_tokens(num_tokens: int, seed: int = 0) -> np.ndarray:
    """Tokens of the tiny vocabulary in documents of 20 tokens, each ended by 0."""
    tokens = (np.arange(num_tokens) * 5 + np.random.default_rng(seed).integers(0, 2, num_tokens)) % (VOCAB_SIZE - 2) + 2
    tokens[19::20] = 0
    return tokens


def numbered_folder(folder: Path, like: Path, token: int, num_sequences: int, length: int = 32) -> Path:
    """A data folder of the tiny vocabulary whose training sequences are all-equal tokens: ``token``, the source's mark.

    The first token of each sequence is 2 plus its number (up to 61), which tells sequences apart.
    """
    shutil.copytree(like, folder)
    sequences = np.full((num_sequences, length), token)
    sequences[:, 0] = 2 + np.arange(num_sequences) % (VOCAB_SIZE - 2)
    shutil.rmtree(folder / "train")
    write_raw(folder / "train", sequences.ravel(), name="part-00000.npy")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["fingerprint"] = f"all-{token}-{num_sequences}"
    manifest["splits"]["train"] |= {
        "num_tokens": sequences.size,
        "files": ["train/part-00000.npy"],
        "file_tokens": [sequences.size],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def raw_settings(data_folder: Path, **changes) -> RawSettings:
    """What a configuration says about raw files of the tiny vocabulary: a bare tokenizer file and the ids."""
    settings = {"tokenizer": str(data_folder / "tokenizer" / "tokenizer.json"), "eos_token_id": 0, "pad_token_id": 1}
    return RawSettings(**settings | changes)


def write_config(path: Path, data: dict, save_folder: Path, **sections) -> Path:
    """A YAML file of the tiny run on other data; ``sections`` change settings section by section."""
    settings = tiny_settings(Path("unused"), save_folder)
    settings["data"] = {"sequence_length_tokens": 32} | data
    for name, values in sections.items():
        settings[name] = settings.get(name, {}) | values
    path.write_text(yaml.safe_dump(settings))
    return path
