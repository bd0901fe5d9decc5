"""Draw the data flow of every layer: `python docs/layers/draw.py` writes docs/layers/figures/<name>.png.

A figure is rows of stages, a stage one or two boxes; arrows join neighbours. A new layer is a new entry of `FIGURES`.
"""

import hashlib
import sys
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.text import Text

FOLDER = Path(__file__).parent / "figures"
# Inches: distance of two columns, size of boxes.
PITCH, WIDTH, HEIGHT, HALF_HEIGHT = 1.55, 1.25, 0.95, 0.56
# Height of a row of stages, and what boxes below its stages add to it.
ROW_HEIGHT, FEED_HEIGHT = 1.55, 0.45
MARGIN, TITLE_HEIGHT, LEGEND_HEIGHT = 0.15, 0.45, 0.4
# Pixels per inch, small enough for a repository and large enough to read in full width.
DPI = 140
# Shares of the pool in its drawing.
NUM_SHARES = 6
COLORS = {
    "tokens": ("#eceff1", "hidden state"),
    "linear": ("#cfe3f7", "weights, all read"),
    "search": ("#fde7b8", "search"),
    "table": ("#cdeccf", "rows or experts, few read"),
    "pooling": ("#ead7f2", "pooling"),
}
LINE, SEEN = "#37474f", "#2e7d32"
# Which shares of the pool the fifth memory sees: a ring's window goes on at its start.
WINDOWS = {"private": (4,), "shared": tuple(range(NUM_SHARES)), "ring": (4, 5, 0)}


class Box(NamedTuple):
    """One step: its text, its kind (a key of `COLORS`), whether settings can leave it out, the pool's window."""

    text: str
    kind: str
    optional: bool = False
    window: str = ""


class Stage(NamedTuple):
    """A column: one box, or two above each other, and what feeds it from below."""

    boxes: tuple[Box, ...]
    feed: Box | None = None


class Drawing(NamedTuple):
    """A title and rows of stages."""

    title: str
    rows: tuple[tuple[Stage, ...], ...]


def one(text: str, kind: str, *, optional: bool = False, window: str = "", feed: Box | None = None) -> Stage:
    """A stage of one box."""
    return Stage((Box(text, kind, optional, window),), feed)


def two(upper: str, lower: str, kind: str) -> Stage:
    """A stage of two boxes: the row side and the column side."""
    return Stage((Box(upper, kind), Box(lower, kind)))


HIDDEN = one("$x$\nnormed\nhidden state", "tokens")
ADDITIVE_SEARCH = (
    HIDDEN,
    one("$W_q x + b$\na query\nper head", "linear"),
    one("batch norm\nor RMS norm", "linear", optional=True),
    two("row keys\n$s_i = K_i q_{row}$", "column keys\n$s_j = K_j q_{col}$", "linear"),
    two("top-k rows", "top-k columns", "search"),
    one("k × k grid\n$s_i + s_j$", "search"),
    one("top-k slots\nof each head", "search"),
)
TUCKER_SEARCH = (
    one("$W_q x$, norm\none query for\nall heads", "linear"),
    two("row keys\n$S_i \\in \\mathbb{R}^{r}$", "column keys\n$S_j \\in \\mathbb{R}^{r}$", "linear"),
    two("top-m rows\nby $S_i u$", "top-m columns\nby $S_j t$", "search"),
    one("m × m grid\n$g = \\Sigma_c S_i C_c S_j^T$", "search"),
    one("top-k slots\nwith $g_c$ per\nhead and core", "search"),
)
SHUFFLE = one("shuffle\ngrid slot →\nvirtual slot", "search")
SOFTMAX = one("softmax over\nthe k slots of\neach head", "pooling")

