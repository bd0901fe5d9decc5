"""One HTML page with everything that runs recorded: a table of the runs and all figures, in a single file."""

import base64
import html
import io
import statistics
from collections.abc import Sequence
from pathlib import Path

from ultramem.evaluation.plots import DOTS_PER_INCH, SPEED, TOKENS, TRAIN_LOSS, VALIDATION_LOSS
from ultramem.evaluation.run_plots import AXES, Axis, Panel, Run, draw_panels, short_count
from ultramem.files import staged_file

PAGE_NAME = "index.html"
_BITS = "validation/bits per byte"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; padding: 0 1.5rem; max-width: 1500px; color: #1a1a1a;
       background: #fff; }
table { border-collapse: collapse; margin: 1rem 0 2rem; }
th, td { padding: 0.3rem 0.9rem; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 560px), 1fr)); gap: 1.5rem; }
figure { margin: 0; }
figure.wide { grid-column: 1 / -1; }
h2 { font-size: 1.1rem; margin: 0; }
figcaption { color: #555; }
img { max-width: 100%; height: auto; }
"""


def write_page(runs: Sequence[Run], axis: Axis, folder: Path) -> Path:
    """Draw all panels as PNG files, and a page that holds them too and needs nothing beside it.

    Args:
        runs: at least one, for which `ultramem.evaluation.run_plots.check_axis` passed.
        axis: what all are drawn over.
        folder: where the files go; it exists, and files of the same names are replaced.

    Returns:
        The page.
    """
    figures = []
    for panel in draw_panels(runs, axis):
        buffer = io.BytesIO()
        panel.figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
        with staged_file(folder / f"{panel.stem}.png") as stage:
            stage.write_bytes(buffer.getvalue())
        figures.append(_figure(panel, buffer.getvalue()))
    title = html.escape(" · ".join(run.name for run in runs))
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{title}</h1>\n{_table(runs)}\n<main>\n{''.join(figures)}</main>\n</body>\n</html>\n"
    )
    with staged_file(folder / PAGE_NAME) as stage:
        stage.write_text(page, encoding="utf-8")
    return folder / PAGE_NAME


def _figure(panel: Panel, png: bytes) -> str:
    # Several axes side by side need the whole width.
    kind = ' class="wide"' if panel.figure.get_figwidth() > 2 * panel.figure.get_figheight() else ""
    image = base64.b64encode(png).decode("ascii")
    title, caption = html.escape(panel.title), html.escape(panel.caption)
    return (
        f'<figure{kind} id="{panel.stem}">\n<h2>{title}</h2>\n<figcaption>{caption}</figcaption>\n'
        f'<img alt="{title}" src="data:image/png;base64,{image}">\n</figure>\n'
    )


def _table(runs: Sequence[Run]) -> str:
    columns = {
        "step": lambda run: _last(run, "step", "{:,.0f}"),
        "tokens": lambda run: short_count(run.last(TOKENS)) if run.last(TOKENS) is not None else "–",
        "FLOPs": lambda run: f"{1e15 * value:.3g}" if (value := run.last(AXES["flops"].name)) is not None else "–",
        "training loss": lambda run: _last(run, TRAIN_LOSS),
        "validation loss": lambda run: _last(run, VALIDATION_LOSS),
        "bits per byte": lambda run: _last(run, _BITS),
        "tokens/s, median": lambda run: f"{statistics.median(y):,.0f}" if (y := run.points("steps", SPEED)[1]) else "–",
    }
    head = "".join(f"<th>{name}</th>" for name in ("run", *columns))
    rows = "".join(
        f"<tr><td>{html.escape(run.name)}</td>"
        + "".join(f"<td>{text(run)}</td>" for text in columns.values())
        + "</tr>\n"
        for run in runs
    )
    return f"<table>\n<tr>{head}</tr>\n{rows}</table>"


def _last(run: Run, metric: str, form: str = "{:.4f}") -> str:
    value = run.last(metric)
    return "–" if value is None else form.format(value)
