"""The heat map of saliency: a row of panels for each distribution, a panel for each module group.

In a panel layers are rows and module kinds columns, as in MMUnlearner's figures 5 and 6; beside it stand the modules
that are in no layer. All sizes are in inches, so that nothing overlaps whatever the number and the length of the names.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from biasunlearn_trainer.eval.report.figure import DPI, EDGE, FAINT, TEXT_COLOR, text_width
from biasunlearn_trainer.saliency.distribution import Distribution, Share
from biasunlearn_trainer.saliency.places import Place

# Light to dark, the dark being much; even steps also without colour.
COLORS = colormaps["YlGnBu"]
ABSENT = "#f0f0f0"
CELL_WIDTH, CELL, LOW_CELL = 0.4, 0.26, 0.17
# With more layers than this the rows of a panel are set closer.
MANY_LAYERS = 16
NAME_SIZE, VALUE_SIZE, LOW_VALUE_SIZE, HEAD_SIZE, TITLE_SIZE = 8, 7.5, 6.5, 10, 14
PAD, GAP, STRIP_GAP, MIN_WIDTH = 0.09, 0.45, 0.25, 6.0
TITLE_LINE, NOTE_LINE, ROW_HEAD, GROUP_HEAD, ROW_GAP = 0.3, 0.2, 0.3, 0.3, 0.3
BAR_WIDTH, BAR_HEIGHT, BAR_FOOT = 2.6, 0.12, 0.32
# Shares that lie closer together than this are not drawn as if they were far apart.
MIN_SPAN = 0.1
NOTE = "Share of a module's weights in per cent. Grey: no such module, or weights that are not covered."


@dataclass(frozen=True)
class Panel:
    """The places of a group over all distributions.

    Attributes:
        group: its name.
        layers: the rows.
        kinds: the columns.
        alone: modules without a layer.
    """

    group: str
    layers: list[int]
    kinds: list[str]
    alone: list[str]

    @property
    def cell(self) -> float:
        """Height of a layer's row in inches."""
        return CELL if len(self.layers) <= MANY_LAYERS else LOW_CELL

    @property
    def number_width(self) -> float:
        """Width in inches of the layers' numbers."""
        return PAD + text_width(str(max(self.layers)), NAME_SIZE) if self.kinds else 0.0

    @property
    def grid_width(self) -> float:
        """Width in inches of the layers' part."""
        return self.number_width + CELL_WIDTH * len(self.kinds)

    @property
    def strip_width(self) -> float:
        """Width in inches of the part for modules without a layer."""
        widest = max((text_width(name, NAME_SIZE) for name in self.alone), default=0.0)
        return CELL_WIDTH + PAD + widest if self.alone else 0.0

    @property
    def width(self) -> float:
        """Width in inches."""
        between = STRIP_GAP if self.kinds and self.alone else 0.0
        return max(self.grid_width + between + self.strip_width, 1.2 * text_width(self.group, HEAD_SIZE))

    @property
    def name_height(self) -> float:
        """Height in inches of the columns' names, which stand upright."""
        return max((text_width(kind, NAME_SIZE) for kind in self.kinds), default=0.0) + PAD

    @property
    def height(self) -> float:
        """Height in inches of the cells."""
        return max(self.cell * len(self.layers), CELL * len(self.alone))


def draw_heatmap(path: str | os.PathLike, found: Sequence[Distribution], title: str) -> None:
    """Draws the heat map into a PNG file, whole or not at all; the arguments are those of `build_heatmap`."""
    partial = Path(f"{path}.partial")
    try:
        drawn = io.BytesIO()
        build_heatmap(found, title).savefig(drawn, format="png")
        # A palette takes a third of the space of full colour, and nothing here needs more than 256 colours.
        Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(partial, "png", optimize=True)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def build_heatmap(found: Sequence[Distribution], title: str) -> Figure:
    """Builds the heat map.

    Args:
        found: the mask's distribution, and those of the most changed weights; one row of panels each, all coloured on
            one scale.
        title: the heading.
    """
    panels = plan_panels(found)
    width = max(2 * EDGE + sum(panel.width for panel in panels) + GAP * (len(panels) - 1), MIN_WIDTH)
    # About 7 bold characters of 14 points and 15 of 9 points go on an inch.
    lines = textwrap.wrap(title, max(20, int(7 * (width - 2 * EDGE)))) or [""]
    note = textwrap.wrap(NOTE, int(15 * (width - 2 * EDGE)))
    row_titles = [textwrap.wrap(_row_title(one), int(10 * (width - 2 * EDGE))) for one in found]
    names, cells = max(panel.name_height for panel in panels), max(panel.height for panel in panels)
    head = 0.1 + TITLE_LINE * len(lines) + NOTE_LINE * len(note) + BAR_HEIGHT + BAR_FOOT + 0.15
    row_heights = [ROW_HEAD * len(text) + GROUP_HEAD + names + cells + ROW_GAP for text in row_titles]
    height = head + sum(row_heights)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    norm = color_range(found)
    _draw_heading(figure, lines, note, norm)
    top = height - head
    for one, text, row_height in zip(found, row_titles, row_heights, strict=True):
        for number, line in enumerate(text):
            _write(figure, EDGE, top - 0.2 - ROW_HEAD * number, line, fontsize=HEAD_SIZE, fontweight="bold")
        left = EDGE
        for panel in panels:
            _draw_panel(figure, panel, one, norm, (left, top - row_height + ROW_GAP + cells), names)
            left += panel.width + GAP
        top -= row_height
    return figure


