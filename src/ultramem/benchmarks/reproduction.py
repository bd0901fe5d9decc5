"""One figure from start to end: points on disk, a progress bar, the drawing."""

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from ultramem.benchmarks.drawing import draw_figure
from ultramem.benchmarks.figures import Plan, key_of, measure_figure
from ultramem.benchmarks.measure import NUM_WARMUPS, describe_device, use_threads
from ultramem.benchmarks.points import open_points
from ultramem.benchmarks.report import device_text
from ultramem.benchmarks.twins import NAMES
from ultramem.evaluation.plots import save

# What the device has to have in common for points to go into one figure.
_SETTINGS_OF_DEVICE = (
    "accelerator",
    "processor",
    "vector_instructions",
    "threads",
    "huge_pages",
    "ultramem",
    "torch",
    "transformers",
)


class Reproduction:
    """A figure that is being made.

    Args:
        plan: what is measured.
        folder: where CSV and figure go.
        num_threads: None for PyTorch's present number.
        restart: measure anew what is there already.

    Attributes:
        store: the points.

    Raises:
        ConfigError: the folder holds points of another setting, or cannot be written.
    """

    def __init__(self, plan: Plan, folder: Path, num_threads: int | None = None, restart: bool = False) -> None:
        self.plan, self.folder, self.num_threads = plan, folder, num_threads
        with use_threads(num_threads):
            self.device = describe_device(torch.device(plan.device))
        settings = {
            "plan": repr(plan),
            **{name: self.device[name] for name in _SETTINGS_OF_DEVICE if name in self.device},
        }
        self.store = open_points(folder, plan.figure, settings, len(NAMES), restart)

    @property
    def progress(self) -> str:
        """How many points are there."""
        return (
            f"{self._num_done * len(NAMES)} of {len(self.plan.groups()) * len(NAMES)} points are in {self.store.file}"
        )

    @property
    def opening(self) -> str:
        """What is said before measuring: whether this starts, goes on, or only draws."""
        if not self.store.points:
            how = f"measuring {len(self.plan.groups()) * len(NAMES)} points into {self.store.file}"
        elif self._num_done < len(self.plan.groups()):
            how = f"going on: {self.progress}"
        else:
            how = f"nothing left to measure: {self.progress} (--restart measures anew)"
        return f"{device_text(self.device, None, self.plan.num_runs)}\n{how}"

    @property
    def _num_done(self) -> int:
        done = self.store.groups
        return sum(key_of(*group) in done for group in self.plan.groups())

    def measure(self) -> None:
        """Measure what is missing."""
        per_group = len(NAMES) * (self.plan.num_runs + NUM_WARMUPS)
        columns = (
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            # Takes what the numbers leave.
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True)),
        )
        # Redrawn only between runs: a thread that draws would take its time from what is measured.
        with (
            use_threads(self.num_threads),
            Progress(*columns, console=Console(stderr=True), auto_refresh=False, expand=True) as bar,
        ):
            task = bar.add_task(
                "building models",
                total=per_group * len(self.plan.groups()),
                completed=per_group * self._num_done,
            )
            bar.refresh()
            measure_figure(
                self.plan, self.store, lambda what: bar.update(task, description=what, advance=1, refresh=True)
            )

    def draw(self) -> Path | None:
        """Draw the points that are there; returns the file, or None where there are none."""
        if not self.store.points:
            return None
        device = self.device
        where = device.get("accelerator") or (
            f"{device['processor']} ({device['vector_instructions']}), threads: {device['threads']}"
        )
        if "accelerator" in device:
            where += ", CUDA graphs"
        caption = (
            f"{where}, bf16, torch {device['torch']}; median of {self.plan.num_runs} alternating runs, band: fastest "
            "to slowest"
        )
        file = self.folder / f"{self.plan.figure}.png"
        save(draw_figure(self.plan.figure, self.store.points, caption), file)
        return file
