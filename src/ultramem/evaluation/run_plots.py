"""What training runs recorded, drawn on one axis: losses, throughput, rates, and what every memory did."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from ultramem.errors import DataError
from ultramem.evaluation.plots import (
    SPEED,
    TOKENS,
    TRAIN_LOSS,
    VALIDATION_LOSS,
    make_figure,
    tidy,
)

Axis = Literal["steps", "tokens", "flops"]


class _AxisMetric(NamedTuple):
    name: str
    label: str
    factor: float


AXES: dict[Axis, _AxisMetric] = {
    "steps": _AxisMetric("step", "step", 1.0),
    "tokens": _AxisMetric(TOKENS, "training tokens", 1.0),
    "flops": _AxisMetric("throughput/total petaflops", "training FLOPs", 1e15),
}


@dataclass(frozen=True)
class Run:
    """A training run: its name in the plots, and the rows of its ``metrics.jsonl``."""

    name: str
    rows: Sequence[Mapping[str, Any]]

    def points(self, axis: Axis, metric: str) -> tuple[list[float], list[float]]:
        """Places on the axis where a metric was recorded, and its values."""
        x_name, _, factor = AXES[axis]
        rows = [row for row in self.rows if _is_number(row.get(metric)) and _is_number(row.get(x_name))]
        return [factor * row[x_name] for row in rows], [row[metric] for row in rows]

    def last(self, metric: str) -> float | None:
        """The value that a metric had last; None if it was not recorded."""
        values = self.points("steps", metric)[1]
        return values[-1] if values else None


class Panel(NamedTuple):
    """A figure with the stem of its file's name, its title and a sentence on what it shows."""

    stem: str
    title: str
    caption: str
    figure: Figure


class MemoryMetric(NamedTuple):
    """One number per memory and row.

    Attributes:
        title, caption: of the panel.
        parts: pattern of the recorded names behind ``memory/N/``; several that match are averaged.
        is_share: in [0, 1], shown as percent.
    """

    title: str
    caption: str
    parts: str
    is_share: bool = False


_MEMORY_METRICS = {
    "coverage": MemoryMetric("Value coverage", "Slots read since the previous report.", "value_coverage", True),
    "divergence": MemoryMetric(
        "KL(usage ‖ uniform)", "Nats; 0 if every slot is read equally often.", "usage_divergence"
    ),
    "top1_score": MemoryMetric("Top-1 score", "Largest score of a token's selected slots, averaged.", "top1_score"),
    "mean_score": MemoryMetric("Mean score", "Scores of the selected slots, averaged.", "mean_score"),
    "output_std": MemoryMetric("Output std", "Standard deviation of the memory's output.", "output_std"),
    "search_recall": MemoryMetric(
        "Recall of the search", "Share of the exact search's slots that were found, on a sample.", "search_recall", True
    ),
}
_SINGULAR_VALUE = re.compile(r"memory/\d+/singular_value_head\d+_(\d+)")
_MEMORY = re.compile(r"memory/(\d+)/(.+)")
# Drawn together, used as an axis, or a function of another metric.
_NOT_ALONE = {"step", TRAIN_LOSS, VALIDATION_LOSS, SPEED, "train/PPL", *(metric.name for metric in AXES.values())}
_OF_GROUPS = {
    "learning rate": "Of each group of parameters.",
    "grad norm": "Before clipping, of each group of parameters; logarithmic.",
}
_COLOURS = colormaps["viridis"]
_LINE_STYLES = ("-", "--", ":", "-.")
# More memories than these have a colour bar in place of a legend.
_MAX_LEGEND = 8
_MAX_COLUMNS = 3
# Series of fewer points show each of them.
_MAX_MARKED = 40
# The first losses fall from the logarithm of the vocabulary: shown, they would flatten everything after.
_SHOWN_FROM_SHARE = 0.12


def check_axis(runs: Sequence[Run], axis: Axis) -> None:
    """Raise DataError if a run recorded nothing, or not what the axis shows."""
    for run in runs:
        if not run.rows:
            raise DataError(f"{run.name} has recorded no metrics yet. Wait for its first step, or leave it out.")
        if not any(_is_number(row.get(AXES[axis].name)) for row in run.rows):
            raise DataError(f"{run.name} has no '{AXES[axis].name}' in its metrics: draw it over --axis steps.")