def plan_panels(found: Sequence[Distribution]) -> list[Panel]:
    """The groups with all places that any of the distributions has."""
    places = list(dict.fromkeys(place for one in found for place in one.shares))
    panels = []
    for group in dict.fromkeys(place.group for place in places):
        inside = [place for place in places if place.group == group]
        layered = [place for place in inside if place.layer is not None]
        layers = list(range(max(place.layer for place in layered) + 1)) if layered else []
        kinds = list(dict.fromkeys(place.kind for place in layered))
        panels.append(Panel(group, layers, kinds, [place.kind for place in inside if place.layer is None]))
    return panels


def color_range(found: Sequence[Distribution]) -> Normalize:
    """From the smallest to the largest share of all, rounded to 5 %, at least 10 % wide."""
    shares = [share.share for one in found for share in one.shares.values() if share.covered]
    low, high = min(shares, default=0.0), max(shares, default=1.0)
    low, high = int(20 * low + 1e-9) / 20, -int(-20 * high - 1 + 1e-9) / 20
    high = min(1.0, max(high, low + MIN_SPAN))
    return Normalize(max(0.0, min(low, high - MIN_SPAN)), high)


def _row_title(found: Distribution) -> str:
    total = found.total
    return f"{found.title}: {total.chosen:,.0f} of {total.covered:,} ({100 * total.share:.1f} %)"


def _draw_heading(figure: Figure, lines: Sequence[str], note: Sequence[str], norm: Normalize) -> None:
    width, height = figure.get_size_inches()
    top = height - 0.1
    for line in lines:
        top -= TITLE_LINE
        _write(figure, EDGE, top + 0.06, line, fontsize=TITLE_SIZE, fontweight="bold")
    for line in note:
        top -= NOTE_LINE
        _write(figure, EDGE, top + 0.04, line, fontsize=9, color=FAINT)
    top -= BAR_HEIGHT + 0.08
    axes = figure.add_axes((EDGE / width, top / height, BAR_WIDTH / width, BAR_HEIGHT / height))
    bar = figure.colorbar(ScalarMappable(norm, COLORS), cax=axes, orientation="horizontal")
    bar.ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    bar.ax.tick_params(labelsize=NAME_SIZE, colors=FAINT, length=2)
    bar.outline.set_visible(False)


def _write(figure: Figure, left: float, bottom: float, text: str, **style: object) -> None:
    width, height = figure.get_size_inches()
    figure.text(left / width, bottom / height, text, **{"color": TEXT_COLOR, **style})


def _draw_panel(
    figure: Figure, panel: Panel, found: Distribution, norm: Normalize, corner: tuple[float, float], names: float
) -> None:
    """Draws a panel whose cells have their upper left corner at `corner`, with room of `names` inches above them."""
    left, top = corner
    _write(figure, left, top + names + 0.08, panel.group, fontsize=HEAD_SIZE)
    size = VALUE_SIZE if panel.cell == CELL else LOW_VALUE_SIZE
    if panel.kinds:
        box = (left + panel.number_width, top, CELL_WIDTH * len(panel.kinds), panel.cell * len(panel.layers))
        axes = _axes(figure, box, len(panel.kinds), len(panel.layers))
        for row, layer in enumerate(panel.layers):
            for column, kind in enumerate(panel.kinds):
                _draw_cell(axes, (column, row), found.shares.get(Place(panel.group, layer, kind)), norm, size)
        axes.set_yticks([row + 0.5 for row in range(len(panel.layers))], panel.layers)
        axes.set_xticks([column + 0.5 for column in range(len(panel.kinds))], panel.kinds, rotation=90)
    if panel.alone:
        start = left + panel.grid_width + (STRIP_GAP if panel.kinds else 0.0)
        axes = _axes(figure, (start, top, CELL_WIDTH, CELL * len(panel.alone)), 1, len(panel.alone))
        for row, kind in enumerate(panel.alone):
            _draw_cell(axes, (0, row), found.shares.get(Place(panel.group, None, kind)), norm, VALUE_SIZE)
        axes.yaxis.tick_right()
        axes.set_xticks([])
        axes.set_yticks([row + 0.5 for row in range(len(panel.alone))], panel.alone)


def _axes(figure: Figure, box: tuple[float, float, float, float], columns: int, rows: int) -> Axes:
    """Axes with a unit for each cell, at left, top, width and height in inches."""
    width, height = figure.get_size_inches()
    left, top, box_width, box_height = box
    axes = figure.add_axes((left / width, (top - box_height) / height, box_width / width, box_height / height))
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=NAME_SIZE, labelcolor=TEXT_COLOR, pad=2.5)
    return axes


def _draw_cell(axes: Axes, corner: tuple[int, int], share: Share | None, norm: Normalize, size: float) -> None:
    is_known = share is not None and share.covered > 0
    color = COLORS(norm(share.share)) if is_known else ABSENT
    axes.add_patch(Rectangle(corner, 1, 1, facecolor=color, edgecolor="white", linewidth=0.6))
    if is_known:
        red, green, blue, _ = color
        ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else TEXT_COLOR
        text = _short(100 * share.share)
        axes.text(corner[0] + 0.5, corner[1] + 0.53, text, ha="center", va="center", fontsize=size, color=ink)


def _short(per_cent: float) -> str:
    """At most three characters, so that it fits into a cell; what is not 0 does not read 0."""
    if 0 < per_cent < 0.1:
        return "<.1"
    return f"{per_cent:.1f}" if 0 < per_cent < 9.95 else f"{per_cent:.0f}"