FIGURES = {
    "pkm": Drawing(
        "PKM (arXiv 1907.05242)",
        (
            ADDITIVE_SEARCH,
            (
                SOFTMAX,
                one("rows: values", "table", window="private"),
                one("$\\Sigma_h \\Sigma_k\\ w_k\\, v_k$", "pooling"),
                one("$W_{out}$\nwhere V ≠ D", "linear", optional=True),
                one("$y$: beside or\ninstead of\nthe FFN", "tokens"),
            ),
        ),
    ),
    "memory_plus": Drawing(
        "Memory+ (arXiv 2412.09764)",
        (
            ADDITIVE_SEARCH,
            (
                SOFTMAX,
                one("rows: values", "table", window="shared"),
                one("$\\Sigma_h \\Sigma_k\\ w_k\\, v_k$", "pooling"),
                one("⊙ gate", "pooling", feed=Box("silu($W_{gate}\\, x$)", "linear")),
                one("$W_{out}$", "linear"),
                one("$y$: beside or\ninstead of\nthe FFN", "tokens"),
            ),
        ),
    ),
    "peer": Drawing(
        "PEER (arXiv 2407.04153)",
        (
            ADDITIVE_SEARCH,
            (
                SOFTMAX,
                one("rows: u and v\nof an expert", "table", window="private"),
                one("gelu$(\\langle u_k, x \\rangle)$\none neuron\nper expert", "pooling", feed=Box("$x$", "tokens")),
                one("$\\Sigma_h \\Sigma_k\\ w_k\\,\\cdot$\nneuron · $v_k$", "pooling"),
                one("$y$: beside or\ninstead of\nthe FFN", "tokens"),
            ),
        ),
    ),
    "ultramem": Drawing(
        "UltraMem (arXiv 2411.12364)",
        (
            (
                one("$x$\nnormed, of\nblock a", "tokens"),
                one("causal conv\nover tokens", "linear", optional=True),
                *TUCKER_SEARCH,
            ),
            (
                SHUFFLE,
                one("v div W: block\nv mod W: row of\nthe window", "search"),
                one("rows: values", "table", window="private"),
                one("$\\Sigma_k\\ g_c(k)\\, v_k$\na sum per\nvirtual block", "pooling"),
                one("E blocks side\nby side:\nE·V numbers", "pooling"),
                one("$W_{out}$", "linear"),
                one("$y$\nadded after\nblock b ≥ a", "tokens"),
            ),
        ),
    ),
    "ultramem_v2": Drawing(
        "UltraMemV2 (arXiv 2508.18756)",
        (
            (HIDDEN, *TUCKER_SEARCH),
            (
                SHUFFLE,
                one("row in the ring:\n(v mod W + ℓ·n²)\nmod L·n²", "search"),
                one("rows: values,\npre-values", "table", window="ring"),
                one(
                    "pre-values\n$p_k = \\langle W_{pre} x,$\n$\\mathrm{pre}_k \\rangle$",
                    "pooling",
                    feed=Box("$W_{pre}\\, x$", "linear"),
                ),
                one("$\\Sigma_k\\ g_c(k)\\, p_k\\, v_k$\ncore c: slice c;\nblocks added", "pooling"),
                one("$W_{out}$", "linear"),
                one("$y$\nbeside the FFN\nof every block", "tokens"),
            ),
        ),
    ),
    "moe": Drawing(
        "Mixture of experts (OLMoE, arXiv 2409.02060)",
        (
            (
                HIDDEN,
                one("router\n$W_r x$", "linear"),
                one("softmax over\nE experts", "search"),
                one("top-a experts\nwith weights\n$w_e$", "search"),
                one("SwiGLU of each\nchosen expert", "table"),
                one("$\\Sigma_e\\ w_e\\, FFN_e(x)$", "pooling"),
                one("$y$: the FFN\nof the block", "tokens"),
            ),
        ),
    ),
}


