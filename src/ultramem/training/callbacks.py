"""What a run shows and records: progress, metrics files, validation, memory statistics.

Order matters: metrics of a step are recorded before the checkpointer (priority 1) saves that step, so that a resumed
run finds every line up to its step in ``metrics.jsonl`` and adds the rest.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from olmo_core.distributed.utils import get_rank
from olmo_core.train.callbacks import Callback, ConsoleLoggerCallback, SpeedMonitorCallback, WandBCallback
from olmo_core.train.callbacks.wandb import WANDB_API_KEY_ENV_VAR
from olmo_core.train.common import TRAIN_CE_LOSS_METRIC
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ultramem.errors import ConfigError
from ultramem.evaluation.perplexity import PerplexityResult
from ultramem.files import staged_file
from ultramem.training.config import RunConfig

VALIDATION_LOSS_METRIC = "validation/CE loss"
_VALIDATION_PREFIX, _TASK_PREFIX = "validation/", "tasks/"
SPEED_METRIC = "throughput/tokens per second"


def is_due(step: int, interval_steps: int | None, last_step: int | None) -> bool:
    """Whether something that happens every n steps, and at the last one, happens after this step."""
    return interval_steps is not None and (step % interval_steps == 0 or step == last_step)


def holds_validation(metrics: dict[str, float]) -> bool:
    """Whether a step's metrics are to be kept because the model was validated after it."""
    return any(name.startswith((_VALIDATION_PREFIX, _TASK_PREFIX)) for name in metrics)


@dataclass
class Throughput(SpeedMonitorCallback):
    """Tokens per second of loading, forward, backward and optimizer step, without validation and checkpoints."""

    priority: ClassVar[int] = 4

    def pre_train(self) -> None:
        """Nothing: the base class asks the train module for what only OLMo-core's own models have."""

    def pre_load_batch(self) -> None:
        """Starts the clock."""
        self._start_time = time.perf_counter()

    def pre_step(self, batch: dict[str, Any]) -> None:
        """Nothing: replaces the base class's bookkeeping."""

    def post_train_batch(self) -> None:
        """Records the step's speed over all processes."""
        tokens_per_second = self.trainer.global_batch_size / (time.perf_counter() - self._start_time)
        self.trainer.record_metric(SPEED_METRIC, tokens_per_second)
        self.trainer.record_metric("throughput/total tokens", self.trainer.global_train_tokens_seen)
        self.trainer.record_metric("throughput/total petaflops", self.trainer.global_train_petaflops)

    def post_step(self) -> None:
        """Nothing: replaces the base class's bookkeeping."""


@dataclass
class MemoryStatistics(Callback):
    """Statistics of every memory over the steps since the last report."""

    priority: ClassVar[int] = 3
    interval_steps: int | None = None

    def post_train_batch(self) -> None:
        """Records and starts a new period, every ``interval_steps`` and at the end."""
        if not is_due(self.step, self.interval_steps, self.trainer.max_steps):
            return
        for i, meter in enumerate(self.trainer.train_module.memory_meters):
            for name, value in meter.read().items():
                self.trainer.record_metric(f"memory/{i}/{name}", value)
            meter.reset()


@dataclass
class Validation(Callback):
    """Loss and bits per byte on a validation split."""

    priority: ClassVar[int] = 2
    interval_steps: int | None = None
    measure: Callable[[], PerplexityResult] | None = None
    set_name: str | None = None  # None: the run's own data

    def post_train_batch(self) -> None:
        """Measures every ``interval_steps`` and at the end of the run; several processes do it together."""
        if self.measure is None or not is_due(self.step, self.interval_steps, self.trainer.max_steps):
            return
        result = self.measure()
        infix = "" if self.set_name is None else f"{self.set_name}/"
        self.trainer.record_metric(f"{_VALIDATION_PREFIX}{infix}CE loss", result.loss)
        if result.bits_per_byte is not None:
            self.trainer.record_metric(f"{_VALIDATION_PREFIX}{infix}bits per byte", result.bits_per_byte)


@dataclass
class TaskScores(Callback):
    """Scores on tasks, "task/metric" each."""

    priority: ClassVar[int] = 2
    interval_steps: int | None = None
    measure: Callable[[], dict[str, float]] | None = None

    def post_train_batch(self) -> None:
        """Asks every ``interval_steps`` and at the end of the run; every process asks all."""
        if self.measure is not None and is_due(self.step, self.interval_steps, self.trainer.max_steps):
            for name, value in self.measure().items():
                self.trainer.record_metric(f"{_TASK_PREFIX}{name}", value)


