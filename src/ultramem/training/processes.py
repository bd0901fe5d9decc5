"""The processes of one run: the group that torchrun's environment describes, and what the first does for all."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import OLMO_SHARED_FS_ENV_VAR, broadcast_object, get_rank, get_world_size
from olmo_core.train import Trainer

from ultramem.errors import ConfigError, UltraMemError
from ultramem.training.config import RunConfig

_TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started; does nothing in a single one, or where a group exists already.

    Raises:
        ConfigError: there are several processes, but not what they need to find each other.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes == 1 or dist.is_initialized():
        yield
        return
    if missing := [name for name in _TORCHRUN_VARIABLES if name not in os.environ]:
        raise ConfigError(
            f"the environment says that the run has {num_processes} processes (WORLD_SIZE), but lacks "
            f"{', '.join(missing)}: start it with `torchrun --nproc_per_node N -m ultramem.cli train …`, or unset "
            "WORLD_SIZE to train in one process"
        )
    # A run folder that only some of the processes see would hold parts of checkpoints.
    os.environ[OLMO_SHARED_FS_ENV_VAR] = "1"
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Checkpoints and messages go over gloo, so that they do not hold up the GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo")
    yield
    # Not after an error: the other processes may be waiting in a collective that this would wait for.
    dist.destroy_process_group()


def check_processes(config: RunConfig, num_processes: int) -> None:
    """Raises ConfigError if the processes would have unequal shares of a batch."""
    training = config.training
    micro_batch = training.micro_batch_sequences or 1
    if training.global_batch_sequences % (micro_batch * num_processes):
        raise ConfigError(
            f"'training.global_batch_sequences' ({training.global_batch_sequences}) must be divisible by the number of "
            f"processes ({num_processes}) times 'training.micro_batch_sequences' ({micro_batch})"
        )


def on_first_process(action: Callable[[], object]) -> None:
    """Runs the action in the first process while the others wait; what it raises is raised in all.

    Raises:
        UltraMemError, OSError: from the action.
    """
    error: Exception | None = None
    if get_rank() == 0:
        try:
            action()
        except (UltraMemError, OSError) as raised:
            error = raised
    error = broadcast_object(error)
    if error is not None:
        raise error


@contextmanager
def signals_cancel(trainer: Trainer) -> Iterator[None]:
    """With several processes, SIGINT and SIGTERM cancel the run also while it loads and while it saves at its end.

    The trainer's own handlers cover the steps between. A terminal's Ctrl-C reaches every process twice, from the
    terminal and from torchrun: the second must not end the process that the first made save.
    """
    if get_world_size() == 1:
        yield
        return

    def cancel(number: int, frame: FrameType | None) -> None:
        trainer.cancel_run(f"{signal.Signals(number).name} received")

    before = {number: signal.signal(number, cancel) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
