"""Where a checkpoint's weights are: every verb takes a model folder or a training run's folder."""

import json
import re
from pathlib import Path

from ultramem.errors import CheckpointError

_EXPORT_NAME = re.compile(r"step(\d+)-hf")
_EXPECTED = (
    "expected a model folder (config.json with model.safetensors, or with model.safetensors.index.json and its parts) "
    "or a run folder of `ultramem train` (with a finished export stepN-hf)"
)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model folder's weights, sorted by name.

    Args:
        folder: a model folder.

    Raises:
        CheckpointError: no weights are there, a part that the index names is missing, or the index is not readable.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{index} cannot be read ({error}); expected JSON with a `weight_map`. Export or copy the model again."
            ) from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise CheckpointError(
                f"{folder} lacks weights that its index names: {', '.join(missing) or 'the index is empty'}. "
                f"Copy the whole folder again."
            )
        return [folder / name for name in names]
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json; {_EXPECTED}."
        )
    return [weights]


def _is_model_folder(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    try:
        weight_files(folder)
    except CheckpointError:
        return False
    return True


def _exports(run: Path) -> list[Path]:
    """The `stepN-hf` folders of a run, newest (largest N) first, complete or not."""
    numbered = [
        (int(match[1]), child)
        for child in run.iterdir()
        if child.is_dir() and (match := _EXPORT_NAME.fullmatch(child.name))
    ]
    return [child for _, child in sorted(numbered, reverse=True)]


def resolve_model_folder(path: str | Path) -> Path:
    """The model folder that a path names.

    A model folder (config.json and weights) is returned as it is; a run folder resolves to its newest complete
    `stepN-hf`. An export without its configuration or without some of its weights is never chosen.

    Args:
        path: a model folder or a run folder.

    Returns:
        The model folder; differs from `path` if that was a run folder.

    Raises:
        CheckpointError: the path is neither; the text says what was expected and what was found.
    """
    folder = Path(path)
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist; {_EXPECTED}.")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; {_EXPECTED}.")
    if (folder / "config.json").is_file():
        weight_files(folder)
        return folder
    exports = _exports(folder)
    for export in exports:
        if _is_model_folder(export):
            return export
    if exports:
        names = ", ".join(export.name for export in exports)
        raise CheckpointError(
            f"{folder} is a run folder whose exports are incomplete ({names}): each lacks config.json or weights. "
            f"Run the same `ultramem train` command again to finish it."
        )
    if any(re.fullmatch(r"step\d+", child.name) for child in folder.iterdir()):
        raise CheckpointError(
            f"{folder} is a run folder without a finished export (stepN-hf), only training states. "
            f"Run the same `ultramem train` command again: it resumes, and exports the model at its end."
        )
    found = sorted(child.name for child in folder.iterdir())
    listing = ", ".join(found[:8]) + (", …" if len(found) > 8 else "") if found else "nothing"
    raise CheckpointError(f"{folder} holds {listing}; {_EXPECTED}.")
