"""The figures of `ultramem reproduce`: our measurements on logarithmic axes."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from ultramem.benchmarks.points import Point
from ultramem.benchmarks.targets import DENSE, MOE, V2
from ultramem.evaluation.plots import make_figure, tidy

STYLES = {DENSE: ("C7", "s"), MOE: ("C1", "^"), V2: ("C0", "o")}
PANELS = (("median_s", 1e3, "time of a decode step, ms"), ("bytes_read", 1e-6, "read in a decode step, MB"))


def draw_figure(figure: str, points: Sequence[Point], caption: str) -> Figure:
    """Time and bytes side by side, one row of panels for each size of model.

    Args:
        figure: ``figure6c`` is drawn over the sparse parameters, the others over the batch size.
        points: see `ultramem.benchmarks.points.COLUMNS`; not empty.
        caption: device and runs.
    """
    horizontal, label = (
        ("sparse_ratio", "sparse parameters / dense parameters")
        if figure == "figure6c"
        else ("batch_size", "batch size, sequences")
    )
    sizes = list(dict.fromkeys(point["size"] for point in points))
    drawing = make_figure(width=9.6, height=0.9 + 3.4 * len(sizes))
    rows = drawing.subplots(len(sizes), len(PANELS), squeeze=False)
    for size, panels in zip(sizes, rows, strict=True):
        of_size = [point for point in points if point["size"] == size]
        for axes, (column, scale, unit) in zip(panels, PANELS, strict=True):
            _draw_panel(axes, of_size, horizontal, column, scale)
            axes.set_xlabel(label)
            axes.set_ylabel(unit)
        panels[0].set_title(_heading(size, of_size, with_batch=figure == "figure6c"), loc="left", fontsize=9, pad=12)
    rows[0][0].legend(frameon=False)
    drawing.supxlabel(caption, fontsize=7, color="0.35")
    return drawing


def _draw_panel(axes: Axes, points: list[Point], horizontal: str, column: str, scale: float) -> None:
    for model, (color, marker) in STYLES.items():
        of_model = sorted((point for point in points if point["model"] == model), key=lambda point: point[horizontal])
        places = [point[horizontal] for point in of_model]
        axes.plot(places, [scale * point[column] for point in of_model], color=color, marker=marker, label=model)
        if column == "median_s":
            fastest, slowest = ([scale * point[name] for point in of_model] for name in ("fastest_s", "slowest_s"))
            axes.fill_between(places, fastest, slowest, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    places = sorted({point[horizontal] for point in points})
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:g}"))
    axes.yaxis.set_major_locator(FixedLocator(ticks(*axes.get_ylim())))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda height, _: f"{height:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    tidy(axes)
    _mark_shorter_caches(axes, points, horizontal)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones: as few to a decade as give three, for axes of half a decade too."""
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        found = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(found) >= 3:
            return found
    return [tick for tick in MaxNLocator(4, steps=(1, 2, 5, 10)).tick_values(low, high).tolist() if low <= tick <= high]


def _mark_shorter_caches(axes: Axes, points: list[Point], horizontal: str) -> None:
    """Say above the axes where memory did not allow the longest cache."""
    longest = max(point["kv_length_tokens"] for point in points)
    shorter = {point[horizontal]: point["kv_length_tokens"] for point in points if point["kv_length_tokens"] < longest}
    for place, length in shorter.items():
        axes.annotate(
            f"KV {length:,}", (place, 1.0), xycoords=("data", "axes fraction"), fontsize=6, ha="center", color="0.35"
        )


def _heading(size: str, points: list[Point], with_batch: bool) -> str:
    total = {point["model"]: point["total_parameters"] for point in points}
    length = max(point["kv_length_tokens"] for point in points)
    parameters = f"{_millions(total[DENSE])} parameters dense"
    if with_batch:
        return f"{size}: {parameters}; batch {points[0]['batch_size']}, KV length {length:,}"
    sparse = [_millions(total[name]) for name in (V2, MOE)]
    words = f"{sparse[0]} UltraMemV2 and MoE" if len(set(sparse)) == 1 else f"{sparse[0]} UltraMemV2, {sparse[1]} MoE"
    return f"{size}: {parameters}, {words}; KV length {length:,}"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.3g}M"
