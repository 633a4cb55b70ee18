"""The trade-off as a picture: how much is forgotten against how much is kept, and the points at matched forgetting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from biasunlearn_trainer.eval.matched import Comparison, Matching, Point

# Okabe and Ito's palette without its yellow, which a white page swallows; shapes tell more methods apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PANEL, HEAD, FOOT, EDGE, DPI = 3.4, 0.5, 0.6, 0.7, 160
LEGEND_COLUMNS, LEGEND_ROW = 3, 0.22


def build_tradeoff_figure(points: Sequence[Point], comparisons: Sequence[Comparison], matching: Matching) -> Figure:
    """Draw a panel for each kept metric and their mean.

    Args:
        points: all points; of each method and setting the course over steps, as a mean over units, is drawn faintly.
        comparisons: of the same points; the chosen points' means stand out, with their 95 % intervals over units.
        matching: what is on the axes: the first metric of `at` across, each kept one up.
    """
    names = [*matching.keep, "kept"] if len(matching.keep) > 1 else [*matching.keep]
    across = next(iter(matching.at))
    rows = -(-len(comparisons) // LEGEND_COLUMNS)
    limits = _limits(comparisons, names, across, matching.at[across])
    width, height = EDGE + len(names) * (PANEL + EDGE), HEAD + PANEL + FOOT + rows * LEGEND_ROW + 0.1
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        left = EDGE + number * (PANEL + EDGE)
        bottom = FOOT + rows * LEGEND_ROW + 0.1
        axes = figure.add_axes((left / width, bottom / height, PANEL / width, PANEL / height))
        axes.set_title("mean of what is kept" if name == "kept" else f"{name}, higher is better", fontsize=10)
        axes.set_xlabel(f"{across}, lower is forgotten", fontsize=9)
        axes.set_xlim(*limits[0])
        axes.set_ylim(*limits[1])
        axes.axvspan(-1, matching.at[across], color="#EEEEEE", zorder=0)
        axes.grid(color="#E3E3E3", linewidth=0.6)
        for place, comparison in enumerate(comparisons):
            _draw_method(axes, points, comparison, (across, name), matching, place)
    handles = [
        Line2D(
            [],
            [],
            color=_color(i),
            marker=_marker(i),
            linestyle="",
            label=f"{c.method} ({len(c.chosen)}/{c.num_units})",
        )
        for i, c in enumerate(comparisons)
    ]
    figure.legend(handles=handles, loc="lower center", ncol=LEGEND_COLUMNS, fontsize=8, frameon=False)
    return figure


def _limits(
    comparisons: Sequence[Comparison], names: Sequence[str], across: str, at: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ends of the axes, the same for all panels: what was chosen fills them, and courses leave through their edges."""
    chosen = [comparison.means for comparison in comparisons if comparison.means]
    right = max([at, *(means[across][1][1] for means in chosen if across in means)])
    low = min([means[name][1][0] for means in chosen for name in names if name in means], default=0.0)
    return (-0.01, min(1.03, 1.6 * right)), (max(-0.03, low - 0.05), 1.02)


def _color(place: int) -> str:
    return COLORS[place % len(COLORS)]


def _marker(place: int) -> str:
    return MARKERS[(place + place // len(COLORS)) % len(MARKERS)]


def _draw_method(
    axes: Axes, points: Sequence[Point], comparison: Comparison, names: tuple[str, str], matching: Matching, place: int
) -> None:
    own = [point for point in points if point.method == comparison.method]
    for setting in dict.fromkeys(point.setting for point in own):
        course = [p for p in own if p.setting == setting]
        steps = sorted({p.step for p in course})
        means = [
            [np.mean([_value(p, name, matching) for p in course if p.step == step]) for name in names] for step in steps
        ]
        across, up = zip(*means, strict=True)
        axes.plot(across, up, color=_color(place), linewidth=0.7, alpha=0.35, zorder=2)
    found = [comparison.means.get(name) for name in names]
    if all(found):
        (x, (x_low, x_high)), (y, (y_low, y_high)) = found
        axes.errorbar(
            x, y, xerr=[[x - x_low], [x_high - x]], yerr=[[y - y_low], [y_high - y]],
            color=_color(place), marker=_marker(place), markersize=6, linewidth=1.1, zorder=3,
        )  # fmt: skip


def _value(point: Point, name: str, matching: Matching) -> float:
    return float(np.mean([point.reported[n] for n in matching.keep])) if name == "kept" else point.reported[name]