def draw_panels(runs: Sequence[Run], axis: Axis) -> Iterator[Panel]:
    """Draw everything that at least one run recorded, one figure at a time.

    Args:
        runs: at least one, for which `check_axis` passed.
        axis: what all are drawn over.
    """
    names = sorted({name for run in runs for name, value in _items(run) if _is_number(value)})
    if {TRAIN_LOSS, VALIDATION_LOSS} & set(names):
        caption = "Nats per token; training thin, validation thick."
        yield Panel("loss", "Loss", caption, plot_losses(runs, axis))
    plain = [name for name in names if name not in _NOT_ALONE and not _MEMORY.fullmatch(name)]
    plain = [name for name in plain if not name.endswith(tuple(_OF_GROUPS))]
    for name in sorted(plain, key=lambda name: (not name.startswith("validation/"), not name.startswith("train/"))):
        space, _, rest = name.partition("/")
        title = f"Auxiliary loss: {rest}" if space == "train" else f"{space}: {rest}".capitalize()
        figure = _plot_groups(runs, axis, {rest: name}, rest)
        if space == "validation":
            _show_later(figure.axes[0], [point for run in runs for point in zip(*run.points(axis, name), strict=True)])
        yield Panel(_slug(name), title, f"The metric {name}.", figure)
    if SPEED in names:
        caption = "Tokens per second, without validation and checkpoints."
        figure = _plot_groups(runs, axis, {"": SPEED}, "tokens per second")
        figure.axes[0].set_ylim(bottom=0)
        figure.axes[0].yaxis.set_major_formatter(_COUNTS)
        yield Panel("throughput", "Throughput", caption, figure)
    for quantity, caption in _OF_GROUPS.items():
        groups = {
            name.removeprefix("optim/").removesuffix(f" {quantity}"): name for name in names if name.endswith(quantity)
        }
        if groups:
            figure = _plot_groups(runs, axis, groups, quantity)
            if quantity == "grad norm":
                figure.axes[0].set_yscale("log")
            yield Panel(_slug(quantity), quantity.capitalize(), caption, figure)
    yield from _memory_panels(runs, axis, names)


def _memory_panels(runs: Sequence[Run], axis: Axis, names: Sequence[str]) -> Iterator[Panel]:
    metrics = dict(_MEMORY_METRICS)
    for rank in sorted({int(match[1]) for match in map(_SINGULAR_VALUE.fullmatch, names) if match}):
        title, caption = f"Singular value {rank + 1}", "Of the summed Tucker cores, averaged over heads."
        metrics[f"singular_value_{rank + 1}"] = MemoryMetric(title, caption, rf"singular_value_head\d+_{rank}")
    for stem, metric in metrics.items():
        if any(_is_of(metric, name) for name in names):
            yield Panel(stem, metric.title, metric.caption, plot_memories(runs, axis, metric))


def plot_losses(runs: Sequence[Run], axis: Axis) -> Figure:
    """Training (thin) and validation (thick) loss of several runs."""
    figure = make_figure()
    axes = figure.subplots()
    _label(axes, axis, "loss, nats per token")
    shown: list[tuple[float, float]] = []
    styles: dict[str, tuple[str, dict[str, Any]]] = {
        TRAIN_LOSS: ("training", {"alpha": 0.35, "linewidth": 1}),
        VALIDATION_LOSS: ("validation", {"marker": "o", "markersize": 3}),
    }
    for number, run in enumerate(runs):
        for metric, (kind, style) in styles.items():
            x, y = run.points(axis, metric)
            if x:
                axes.plot(x, y, color=f"C{number}", label=f"{run.name}, {kind}", **style)
            shown += zip(x, y, strict=True)
    _show_later(axes, shown)
    axes.legend()
    return figure


