"""The heat map: what stands where, in which colour, and that nothing overlaps."""

from itertools import combinations

import pytest
from matplotlib.text import Text
from PIL import Image

from biasunlearn_trainer.saliency.distribution import Distribution, Share
from biasunlearn_trainer.saliency.heatmap import ABSENT, COLORS, build_heatmap, color_range, draw_heatmap, plan_panels
from biasunlearn_trainer.saliency.places import Place

KINDS = ["self_attn.q_proj", "mlp.up_proj", "post_attention_layernorm", "crossattention.output.LayerNorm"]


def distribution(layers, kinds=KINDS, groups=("language_model", "vision_tower"), title="Salient weights"):
    """Shares that grow layer by layer from 0 to 1; a connector without layers."""
    shares = {}
    for group in groups:
        shares[Place(group, None, "embeddings.position_embedding")] = Share(100, 25)
        for layer in range(layers):
            shares |= {Place(group, layer, kind): Share(1000, 1000 * layer // max(1, layers - 1)) for kind in kinds}
    shares[Place("connector", None, "linear_1")] = Share(10, 5)
    return Distribution(title, shares)


def texts_of(figure):
    """The texts with their boxes in pixels, their own margins taken off."""
    renderer = figure.canvas.get_renderer()
    figure.canvas.draw()
    found = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in found]


@pytest.mark.parametrize(("layers", "rows"), [(1, 1), (3, 3), (32, 1)])
def test_nothing_overlaps_or_leaves_the_picture(layers, rows):
    found = [distribution(layers, title="Most changed by a_folder_with_quite_a_long_name/" * 3)] * rows
    figure = build_heatmap(found, "A heading that is longer than the picture is wide, and so is broken into lines " * 2)
    width, height = figure.get_size_inches() * figure.dpi
    boxes = texts_of(figure)
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    for (text, box), (other, other_box) in combinations(boxes, 2):
        across = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
        along = min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
        assert across <= 1 or along <= 1, (text, other)


def test_rows_are_layers_and_columns_kinds():
    (language, vision, connector) = plan_panels([distribution(3)])
    assert (language.layers, language.kinds, language.alone) == ([0, 1, 2], KINDS, ["embeddings.position_embedding"])
    assert vision.group == "vision_tower"
    assert (connector.layers, connector.kinds, connector.alone) == ([], [], ["linear_1"])
    figure = build_heatmap([distribution(3)], "x")
    grid = next(axes for axes in figure.axes if len(axes.get_xticks()) == len(KINDS))
    assert [tick.get_text() for tick in grid.get_xticklabels()] == KINDS
    assert [tick.get_text() for tick in grid.get_yticklabels()] == ["0", "1", "2"]
    shown = [text.get_text() for text in grid.texts]
    assert shown == ["0"] * 4 + ["50"] * 4 + ["100"] * 4
    colours = [patch.get_facecolor() for patch in grid.patches]
    assert colours[0] == COLORS(0.0) and colours[4] == COLORS(0.5) and colours[-1] == COLORS(1.0)


def test_what_one_row_lacks_is_grey():
    both, less = distribution(2), distribution(2, groups=("language_model",))
    figure = build_heatmap([less, both], "x")
    grids = [axes for axes in figure.axes if len(axes.get_xticks()) == len(KINDS)]
    assert len(grids) == 4
    uncovered = grids[1]
    assert not uncovered.texts
    red = int(ABSENT[1:3], 16) / 255
    assert all(patch.get_facecolor()[:3] == pytest.approx((red, red, red)) for patch in uncovered.patches)


@pytest.mark.parametrize(
    ("shares", "limits"),
    [
        ([0.0, 1.0], (0, 1)),
        ([0.71, 0.74], (0.7, 0.8)),
        ([0.98, 1.0], (0.9, 1)),
        ([0.0], (0, 0.1)),
        ([0.4, 0.62], (0.4, 0.65)),
    ],
)
def test_the_scale_is_what_is_there_but_never_too_narrow(shares, limits):
    found = Distribution("x", {Place("g", None, str(i)): Share(100, 100 * share) for i, share in enumerate(shares)})
    norm = color_range([found])
    assert (norm.vmin, norm.vmax) == pytest.approx(limits)


def test_a_small_share_does_not_read_as_none():
    found = Distribution("x", {Place("g", 0, "a"): Share(10_000, 1), Place("g", 0, "b"): Share(10_000, 240)})
    shown = {text for text, _ in texts_of(build_heatmap([found], "x"))}
    assert {"<.1", "2.4"} <= shown and "0" in shown  # the layer's number


def test_the_file_appears_whole(tmp_path):
    path = tmp_path / "map.png"
    draw_heatmap(path, [distribution(2)], "x")
    with Image.open(path) as picture:
        assert picture.size[0] > 900
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]
