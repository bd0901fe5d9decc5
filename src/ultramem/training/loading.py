"""Continued training: a run that starts from the weights of another run or of a model folder (``run.load_path``)."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from olmo_core.train.checkpoint import Checkpointer

from ultramem.data.manifest import DataManifest
from ultramem.errors import CheckpointError, ConfigError
from ultramem.evaluation.compatibility import check_same_vocabulary
from ultramem.model import UltraMemConfig, UltraMemForCausalLM
from ultramem.model.folders import resolve_model_folder
from ultramem.model.inspection import check_undamaged, check_weights
from ultramem.model.inspection import load_config as load_model_config
from ultramem.training.checkpoints import complete_steps
from ultramem.training.config import RunConfig, load_config

# What a later stage may change: it decides neither the weights' shapes nor what they mean.
CHANGEABLE = re.compile(
    r"model\.(transformers_version|architectures|dtype|_name_or_path|use_cache|initializer_range|init(_std)?|"
    r"max_position_embeddings|rope_parameters(\..*)?|attention_dropout|"
    r"memory\.(init|output_dropout|key_balance_weight|tucker_penalty_weight|tucker_penalty_margin))"
)


@dataclass(frozen=True)
class StartingPoint:
    """Where a run's first weights come from: exactly one of the two.

    Attributes:
        state: a complete training state, ``stepN``.
        model_folder: a Hugging Face model folder.
    """

    state: Path | None = None
    model_folder: Path | None = None


def starting_point(config: RunConfig) -> StartingPoint | None:
    """What ``run.load_path`` names; None if there is none, or the run folder has a state to resume from.

    A run folder stands for its newest training state, or without one for its newest model.

    Raises:
        CheckpointError: the path is no checkpoint or an incomplete one, or is a model where the optimizer's state is
            asked for.
    """
    if config.run.load_path is None or complete_steps(config.save_folder):
        return None
    path = Path(config.run.load_path)
    if Checkpointer.dir_is_checkpoint(str(path)):
        return StartingPoint(state=path)
    if re.fullmatch(r"step\d+", path.name) and path.is_dir():
        raise CheckpointError(
            f"'run.load_path': '{path}' is an incomplete training state (its .metadata.json is missing): give another "
            "one, or the run folder to take its newest complete state"
        )
    if steps := complete_steps(path):
        return StartingPoint(state=path / f"step{steps[-1]}")
    folder = resolve_model_folder(path)
    if config.run.load_optimizer:
        raise CheckpointError(
            f"'run.load_optimizer' needs a training state, but '{folder}' is a model folder, which holds weights only: "
            "give the run folder or its stepN in 'run.load_path', or set 'run.load_optimizer: false'"
        )
    return StartingPoint(model_folder=folder)


def check_loadable(config: RunConfig, model: UltraMemConfig, manifest: DataManifest) -> None:
    """Makes sure that the weights in ``run.load_path`` are those of this run's model, and its tokens those of the data.

    Raises:
        CheckpointError: see :func:`starting_point`; also another model, or weights that are damaged.
        DataError: the checkpoint was trained with another tokenizer.
    """
    if (start := starting_point(config)) is None:
        return
    if start.state is not None:
        saved = _model_of_state(start.state)
        folder = start.state.with_name(start.state.name + "-hf")
    else:
        assert start.model_folder is not None
        folder = start.model_folder
        saved = load_model_config(folder)
        check_weights(folder, saved)
        check_undamaged(folder)
    found = [text for key, text in differing_settings(saved, model).items() if not CHANGEABLE.fullmatch(key)]
    if found:
        raise CheckpointError(
            f"'run.load_path': the weights in '{start.state or folder}' belong to another model ({'; '.join(found)}): "
            "set these to the checkpoint's, or leave 'run.load_path' out"
        )
    if folder.is_dir():
        check_same_vocabulary(folder, model.vocab_size, manifest)


def load_weights(folder: Path, model: UltraMemConfig) -> UltraMemForCausalLM:
    """The model of a folder that :func:`check_loadable` accepted, in fp32, with the settings of this run."""
    loaded: UltraMemForCausalLM = UltraMemForCausalLM.from_pretrained(folder, config=model, dtype=torch.float32)
    return loaded


def differing_settings(old: UltraMemConfig, new: UltraMemConfig) -> dict[str, str]:
    """Settings that two models do not share: dotted key → ``key: old → new``."""
    before, now = _flatten("model", old.to_dict()), _flatten("model", new.to_dict())
    return {
        key: f"{key}: {before.get(key)} → {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }


def _flatten(path: str, value: Any) -> dict[str, Any]:
    """Nested settings as one dictionary with dotted keys."""
    if not isinstance(value, dict):
        return {path: value}
    return {name: leaf for key in value for name, leaf in _flatten(f"{path}.{key}", value[key]).items()}


def _model_of_state(state: Path) -> UltraMemConfig:
    """The configuration of a training state's model, from the run's resolved configuration."""
    try:
        return UltraMemConfig(**load_config(state.parent / "config.yaml").model)
    except (ConfigError, StrictDataclassError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"'run.load_path': the config.yaml beside '{state}', which every run writes at its start, cannot be used: "
            f"restore that file from a copy, or give the model folder '{state.name}-hf' ({error})"
        ) from error