def _show_later(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Choose the limits for the values after the first steep fall."""
    finite = [(x, y) for x, y in points if np.isfinite(y)]
    if finite:
        start = _SHOWN_FROM_SHARE * max(x for x, _ in finite)
        values = [y for x, y in finite if x >= start]
        margin = 0.05 * (max(values) - min(values)) or 0.1
        axes.set_ylim(min(values) - margin, max(values) + margin)


def plot_memories(runs: Sequence[Run], axis: Axis, metric: MemoryMetric | str) -> Figure:
    """A number of every memory: a line each, and beside several runs their means and ranges over memories.

    Args:
        runs: those without the metric are left out.
        axis: what the numbers are drawn over.
        metric: what is drawn, or the stem of one that every memory has: ``coverage``, ``divergence``, ….
    """
    metric = _MEMORY_METRICS[metric] if isinstance(metric, str) else metric
    found = [(number, run, table) for number, run in enumerate(runs) if len((table := _table(run, axis, metric))[0])]
    num_axes = len(found) + (len(found) > 1)
    columns = min(num_axes, _MAX_COLUMNS)
    rows = -(-num_axes // columns)
    figure = make_figure(*((7.2, 4.2) if num_axes == 1 else (1 + 3.6 * columns, 0.4 + 3.2 * rows)))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes in grid[num_axes:]:
        axes.remove()
    for place, axes in enumerate(grid[:num_axes]):
        _label(axes, axis, "" if place % columns else metric.title)
    numbers = sorted({number for _, _, (_, memories, _) in found for number in memories})
    if len(found) > 1:
        _compare_means(grid[0], found)
    for axes, (_, run, table) in zip(grid[num_axes - len(found) :], found, strict=False):
        axes.set_title(run.name)
        _draw_memories(axes, table, numbers)
    if metric.is_share:
        grid[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        grid[0].set_ylim(0, 1.02)
    last = grid[num_axes - 1]
    if len(numbers) > _MAX_LEGEND:
        colours = ScalarMappable(Normalize(numbers[0], numbers[-1]), _COLOURS)
        figure.colorbar(colours, ax=list(grid[:num_axes]), label="memory", ticks=MaxNLocator(integer=True))
    elif numbers:
        last.legend()
    return figure


def _table(run: Run, axis: Axis, metric: MemoryMetric) -> tuple[list[float], list[int], np.ndarray]:
    """Places on the axis, numbers of the memories, and values [places, memories], NaN where one has none."""
    x_name, _, factor = AXES[axis]
    places, values = [], []
    for row in run.rows:
        of_memory: dict[int, list[float]] = {}
        for name, value in row.items():
            if _is_number(value) and _is_of(metric, name):
                of_memory.setdefault(int(name.split("/")[1]), []).append(value)
        if of_memory and _is_number(row.get(x_name)):
            places.append(factor * row[x_name])
            values.append({number: sum(parts) / len(parts) for number, parts in of_memory.items()})
    memories = sorted({number for of_row in values for number in of_row})
    table = [[of_row.get(number, np.nan) for number in memories] for of_row in values]
    return places, memories, np.array(table, dtype=float)


def _compare_means(axes: Axes, found: Sequence[tuple[int, Run, tuple[list[float], list[int], np.ndarray]]]) -> None:
    axes.set_title("mean and range over memories")
    for number, run, (places, _, values) in found:
        masked = np.ma.masked_invalid(values)
        axes.plot(places, masked.mean(1), color=f"C{number}", label=run.name, **_marked(places))
        axes.fill_between(places, masked.min(1), masked.max(1), color=f"C{number}", alpha=0.15, linewidth=0)
    axes.legend()


def _draw_memories(axes: Axes, table: tuple[list[float], list[int], np.ndarray], numbers: Sequence[int]) -> None:
    places, memories, values = table
    for column, number in enumerate(memories):
        # From the first to the last memory of all runs; the palest yellow is hard to see.
        share = (number - numbers[0]) / max(1, numbers[-1] - numbers[0])
        colour = _COLOURS(share if len(numbers) > _MAX_LEGEND else 0.9 * share)
        axes.plot(places, values[:, column], color=colour, label=f"memory {number}", **_marked(places))


def _plot_groups(runs: Sequence[Run], axis: Axis, groups: Mapping[str, str], y_label: str) -> Figure:
    """Lines of several runs (colours) and several metrics of each (styles)."""
    figure = make_figure()
    axes = figure.subplots()
    _label(axes, axis, y_label)
    for run_number, run in enumerate(runs):
        for group_number, metric in enumerate(groups.values()):
            x, y = run.points(axis, metric)
            style = _LINE_STYLES[group_number % len(_LINE_STYLES)]
            axes.plot(x, y, style, color=f"C{run_number if len(runs) > 1 else group_number}", linewidth=1, **_marked(x))
    handles = []
    if len(runs) > 1:
        handles += [Line2D([], [], color=f"C{number}", label=run.name) for number, run in enumerate(runs)]
    if len(groups) > 1:
        for number, group in enumerate(groups):
            colour = "dimgrey" if len(runs) > 1 else f"C{number}"
            style = _LINE_STYLES[number % len(_LINE_STYLES)]
            handles.append(Line2D([], [], color=colour, linestyle=style, label=group))
    if handles:
        axes.legend(handles=handles)
    return figure


def _label(axes: Axes, axis: Axis, y_label: str) -> None:
    tidy(axes)
    axes.set_xlabel(AXES[axis].label)
    axes.set_ylabel(y_label)
    if axis != "flops":
        axes.xaxis.set_major_formatter(_COUNTS)


def short_count(count: float) -> str:
    """1,300,000 as ``1.3M``; K, M, B and T as the field writes tokens."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= size:
            return f"{count / size:.4g}{letter}"
    return f"{count:.4g}"


_COUNTS = FuncFormatter(lambda count, _: short_count(count))


def _marked(places: Sequence[float]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(places) <= _MAX_MARKED else {}


def _items(run: Run) -> Iterator[tuple[str, Any]]:
    return (item for row in run.rows for item in row.items())


def _is_of(metric: MemoryMetric, name: str) -> bool:
    match = _MEMORY.fullmatch(name)
    return match is not None and re.fullmatch(metric.parts, match[2]) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _slug(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower()).strip("_")
