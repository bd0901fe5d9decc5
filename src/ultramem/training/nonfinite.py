"""Steps whose loss or gradient is NaN or infinite: the run stops, or leaves them out and counts them."""

import math
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from olmo_core.distributed.utils import get_rank
from olmo_core.train import Trainer
from olmo_core.train.callbacks import Callback
from olmo_core.utils import cuda_sync_debug_mode
from torch import Tensor

from ultramem.errors import TrainingError
from ultramem.training.checkpoints import complete_steps
from ultramem.training.config import RunConfig
from ultramem.training.data_parallel import DataParallel
from ultramem.training.sequences import describe_batch


@dataclass
class SkipCounts:
    """Steps that were left out.

    Attributes:
        total: since the run began.
        in_a_row: since the last step that was taken.
    """

    total: int = 0
    in_a_row: int = 0


class StepGuard:
    """Decides whether a step is taken, alike in all processes."""

    def __init__(self, config: RunConfig, parallel: DataParallel) -> None:
        self.config = config
        self.skips = config.training.on_nonfinite == "skip"
        self.counts = SkipCounts()
        self._parallel = parallel

    def allows(self, measured: dict[str, Tensor], trainer: Trainer) -> bool:
        """Whether the numbers of a step are finite; a step that is to be left out is counted, and named on stderr.

        Args:
            measured: loss and gradient norms by name, scalars.
            trainer: stands at the step.

        Raises:
            TrainingError: they are not, and the run stops there, or has left out too many steps in a row.
        """
        # A number that is not finite in one process is so in the mean, which all of them see.
        values = _read(self._parallel.mean(torch.stack([value.detach().float() for value in measured.values()])))
        if all(map(math.isfinite, values)):
            self.counts.in_a_row = 0
            return True
        numbers = ", ".join(f"{name} {value:g}" for name, value in zip(measured, values, strict=True))
        batch = describe_batch(trainer.data_loader, self.config)
        if not self.skips:
            raise TrainingError(
                f"step {trainer.global_step} cannot be taken ({numbers}); {batch}. Lower 'optimizer.lr' or the limits "
                "of the grad norms, lengthen the warmup, or leave such steps out with 'training.on_nonfinite: skip': "
                + self._kept()
            )
        self.counts.total += 1
        self.counts.in_a_row += 1
        if self.counts.in_a_row > self.config.training.max_skips_in_a_row:
            raise TrainingError(
                f"step {trainer.global_step} cannot be taken ({numbers}), nor could the "
                f"{self.counts.in_a_row - 1} before it ('training.max_skips_in_a_row'); {batch}. Lower 'optimizer.lr' "
                f"or the limits of the grad norms, or lengthen the warmup: {self._kept()}"
            )
        if get_rank() == 0:
            print(f"step {trainer.global_step} skipped ({numbers}); {batch}", file=sys.stderr, flush=True)
        return False

    def is_finite(self, value: Tensor) -> bool:
        """Whether a scalar is neither NaN nor infinite."""
        return math.isfinite(_read(value.reshape(1))[0])

    def _kept(self) -> str:
        steps = complete_steps(self.config.save_folder)
        if not steps:
            return f"no checkpoint is complete yet in '{self.config.save_folder}', and the same command starts again"
        return (
            f"the last complete checkpoint is '{self.config.save_folder / f'step{steps[-1]}'}', and the same command "
            "resumes from it; remove that folder to resume from an earlier one"
        )


def _read(numbers: Tensor) -> list[float]:
    # Waiting for the device at every step is the price of weights, and so checkpoints, that are never spoilt.
    with cuda_sync_debug_mode(0):
        values: list[float] = numbers.tolist()
    return values


@dataclass
class SkippedSteps(Callback):
    """Keeps the counts of skipped steps in the training state, and reports their number."""

    # Before the step's checkpoint is saved.
    priority: ClassVar[int] = 3
    counts: SkipCounts = field(default_factory=SkipCounts)
    is_reported: bool = True

    def post_train_batch(self) -> None:
        """Records how many steps of the run were skipped so far."""
        if self.is_reported:
            self.trainer.record_metric("optim/skipped steps", self.counts.total)

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return vars(self.counts).copy()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting from a state's counts."""
        vars(self.counts).update(state_dict)
