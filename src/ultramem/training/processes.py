"""The processes of one run: the group that torchrun's environment describes, and what the first does for all."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import OLMO_SHARED_FS_ENV_VAR, broadcast_object, get_rank, get_world_size
from olmo_core.train import Trainer
from olmo_core.train.callbacks import Callback

from ultramem.errors import ConfigError, UltraMemError
from ultramem.training.config import RunConfig

_ended_groups: list[dist.ProcessGroup | None] = []

_TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def count_processes() -> int:
    """The processes of the run, also before they have joined each other."""
    return get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started; does nothing in a single one, or where a group exists already.

    Raises:
        ConfigError: there are several processes, but not what they need to find each other.
    """
    num_processes = count_processes()
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
    # DDP's reducer, which is freed later, must not be the group's last owner: it frees it with the interpreter locked,
    # and then waits for the group's threads, of which one may want the lock to free the last gradient that it sent.
    _ended_groups.append(dist.group.WORLD)
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


class Signals:
    """SIGINT and SIGTERM of a run, from its first check to its last file; the trainer takes them between its steps.

    In a single process a signal before the training starts ends the run at once, for nothing is lost. Of several
    processes one may be alone in getting it: they load on and end together. From then on the run ends as after a step,
    and while it saves at its end nothing disturbs it: a terminal's Ctrl-C reaches every process twice, from the
    terminal and from torchrun.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._trainer: Trainer | None = None

    def start(self, trainer: Trainer) -> None:
        """From now on a signal cancels this trainer's run."""
        self._trainer = trainer

    def pass_on(self) -> None:
        """Cancels the run for a signal that came before the trainer looked."""
        if self._received is not None and self._trainer is not None:
            self._trainer.cancel_run(f"{signal.Signals(self._received).name} received")

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Python's handler."""
        self._received = number
        self.pass_on()
        if self._trainer is None and get_world_size() == 1:
            raise StoppedEarlyError(f"{signal.Signals(number).name} received")


class StoppedEarlyError(Exception):
    """A signal has come before there was anything to save."""


@dataclass
class PassOnSignals(Callback):
    """Cancels a run that got a signal before its first step."""

    signals: Signals = field(default_factory=Signals)

    def pre_train(self) -> None:
        """After the trainer has forgotten what cancelled it before."""
        self.signals.pass_on()


@contextmanager
def signals_end_run() -> Iterator[Signals]:
    """Handles SIGINT and SIGTERM as :class:`Signals` says, then puts back the handlers that were there."""
    signals = Signals()
    before = {number: signal.signal(number, signals.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
