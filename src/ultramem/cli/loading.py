"""What the verbs that take a checkpoint share: finding it, loading it, saying which it is, showing progress."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Precision(StrEnum):
    """Arithmetic of the matrix products, in the words of a run's ``training.precision``."""

    fp32 = "fp32"
    bf16 = "bf16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """What PyTorch calls it."""
        import torch

        return torch.float32 if self is Precision.fp32 else torch.bfloat16


def progress_bars() -> Progress:
    """Bars on stderr that go when they are done."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True)


def find_model_folder(checkpoint: Path) -> Path:
    """`resolve_model_folder`, saying on stderr which export of a run was taken."""
    from ultramem.model.folders import resolve_model_folder

    folder = resolve_model_folder(checkpoint)
    if folder != checkpoint:
        typer.echo(f"{checkpoint} is a run folder: taking its newest model, {folder}", err=True)
    return folder


def choose_device(name: str | None) -> torch.device:
    """The device named, or the first accelerator, or else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    import torch

    from ultramem.errors import ConfigError

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device '{name}' cannot be used here ({str(error).splitlines()[0]}). Leave --device out, or give cpu, "
            f"cuda or cuda:N."
        ) from error
    return device


def load_model(folder: Path, device: torch.device) -> PreTrainedModel:
    """Load the model of a model folder in fp32 and eval mode.

    Raises:
        CheckpointError: the configuration or the weights cannot be read or are not as they were exported, or tensors
            are missing, left over or of another shape.
    """
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from ultramem.errors import CheckpointError, UltraMemError
    from ultramem.model.inspection import check_undamaged, load_config

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    check_undamaged(folder)
    if _is_ultramem(folder):
        load_config(folder)  # names the file and the setting that is wrong
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except UltraMemError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded ({' '.join(str(error).split())}). Export the model again, or copy the whole "
            f"folder again."
        ) from error
    problems = [
        f"{kind.removesuffix('_keys')} {', '.join(sorted(map(str, info[kind]))[:3])}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    ]
    if problems:
        raise CheckpointError(
            f"the weights in {folder} are not those of its config.json: {'; '.join(problems)}. Put back the "
            f"configuration that they were saved with."
        )
    return model.to(device).eval()


def _is_ultramem(folder: Path) -> bool:
    """Whether the folder's configuration names our architecture; False where it cannot be read."""
    from ultramem.model import UltraMemConfig

    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get("model_type") == UltraMemConfig.model_type


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        CheckpointError: the folder holds no tokenizer, or one that cannot be read.
    """
    import transformers

    from ultramem.errors import CheckpointError

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        raise CheckpointError(
            f"{folder} holds no tokenizer that can be read ({str(error).splitlines()[0]}). Copy the tokenizer's files "
            f"(tokenizer.json, tokenizer_config.json) beside config.json."
        ) from error
