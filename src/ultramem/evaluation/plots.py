"""Metrics of training runs, and plots of evaluations as matplotlib figures without a display."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ultramem.errors import DataError
from ultramem.files import staged_file

TRAIN_LOSS, VALIDATION_LOSS = "train/CE loss", "validation/CE loss"
TOKENS, SPEED = "throughput/total tokens", "throughput/tokens per second"
DOTS_PER_INCH = 130


def load_metrics(file: Path) -> list[dict[str, Any]]:
    """Read a run's `metrics.jsonl`: one row per step, in order.

    A last line that a kill tore is left out. Where a resumed run went back, its rows replace those of the abandoned
    steps.

    Raises:
        DataError: the file is not there, or a line is not a JSON object with a step.
    """
    remedy = "Name the folder of a run of `ultramem train`."
    try:
        *lines, torn = file.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as metrics ({error}). {remedy}") from error
    if torn:
        with suppress(ValueError):
            rows.append(json.loads(torn))
    kept: list[dict[str, Any]] = []
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(f"{file} holds lines that are no JSON objects with a step. {remedy}")
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """The steps at which a metric was recorded, and its values."""
    rows = [row for row in metrics if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def save(figure: Figure, file: Path) -> None:
    """Write a PNG, complete or not at all."""
    with staged_file(file) as stage:
        figure.savefig(stage, format="png", dpi=DOTS_PER_INCH)


def plot_usage(counts: Sequence[Tensor]) -> Figure:
    """Reads of each slot, sorted from the most to the least read, one line per memory.

    Args:
        counts: reads per slot, int64 [slots], one tensor per memory.
    """
    figure, axes = _figure("slots from the most to the least read, %", "reads / mean reads")
    for number, counts_S in enumerate(counts):
        ordered_S = counts_S.sort(descending=True).values.double() / counts_S.double().mean()
        num_read = int((counts_S > 0).sum())
        places = [100 * (place + 0.5) / len(counts_S) for place in range(num_read)]
        label = f"memory {number}: {100 * num_read / len(counts_S):.0f} % of {len(counts_S):,} slots read"
        axes.plot(places, ordered_S[:num_read].tolist(), label=label)
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--", label="uniform")
    axes.set_yscale("log")
    axes.set_xlim(0, 100)
    axes.legend()
    return figure


def plot_recall(reports: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Mean reciprocal rank per relation with standard errors, one bar per model, beside chance.

    Args:
        reports: name of the model → `RecallReport.to_dict()`.
    """
    relations = list(next(iter(reports.values()))["relations"])
    figure, axes = _figure("mean reciprocal rank of the right answer", "", height=1.2 + 0.36 * len(relations))
    thickness = 0.8 / len(reports)
    places = range(len(relations))
    for number, (name, report) in enumerate(reports.items()):
        found = [report["relations"][relation] for relation in relations]
        axes.barh(
            [place + (number - (len(reports) - 1) / 2) * thickness for place in places],
            [one["mean_reciprocal_rank"] for one in found],
            xerr=[one["mean_reciprocal_rank_error"] or 0.0 for one in found],
            height=thickness,
            color=f"C{number}",
            error_kw={"linewidth": 0.8},
            label=name,
        )
    chance = [next(iter(reports.values()))["relations"][relation]["chance_reciprocal_rank"] for relation in relations]
    axes.scatter(chance, places, marker="|", s=160, color="black", zorder=3, label="chance")
    axes.set_yticks(places, [relation.replace("_", " ") for relation in relations])
    axes.invert_yaxis()
    axes.legend()
    return figure


def make_figure(width: float = 7.2, height: float = 4.2) -> Figure:
    """An empty figure, in inches, that leaves room for what is written beside its axes."""
    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Axes) -> None:
    """A light grid, and no lines above and to the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _figure(x_label: str, y_label: str, height: float = 4.2) -> tuple[Figure, Axes]:
    figure = make_figure(height=height)
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    tidy(axes)
    return figure, axes
