"""`ultramem eval --tasks`: scores on the tasks of lm-eval, as a table and as lm-eval's own results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultramem.cli.loading import Precision, load_tokenizer, progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ultramem.evaluation.harness import HarnessReport, LoadedTasks, TaskScore


def load_tasks(folder: Path, names: str) -> tuple[PreTrainedTokenizerBase, LoadedTasks]:
    """What tasks need beside the model, read before anything is measured.

    Args:
        folder: the model folder, for its tokenizer.
        names: what `--tasks` gave, names with commas between.
    """
    from ultramem.evaluation import harness

    return load_tokenizer(folder), harness.load_tasks([name.strip() for name in names.split(",") if name.strip()])


def evaluate_on_tasks(
    model: PreTrainedModel,
    folder: Path,
    loaded: tuple[PreTrainedTokenizerBase, LoadedTasks],
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    dtype: Precision,
) -> dict[str, Any]:
    """Ask the questions and print the scores; returns the numbers for JSON."""
    from ultramem.evaluation.harness import run_tasks

    with progress_bars() as progress:
        bar = progress.add_task("tasks", total=None)
        report = run_tasks(
            model,
            *loaded,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            dtype=dtype.torch_dtype,
            progress=lambda num_answered, num_asked: progress.update(bar, completed=num_answered, total=num_asked),
        )
    limited = "" if limit is None else f", first {limit} questions each"
    _print(f"{folder}: tasks, {dtype.value}, {model.device}{limited}", report)
    return {"limit": limit, "num_fewshot": num_fewshot, **report.to_dict()}


def _print(heading: str, report: HarnessReport) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=heading, box=SIMPLE, pad_edge=False)
    for name in ("task", "metric", "value ± stderr", "n", "shots"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right", no_wrap=True)
    for score in report.headline():
        shots = "–" if score.num_fewshot is None else str(score.num_fewshot)
        table.add_row(score.task, score.metric, _value(score), f"{score.num_rows:,}", shots)
    console.print(table)
    if report.num_truncated:
        console.print(
            f"{report.num_truncated:,} of {report.num_requests:,} texts were longer than the model's positions: their "
            f"beginning was cut off.",
            highlight=False,
        )


def _value(score: TaskScore) -> str:
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
