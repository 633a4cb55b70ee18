"""The cross-bias matrix as a picture: a cell a pair of types, its shade the metric, the diagonal framed."""

from __future__ import annotations

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from biasunlearn_trainer.eval.cross_bias import CrossBias
from biasunlearn_trainer.eval.report.figure import FAINT, TEXT_COLOR, text_width
from biasunlearn_trainer.eval.schema import MetricValue

CELL_WIDTH, CELL_HEIGHT, EDGE, HEAD, FOOT, DPI = 1.25, 0.72, 0.3, 1.35, 0.75, 160
BEFORE_LABEL = "nothing (before)"
NOTE = "Framed: the type that was unlearned. Small: 95 % interval and number of items."


def build_cross_bias_figure(matrix: CrossBias) -> Figure:
    """Draws the matrix.

    Args:
        matrix: of a metric between 0 and 1; the model before unlearning, where known, is the top row, set apart.
    """
    rows: list[str] = ([BEFORE_LABEL] if matrix.before else []) + list(matrix.unlearned)
    label_width = max(text_width(row, 10) for row in rows) + 0.6
    note_width = text_width(NOTE, 8.5) + 2 * EDGE
    title = f"{matrix.metric} by bias type after unlearning one of them"
    grid = len(matrix.measured) * CELL_WIDTH
    title_width = 1.1 * text_width(title, 12) + 2 * EDGE
    width = max(label_width + grid + 2 * EDGE, note_width, title_width)
    gap = 0.12 if matrix.before else 0.0
    height = HEAD + len(rows) * CELL_HEIGHT + gap + FOOT
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(EDGE / width, 1 - 0.3 / height, title, fontsize=12, fontweight="bold", color=TEXT_COLOR)
    figure.text(EDGE / width, 1 - 0.55 / height, matrix.task, fontsize=10, color=FAINT)
    figure.text(EDGE / width, 0.25 / height, NOTE, fontsize=8.5, color=FAINT)
    # One unit of the axes is an inch, downwards.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    left = EDGE + label_width
    axes.text(left + grid / 2, HEAD - 0.45, "measured on", ha="center", fontsize=9, color=FAINT)
    axes.text(EDGE, HEAD - 0.12, "unlearned", fontsize=9, color=FAINT)
    for place, name in enumerate(matrix.measured):
        centre = left + (place + 0.5) * CELL_WIDTH
        axes.text(centre, HEAD - 0.12, _short(name), ha="center", fontsize=10, color=TEXT_COLOR)
    for number, row in enumerate(rows):
        is_before = matrix.before and number == 0
        top = HEAD + number * CELL_HEIGHT + (0 if is_before else gap)
        colour = FAINT if is_before else TEXT_COLOR
        axes.text(left - 0.15, top + CELL_HEIGHT / 2, row, ha="right", va="center", fontsize=10, color=colour)
        for place, name in enumerate(matrix.measured):
            value = matrix.before.get(name) if is_before else matrix.entries.get((row, name))
            _draw_cell(axes, (left + place * CELL_WIDTH, top), value, framed=not is_before and name == row)
    return figure


def _short(name: str) -> str:
    """A name that fits over its column."""
    return name if text_width(name, 10) < CELL_WIDTH - 0.1 else name.replace("_", "\n")


def _draw_cell(axes: Axes, corner: tuple[float, float], value: MetricValue | None, framed: bool) -> None:
    x, y = corner
    shade = colormaps["Blues"](0.08 + 0.82 * min(1.0, max(0.0, value.value))) if value else "white"
    box = {"facecolor": shade, "edgecolor": "white" if value else "#dddddd", "linewidth": 1.5}
    axes.add_patch(Rectangle((x, y), CELL_WIDTH, CELL_HEIGHT, **box))
    if framed:
        inner = (x + 0.04, y + 0.04)
        frame = {"fill": False, "edgecolor": "#D55E00", "linewidth": 2.2, "zorder": 3}
        axes.add_patch(Rectangle(inner, CELL_WIDTH - 0.08, CELL_HEIGHT - 0.08, **frame))
    if value is None:
        _write(axes, x, y + CELL_HEIGHT / 2, "not measured", 8, FAINT)
        return
    ink = "white" if value.value > 0.6 else TEXT_COLOR
    _write(axes, x, y + 0.3, f"{value.value:.2f}", 12, ink)
    _write(axes, x, y + 0.53, f"{value.ci95[0]:.2f}\u2013{value.ci95[1]:.2f}, n {value.n}", 7.5, ink)


def _write(axes: Axes, left: float, height: float, text: str, size: float, colour: str) -> None:
    axes.text(left + CELL_WIDTH / 2, height, text, ha="center", va="center", fontsize=size, color=colour)
