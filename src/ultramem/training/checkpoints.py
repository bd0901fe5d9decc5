"""Run folders: complete training states, self-contained model folders, and what a killed run leaves behind.

A ``stepN`` folder is complete when its ``.metadata.json`` is there: that is written after the tensors and their
checksums, and removed first when a folder goes. Everything else in this module is arranged so that the newest complete
one always exists.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from olmo_core.distributed.utils import broadcast_object, get_rank
from olmo_core.train.callbacks import CheckpointerCallback
from olmo_core.train.checkpoint import Checkpointer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from ultramem.data.tokenizer import load_tokenizer_with_ids
from ultramem.errors import CheckpointError
from ultramem.files import staged_folder, write_checksums
from ultramem.model.folders import weight_files
from ultramem.training.data_parallel import gather_weights
from ultramem.training.states import damaged_state, lost_files

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Of the run folder if their text names it; other files may be refused too.
_FOLDER_ERRORS = (errno.EACCES, errno.EPERM)


def complete_steps(run_folder: Path) -> list[int]:
    """Steps of the complete training states in a run folder, ascending."""
    if not run_folder.is_dir():
        return []
    return sorted(step for step, _ in Checkpointer.find_checkpoints(str(run_folder)))


def remove_leftovers(run_folder: Path) -> list[str]:
    """Removes what an interrupted run left half-written: incomplete ``stepN`` folders and temporary folders.

    A model folder newer than the newest complete state goes too: its state was being written when the run was killed,
    and until the resumed run is past that step it would be taken for the run's newest. Older ones without a state stay,
    as do all where no state is left: no kill leaves those, so somebody chose to keep them.

    Returns:
        names of the removed folders.

    Raises:
        CheckpointError: a state that was complete has lost a file.
    """
    for path in sorted(run_folder.glob("step*")) if run_folder.is_dir() else []:
        if re.fullmatch(r"step\d+", path.name) and (damage := lost_files(path)):
            raise damaged_state(path, damage)
    steps = complete_steps(run_folder)
    complete = {f"step{step}" for step in steps}
    removed = []
    for path in sorted(run_folder.glob("step*")) if run_folder.is_dir() else []:
        is_incomplete = re.fullmatch(r"step\d+", path.name) and path.name not in complete
        export = re.fullmatch(r"step(\d+)-hf", path.name)
        is_orphan = export is not None and bool(steps) and int(export[1]) > steps[-1]
        if is_incomplete or is_orphan or re.fullmatch(r"step\d+(-tmp|-hf\.(old|(partial|replaced)-\d+))", path.name):
            shutil.rmtree(path)
            removed.append(path.name)
    return removed


@contextmanager
def exclusive_run_folder(run_folder: Path) -> Iterator[None]:
    """Holds the run folder's lock file; the operating system frees it however the process ends.

    Raises:
        CheckpointError: another process trains in this folder, or the folder cannot be written.
    """
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        lock = (run_folder / ".lock").open("w")
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the run folder '{run_folder}': {error.strerror}. Set 'run.save_folder' to a folder that "
            "can be written"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"another process is training in '{run_folder}': wait for it, or set 'run.save_folder' to another one"
            ) from error
        yield


@contextmanager
def explained_write_errors(run_folder: Path) -> Iterator[None]:
    """Turns a full or read-only disk under the run folder into a CheckpointError that says how the run goes on."""
    try:
        yield
    # What PyTorch raises for a failed state is no Exception.
    except BaseException as error:
        if (cause := _disk_error(error, run_folder)) is None:
            raise
        steps = complete_steps(run_folder)
        kept = f"step {steps[-1]} is complete and kept" if steps else "no checkpoint is complete yet"
        raise CheckpointError(
            f"cannot write to the run folder '{run_folder}': {cause}. Free space on its disk and make it writable; "
            f"{kept}, and the same command {'resumes from it' if steps else 'starts again'}"
        ) from error


def _disk_error(error: BaseException | None, run_folder: Path) -> str | None:
    """What the file system refused, if that is where an error or one behind it comes from.

    The number is searched in the text: safetensors, `shutil.copytree` and PyTorch's writer of states pass on the
    system's error in their messages only.
    """
    while error is not None:
        text = str(error)
        names_folder = any(str(path) in text for path in {run_folder, run_folder.resolve()})
        for number in map(int, re.findall(r"(?:\[Errno|\(os error) (\d+)", text)):
            if number in _DISK_ERRORS or (number in _FOLDER_ERRORS and names_folder):
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def export_model(
    model: PreTrainedModel, tokenizer_path: Path, target: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Writes a self-contained Hugging Face model folder (config, safetensors, tokenizer) and renames it into place.

    Args:
        model: the model.
        tokenizer_path: a folder, which is copied, or a bare tokenizer file, which becomes a folder with the special
            tokens that the model's configuration names by id.
        target: the folder to write.
        weights: the model's, where it does not hold them itself.
    """
    with staged_folder(target) as stage:
        bars_shown = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()
        model.save_pretrained(stage, state_dict=weights)
        if bars_shown:
            hf_logging.enable_progress_bar()
        write_checksums(stage, weight_files(stage))
        if tokenizer_path.is_dir():
            shutil.copytree(tokenizer_path, stage, dirs_exist_ok=True)
        else:
            ids = model.config.eos_token_id, model.config.pad_token_id
            load_tokenizer_with_ids(tokenizer_path, *ids).save_pretrained(stage)


