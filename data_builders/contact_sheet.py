"""A sheet of rows with pictures, to look at: each picture, its question and its answer."""

import io
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from biasunlearn_trainer.data_builders.images import image_bytes
from biasunlearn_trainer.data_builders.near_duplicates import plain_text

_WIDTH, _PICTURE, _MARGIN, _LINE = 250, 226, 12, 17
_INK, _GREY = (30, 30, 34), (110, 110, 116)


def draw_contact_sheet(
    rows: Iterable[Mapping[str, Any]], path: Path, columns: int = 4, counts: Mapping[str, int] | None = None
) -> int:
    """Draws the rows that have pictures as a PNG.

    Args:
        rows: in the schema's columns; of several pictures the first is drawn.
        path: the PNG.
        columns: rows side by side.
        counts: how many rows the whole set has of each bias type, which then stands beside its name.

    Returns:
        How many were drawn; with none, no file is written.
    """
    tiles = [_tile(row, counts or {}) for row in rows if row.get("images")]
    if not tiles:
        return 0
    lines = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in line) for line in lines]
    width = min(columns, len(tiles)) * _WIDTH + _MARGIN
    sheet = PIL.Image.new("RGB", (width, sum(heights) + _MARGIN * (len(lines) + 1)), (250, 249, 246))
    y = _MARGIN
    for line, height in zip(lines, heights, strict=True):
        for number, tile in enumerate(line):
            sheet.paste(tile, (_MARGIN + number * _WIDTH, y))
        y += height + _MARGIN
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return len(tiles)


def row_label(row: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """Bias type, with its count, and polarity.

    >>> row_label({"bias_type": "age", "polarity": "neutral"}, {"age": 20})
    'age (n = 20) neutral'
    """
    bias_type = row.get("bias_type") or ""
    count = f"(n = {counts[bias_type]})" if bias_type in counts else ""
    return " ".join(part for part in (bias_type, count, row.get("polarity") or "") if part)


def _tile(row: Mapping[str, Any], counts: Mapping[str, int]) -> PIL.Image.Image:
    with PIL.Image.open(io.BytesIO(image_bytes(row["images"][0]))) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((_PICTURE, _PICTURE))
    label = row_label(row, counts)
    # Of a drawn picture what was asked for, so that one sees whether it is there.
    drawn = [(f"drawn: {row['drawn_prompt']}", _GREY)] if row.get("drawn_prompt") else []
    texts = [(label, _GREY), *drawn, (plain_text(row["prompt"]), _INK), (plain_text(row["completion"]), _INK)]
    lines = [(line, colour) for text, colour in texts for line in textwrap.wrap(text, 34)[:6]]
    tile = PIL.Image.new("RGB", (_WIDTH, _PICTURE + 6 + _LINE * len(lines)), (250, 249, 246))
    tile.paste(picture, (0, 0))
    draw, font = PIL.ImageDraw.Draw(tile), PIL.ImageFont.load_default(size=13)
    for number, (line, colour) in enumerate(lines):
        draw.text((0, _PICTURE + 6 + _LINE * number), line, fill=colour, font=font)
    return tile
