"""Training states that are written with checksums and read only if they are as they were written."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.train.checkpoint import Checkpointer, CheckpointerConfig, CheckpointMetadata
from olmo_core.train.train_module import TrainModule
from torch.distributed.checkpoint.api import CheckpointException

from ultramem.errors import CheckpointError, UltraMemError
from ultramem.files import CHECKSUMS_NAME, find_damage, has_checksums, write_checksums
from ultramem.training.out_of_memory import is_out_of_memory

# What OLMo-core needs to take a folder for a complete state.
_INDEX, _POSITION = "model_and_optim/.metadata", "train/rank0.pt"


class StateCheckpointer(Checkpointer):
    """OLMo-core's checkpointer, whose states carry the checksums of their files.

    They are written after all files but the one that makes a state complete.
    """

    _is_saving_async = False
    _finalizing_error: Exception | None = None

    def save_async(
        self, dir: str | Path, train_module: TrainModule, train_state: dict[str, Any], ephemeral: bool = False
    ) -> Future[None]:
        """Starts to save a state; the future ends when it is complete, or with what went wrong.

        OLMo-core's own future ends before the last file is written, and an error there is lost.
        """
        self._is_saving_async, self._finalizing_error = True, None
        finished: Future[None] = Future()

        def finish(written: Future[None]) -> None:
            self._is_saving_async = False
            error = written.exception() or self._finalizing_error
            if error is None:
                finished.set_result(None)
            else:
                finished.set_exception(error)

        # After the callback that finalizes the state.
        super().save_async(dir, train_module, train_state, ephemeral).add_done_callback(finish)
        return finished

    def _save_metadata(self, dir: str | Path, metadata: CheckpointMetadata) -> None:
        # OLMo-core comes here also after a failed write, which has an error of its own.
        if get_rank() == 0 and not (Path(dir) / _INDEX).is_file():
            return
        try:
            if get_rank() == 0:
                write_checksums(Path(dir), _state_files(Path(dir)))
            super()._save_metadata(dir, metadata)
        except Exception as error:
            # In a writer's thread an error would be printed and lost.
            if not self._is_saving_async:
                raise
            self._finalizing_error = error

    def load(self, dir: str | Path, train_module: TrainModule, **options: Any) -> dict[str, Any] | None:
        """Loads a state after a look at the checksums of its files, in which the processes share.

        Raises:
            CheckpointError: a file is missing, cut short or changed, or cannot be read as what it should be.
        """
        folder = Path(dir)
        if damage := _gather(find_damage(folder, get_rank(), get_world_size())):
            raise damaged_state(folder, damage)
        try:
            state: dict[str, Any] | None = super().load(dir, train_module, **options)
        # What PyTorch raises for a failed state is no Exception.
        except (Exception, CheckpointException) as error:
            if is_out_of_memory(error) or isinstance(error, UltraMemError):
                raise
            raise damaged_state(folder, [_first_line(error)]) from error
        return state


class StateCheckpointerConfig(CheckpointerConfig):
    """Builds a :class:`StateCheckpointer`."""

    def build(self, process_group: dist.ProcessGroup | None = None, **options: Any) -> StateCheckpointer:
        """The checkpointer with the trainer's settings."""
        return StateCheckpointer(process_group=process_group, **options)


def lost_files(folder: Path) -> list[str]:
    """What a state lacks that was complete once; empty for one that a killed run left half-written or half-removed."""
    # The file that makes a state complete is the last to come and the first to go.
    if not (folder / Checkpointer.METADATA_FNAME).is_file() or not has_checksums(folder):
        return []
    return [f"{name} is missing" for name in (_POSITION, _INDEX) if not (folder / name).is_file()]


def damaged_state(folder: Path, damage: list[str]) -> CheckpointError:
    """The error for a training state that cannot be used.

    Args:
        folder: ``stepN``.
        damage: a text for each of its files that is not as it was.
    """
    others = sorted(
        (step for step, path in Checkpointer.find_checkpoints(str(folder.parent)) if Path(path) != folder), reverse=True
    )
    more = f" and {len(damage) - 3} more" if len(damage) > 3 else ""
    otherwise = f"to go on from step {others[0]}" if others else "to start without it"
    return CheckpointError(
        f"the training state '{folder}' is damaged: {'; '.join(damage[:3])}{more}. Put back a copy of it, or move the "
        f"folder away {otherwise}"
    )


def _state_files(folder: Path) -> list[Path]:
    """All files of a state but those written last."""
    last = {Checkpointer.METADATA_FNAME, CHECKSUMS_NAME}
    return [path for path in folder.rglob("*") if path.is_file() and path.name not in last]


def _gather(damage: list[str]) -> list[str]:
    """What all processes found."""
    if get_world_size() == 1:
        return damage
    found: list[list[str]] = [[] for _ in range(get_world_size())]
    dist.all_gather_object(found, damage)
    return [text for part in found for text in part]


def _first_line(error: BaseException) -> str:
    """The first line of an error that says something."""
    text = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {text.strip()}"