@dataclass
class RunCheckpointer(CheckpointerCallback):
    """OLMo-core's checkpointer callback plus model exports, and a kept count that survives resuming."""

    tokenizer_path: str = ""

    def post_checkpoint_loaded(self, path: str) -> None:
        """Marks the loaded step as saved: OLMo-core would save it again at the end and fail, the folder being there."""
        self._latest_checkpoint_step = self.step
        self._latest_checkpoint_path = str(path)

    def pre_train(self) -> None:
        """Takes over the states that earlier processes of this run saved, and exports the newest if that is missing."""
        super().pre_train()
        run_folder = Path(self.save_folder)
        self._checkpoints = [str(run_folder / f"step{step}") for step in complete_steps(run_folder)]
        is_missing = bool(self._checkpoints) and not Path(self._checkpoints[-1] + "-hf").is_dir()
        # All processes take part in an export: what the first one sees counts.
        self._checkpoints, is_missing = broadcast_object((self._checkpoints, is_missing))
        if is_missing:
            self._export(self._checkpoints[-1])

    def post_train(self) -> None:
        """Saves the last step and removes what is beyond the kept count now, not at a next step that never comes."""
        super().post_train()
        self._trim_checkpoints()
        self._remove_old_checkpoints()

    def _save_checkpoint(self, save_async: bool | None = None, ephemeral: bool = False) -> str:
        """Saves state and model folder of this step.

        OLMo-core's ``save_checkpoint_async`` records a metric from its writer thread while the main thread may be
        reading the metrics; the checkpointer is called without that here.
        """
        trainer = self.trainer
        self._await_last_checkpoint()
        # The step's metrics reach their files before its checkpoint is complete, so that none is lost by a kill.
        trainer._log_metrics()
        trainer._join_bookkeeping_ops()
        path = str(Path(self.save_folder) / self.checkpointer.checkpoint_dirname(self.step))
        arguments = (path, trainer.train_module, trainer.state_dict())
        if self.save_async if save_async is None else save_async:
            self._future = self.checkpointer.save_async(*arguments, ephemeral=ephemeral)
        else:
            self.checkpointer.save(*arguments, ephemeral=ephemeral)
        self._latest_checkpoint_step, self._latest_checkpoint_path = self.step, path
        self._export(path)
        return path

    def _remove_checkpoint(self, path: str) -> None:
        # The model folder goes before its state: killed in between, the next process finds the state and removes it. It
        # is renamed first, for a half-removed folder must not look like a model folder.
        if get_rank() == 0 and (model_folder := Path(path + "-hf")).is_dir():
            shutil.rmtree(model_folder.rename(model_folder.with_name(model_folder.name + ".old")))
        super()._remove_checkpoint(path)

    def _export(self, path: str) -> None:
        model = self.trainer.train_module.model
        weights = gather_weights(model)
        if get_rank() == 0:
            export_model(model, Path(self.tokenizer_path), Path(path + "-hf"), weights)
