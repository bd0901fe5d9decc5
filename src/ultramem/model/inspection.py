"""Looking at a model folder without loading it: its configuration, and whether its weights are those it describes."""

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from ultramem.errors import CheckpointError, ConfigError
from ultramem.files import CHECKSUMS_NAME, find_damage
from ultramem.model.accounting import cost_card
from ultramem.model.configuration import UltraMemConfig
from ultramem.model.folders import weight_files
from ultramem.model.modeling import UltraMemForCausalLM


@dataclass(frozen=True)
class WeightSummary:
    """What the weight files of a model folder hold.

    Attributes:
        num_files: safetensors files.
        num_tensors: tensors, buffers included.
        num_bytes: size of the files.
        dtypes: types of the tensors, in safetensors' names, sorted.
    """

    num_files: int
    num_tensors: int
    num_bytes: int
    dtypes: tuple[str, ...]


def load_config(folder: Path) -> UltraMemConfig:
    """Read a model folder's configuration.

    Raises:
        CheckpointError: it cannot be read, or describes another architecture.
    """
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        model_type = settings.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}). Export the model again, or copy the file again."
        ) from error
    if model_type != UltraMemConfig.model_type:
        raise CheckpointError(
            f"{file} describes a model of type {model_type!r}; expected {UltraMemConfig.model_type!r}. Name a folder "
            f"that `ultramem train` or `UltraMemForCausalLM.save_pretrained` wrote."
        )
    try:
        config: UltraMemConfig = UltraMemConfig.from_dict(settings)
    except (ConfigError, StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{file} is not valid: {' '.join(str(error).split())} Put back the configuration that was saved."
        ) from error
    return config


def check_tensors(
    folder: Path,
    config_file: str,
    expected: Mapping[str, list[int]],
    found: Mapping[str, list[int]],
    optional: Set[str] = frozenset(),
) -> None:
    """Compare the tensors of a folder with those that its configuration asks for.

    Args:
        folder: for messages.
        config_file: the configuration's name, for messages.
        expected: shapes by name.
        found: the same of the folder's files.
        optional: names that may be missing.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape; names the first three.
    """
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys() - optional)]
    problems += [f"{name} is left over" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {found[name]} instead of {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"the weights in {folder} are not those of its {config_file}: {'; '.join(problems[:3])}{more}. Put back "
            "the configuration that they were saved with."
        )


def check_weights(folder: Path, config: UltraMemConfig) -> WeightSummary:
    """Compare the headers of a model folder's weights with what the configuration builds.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape, or a file's header cannot be read.
    """
    with torch.device("meta"):
        model = UltraMemForCausalLM(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    files = weight_files(folder)
    found: dict[str, list[int]] = {}
    dtypes: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - safe_open is no mapping
                    header = weights.get_slice(name)
                    found[name] = header.get_shape()
                    dtypes.add(header.get_dtype())
        except SafetensorError as error:
            raise CheckpointError(
                f"{file} is damaged ({error}). Export the model again, or copy the file again."
            ) from error
    # A tied output matrix is saved once, under the embedding's name.
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    check_tensors(folder, "config.json", expected, found, optional=tied)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters == cost_card(config).total_parameters
    num_bytes = sum(file.stat().st_size for file in files)
    return WeightSummary(len(files), len(found), num_bytes, tuple(sorted(dtypes)))


def check_undamaged(folder: Path) -> None:
    """Compare the weight files of an exported model with the checksums that were written with them, if there are any.

    Raises:
        CheckpointError: a file is missing, cut short or changed.
    """
    if damage := find_damage(folder):
        raise CheckpointError(
            f"the model in {folder} is damaged: {'; '.join(damage)}. Export the model again, or copy the files again; "
            f"if you changed the weights yourself, remove {CHECKSUMS_NAME} from the folder."
        )