class _Canvas:
    """A figure in inches, that remembers which text belongs in which box."""

    def __init__(self, num_columns: int, rows_height: float) -> None:
        self.width = num_columns * PITCH - (PITCH - WIDTH) + 2 * MARGIN
        self.height = TITLE_HEIGHT + rows_height + LEGEND_HEIGHT
        self.figure = Figure(figsize=(self.width, self.height), dpi=DPI, facecolor="white")
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, self.width), ylim=(0, self.height))
        self.axes.axis("off")
        self.contents: list[tuple[Text, FancyBboxPatch]] = []

    def box(self, box: Box, x: float, y: float, height: float) -> None:
        """A box centred at (x, y)."""
        patch = FancyBboxPatch(
            (x - WIDTH / 2, y - height / 2),
            WIDTH,
            height,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=COLORS[box.kind][0],
            edgecolor=LINE,
            linestyle="--" if box.optional else "-",
            linewidth=1.0,
        )
        self.axes.add_patch(patch)
        lift = 0.16 if box.window else 0
        text = self.axes.text(x, y + lift, box.text, ha="center", va="center", fontsize=10, linespacing=1.25)
        self.contents.append((text, patch))
        if box.window:
            self._shares(box.window, x, y - height / 2 + 0.12)

    def _shares(self, window: str, x: float, y: float) -> None:
        size = 0.17
        for share in range(NUM_SHARES):
            color = SEEN if share in WINDOWS[window] else "white"
            left = x + (share - NUM_SHARES / 2) * size
            self.axes.add_patch(Rectangle((left, y), size, 0.16, facecolor=color, edgecolor=LINE, linewidth=0.8))

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through points, with a head at the last."""
        self.axes.plot(*zip(*points[:-1], strict=True), color=LINE, linewidth=1.2)
        style = {"arrowstyle": "-|>", "color": LINE, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=style)

    def legend(self, boxes: list[Box]) -> None:
        """What colours and dashes mean, along the lower edge."""
        kinds = {box.kind for box in boxes}
        entries = [(color, meaning, "-") for kind, (color, meaning) in COLORS.items() if kind in kinds]
        entries += [("white", "optional", "--")] if any(box.optional for box in boxes) else []
        windows = [box.window for box in boxes if box.window]
        entries += [(SEEN, f"seen by memory 5 of 6 (tables: {window})", "-") for window in windows]
        x, y = MARGIN, LEGEND_HEIGHT / 2
        for color, meaning, linestyle in entries:
            self.axes.add_patch(
                Rectangle((x, y - 0.07), 0.2, 0.14, facecolor=color, edgecolor=LINE, linestyle=linestyle, linewidth=0.8)
            )
            text = self.axes.text(x + 0.27, y, meaning, va="center", fontsize=8.5)
            x += 0.27 + text.get_window_extent(self.renderer).width / DPI + 0.22


def _heights(stage: Stage, y: float) -> list[tuple[float, float]]:
    """(centre, height) of the boxes of a stage in the row whose centre is y."""
    if len(stage.boxes) == 1:
        return [(y, HEIGHT)]
    return [(y + HALF_HEIGHT / 2 + 0.06, HALF_HEIGHT), (y - HALF_HEIGHT / 2 - 0.06, HALF_HEIGHT)]


def _join(canvas: _Canvas, left: list[tuple[float, float]], right: list[tuple[float, float]], x: float) -> None:
    """Arrows from the stage at column centre x to the next: side by side, or all to one."""
    pairs = zip(left, right, strict=True) if len(left) == len(right) else ((a, b) for a in left for b in right)
    for (start, _), (end, _) in pairs:
        canvas.arrow((x + WIDTH / 2, start), (x + PITCH - WIDTH / 2, end))


def draw(name: str) -> _Canvas:
    """Draw one figure of `FIGURES`."""
    drawing = FIGURES[name]
    feeds = FEED_HEIGHT * any(stage.feed for stage in drawing.rows[-1])
    canvas = _Canvas(max(map(len, drawing.rows)), len(drawing.rows) * ROW_HEIGHT + feeds)
    canvas.axes.text(MARGIN, canvas.height - 0.25, drawing.title, va="center", fontsize=13, fontweight="bold")
    first_x = MARGIN + WIDTH / 2
    for number, row in enumerate(drawing.rows):
        y = canvas.height - TITLE_HEIGHT - (number + 0.5) * ROW_HEIGHT
        if number:
            # From the end of the row above, through the gap, to the first box of this one.
            last_x = first_x + (len(drawing.rows[number - 1]) - 1) * PITCH
            gap = y + ROW_HEIGHT / 2
            canvas.arrow(
                (last_x, y + ROW_HEIGHT - HEIGHT / 2), (last_x, gap), (first_x, gap), (first_x, y + HEIGHT / 2)
            )
        for column, stage in enumerate(row):
            x = first_x + column * PITCH
            places = _heights(stage, y)
            for box, (centre, height) in zip(stage.boxes, places, strict=True):
                canvas.box(box, x, centre, height)
            if column + 1 < len(row):
                _join(canvas, places, _heights(row[column + 1], y), x)
            if stage.feed is not None:
                below = y - HEIGHT / 2 - FEED_HEIGHT
                canvas.box(stage.feed, x, below, 0.34)
                canvas.arrow((x, below + 0.17), (x, y - HEIGHT / 2))
    boxes = [box for row in drawing.rows for stage in row for box in stage.boxes]
    canvas.legend(boxes)
    return canvas


def digest(name: str) -> str:
    """Identifies what a figure shows; written into the file, so that a test sees a figure that was not redrawn."""
    return hashlib.sha256(repr((FIGURES[name], COLORS, WINDOWS)).encode()).hexdigest()


def main(folder: Path = FOLDER) -> None:
    """Write every figure."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        draw(name).figure.savefig(folder / f"{name}.png", metadata={"Description": digest(name)})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
