"""Plots of training runs and evaluations, as matplotlib figures without a display."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ultramem.errors import DataError
from ultramem.files import staged_file

TOKENS, TRAIN_LOSS, VALIDATION_LOSS = "throughput/total tokens", "train/CE loss", "validation/CE loss"
_COVERAGE = re.compile(r"memory/(\d+)/value_coverage")
_DOTS_PER_INCH = 130
# The first losses fall from the logarithm of the vocabulary: shown, they would flatten everything after.
_SHOWN_FROM_SHARE = 0.08


def load_metrics(file: Path) -> list[dict[str, Any]]:
    """Read a run's `metrics.jsonl`.

    Raises:
        DataError: the file is not there, or a line is not a JSON object.
    """
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file} cannot be read as metrics ({error}). Name the folder of a run of `ultramem train`."
        ) from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file} holds lines that are no JSON objects. Name the folder of a run of `ultramem train`.")
    return rows


def series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """The steps at which a metric was recorded, and its values."""
    rows = [row for row in metrics if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def save(figure: Figure, file: Path) -> None:
    """Write a PNG, complete or not at all."""
    with staged_file(file) as stage:
        figure.savefig(stage, format="png", dpi=_DOTS_PER_INCH)


def plot_losses(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Training (thin) and validation (thick) loss of several runs over training tokens.

    Args:
        runs: name → the run's metrics.
    """
    figure, axes = _figure("training tokens, millions", "loss, nats per token")
    shown = []
    styles = {
        TRAIN_LOSS: ("training", {"alpha": 0.35, "linewidth": 1}),
        VALIDATION_LOSS: ("validation", {"marker": "o", "markersize": 3}),
    }
    for number, (name, metrics) in enumerate(runs.items()):
        tokens_of_step = dict(zip(*series(metrics, TOKENS), strict=True))
        for metric, (kind, style) in styles.items():
            recorded = zip(*series(metrics, metric), strict=True)
            points = [(tokens_of_step[step] / 1e6, loss) for step, loss in recorded if step in tokens_of_step]
            if points:
                axes.plot(*zip(*points, strict=True), color=f"C{number}", label=f"{name}, {kind}", **style)
            shown += points
    if shown:
        from_tokens = _SHOWN_FROM_SHARE * max(tokens for tokens, _ in shown)
        losses = [loss for tokens, loss in shown if tokens >= from_tokens]
        margin = 0.05 * (max(losses) - min(losses)) or 0.1
        axes.set_ylim(min(losses) - margin, max(losses) + margin)
    axes.legend()
    return figure


def plot_coverage(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of each memory's slots that were read since the previous report, over training steps."""
    figure, axes = _figure("step", "slots read since the last report, %")
    names = sorted({name for row in metrics for name in row if _COVERAGE.fullmatch(name)}, key=_memory_number)
    for name in names:
        steps, shares = series(metrics, name)
        axes.plot(
            steps, [100 * share for share in shares], marker="o", markersize=3, label=f"memory {_memory_number(name)}"
        )
    axes.set_ylim(0, 102)
    axes.legend()
    return figure


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


def _figure(x_label: str, y_label: str, height: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _memory_number(name: str) -> int:
    match = _COVERAGE.fullmatch(name)
    assert match is not None
    return int(match[1])