@dataclass
class MetricsFile(Callback):
    """Appends one JSON object per logged step to ``metrics.jsonl``."""

    path: str = ""
    interval_steps: int = 1

    def pre_train(self) -> None:
        """Drops the lines beyond the step that the run resumes from, and a last line torn by a kill."""
        path = Path(self.path)
        if get_rank() != 0 or not path.exists():
            return
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if self._is_before_resume(line)]
        with staged_file(path) as stage:
            stage.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def _is_before_resume(self, line: str) -> bool:
        try:
            return json.loads(line)["step"] <= self.step
        except ValueError:
            return False

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the step's line if it is due, the first or last step, or holds a validation's results."""
        # OLMo-core hands over the duration of loading a checkpoint as a second set of metrics for the resumed step.
        metrics = {name: value for name, value in metrics.items() if not name.startswith("checkpoint/")}
        due = step == 1 or is_due(step, self.interval_steps, self.trainer.max_steps)
        if get_rank() == 0 and metrics and (due or holds_validation(metrics)):
            with Path(self.path).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")


@dataclass
class TensorBoard(Callback):
    """Writes the same metrics for TensorBoard."""

    folder: str = ""
    interval_steps: int = 1

    def pre_train(self) -> None:
        """Opens the writer; events beyond the resumed step are hidden."""
        if get_rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.folder, purge_step=self.step + 1)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the step if it is due, the first or last step, or holds a validation's results."""
        due = step == 1 or is_due(step, self.interval_steps, self.trainer.max_steps)
        if get_rank() == 0 and (due or holds_validation(metrics)):
            for name, value in metrics.items():
                self._writer.add_scalar(name.replace(" ", "_"), value, step)

    def close(self) -> None:
        """Flushes the events."""
        if writer := self.__dict__.pop("_writer", None):
            writer.close()


@dataclass
class WeightsAndBiases(WandBCallback):
    """OLMo-core's callback, which sends the metrics of every step to Weights & Biases."""

    def finalize(self, exit_code: int = 0) -> None:
        """Ends the run there, once."""
        # The base class passes an argument that newer versions of the package do not take.
        if not self.finalized:
            self.wandb.finish(exit_code=exit_code)
            self._finalized = True


def weights_and_biases(config: RunConfig) -> WeightsAndBiases:
    """The callback that a config asks for.

    Args:
        config: a run with ``logging.wandb``.

    Raises:
        ConfigError: the package or the key is missing.
    """
    assert config.logging.wandb is not None
    off = "or switch it off with 'logging.wandb: null'"
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"'logging.wandb' needs the package wandb: pip install 'ultramem[wandb]', {off}") from error
    if WANDB_API_KEY_ENV_VAR not in os.environ:
        raise ConfigError(
            f"'logging.wandb' needs your key in the environment variable {WANDB_API_KEY_ENV_VAR} (any text will do "
            f"with WANDB_MODE=offline), {off}"
        )
    settings = config.logging.wandb.as_dict()
    settings["name"] = settings["name"] or config.save_folder.resolve().name
    # Looking for a tag that cancels the run would be a request at every step; a signal stops a run.
    return WeightsAndBiases(**settings, config=config.as_dict(json_safe=True), cancel_tags=None)


@dataclass
class ProgressLine(ConsoleLoggerCallback):
    """One line with step, loss, tokens per second and time left: live on a terminal, plain lines elsewhere."""

    interval_steps: int = 10

    def pre_train(self) -> None:
        """Starts the clock and, on a terminal, the bar."""
        self._start, self._start_step = time.perf_counter(), self.step
        self._bar: Progress | None = None
        if get_rank() == 0 and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=None))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("starting", total=self.trainer.max_steps, completed=self.step)
            self._bar.start()

    def post_step(self) -> None:
        """Nothing: lines are written when the metrics arrive."""

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the step."""
        if get_rank() != 0 or TRAIN_CE_LOSS_METRIC not in metrics:
            return
        last_step = self.trainer.max_steps or step
        text = f"step {step}/{last_step}  loss {metrics[TRAIN_CE_LOSS_METRIC]:.4f}"
        if SPEED_METRIC in metrics:
            text += f"  {metrics[SPEED_METRIC]:,.0f} tokens/s"
        if VALIDATION_LOSS_METRIC in metrics:
            text += f"  validation {metrics[VALIDATION_LOSS_METRIC]:.4f}"
        if step > self._start_step:
            seconds = (time.perf_counter() - self._start) / (step - self._start_step) * (last_step - step)
            text += f"  {format_time(seconds)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            if VALIDATION_LOSS_METRIC in metrics:
                self._bar.console.print(text)
        elif step == 1 or is_due(step, self.interval_steps, last_step) or VALIDATION_LOSS_METRIC in metrics:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if bar := self.__dict__.pop("_bar", None):
            bar.stop()


def format_time(seconds: float) -> str:
    """``75`` → ``1m15s``; hours without seconds."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
