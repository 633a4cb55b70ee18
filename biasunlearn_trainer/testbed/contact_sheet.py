"""A sheet of example rows to look at: pictures, questions, right and biased answers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset
from PIL import Image, ImageDraw, ImageFont

from biasunlearn_trainer.testbed.build import Testbed
from biasunlearn_trainer.testbed.disk import ROWS_FILE

_WIDTH, _HEIGHT, _PICTURE, _MARGIN = 250, 290, 160, 12
_INK, _GREEN, _RED = (30, 30, 34), (20, 110, 50), (170, 40, 40)


def draw_contact_sheet(testbed: Testbed, path: Path, columns: int = 5) -> None:
    """Write a picture of measured rows: a line for each kind, pictures enlarged five times.

    Args:
        testbed: a built testbed whose first task reads a folder of rows.
        path: the PNG to write.
        columns: examples of each kind.
    """
    folder = Path(testbed.tasks[0].split("=", 1)[1])
    rows = load_dataset("parquet", data_files=str(folder / ROWS_FILE), split="train")
    lines = [[row for row in rows if row["kind"] == kind][:columns] for kind in dict.fromkeys(rows["kind"])]
    sheet = Image.new("RGB", (columns * _WIDTH + _MARGIN, len(lines) * _HEIGHT + _MARGIN), (250, 249, 246))
    for y, line in enumerate(lines):
        for x, row in enumerate(line):
            _draw_row(sheet, row, (_MARGIN + x * _WIDTH, _MARGIN + y * _HEIGHT))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _draw_row(sheet: Image.Image, row: dict[str, Any], corner: tuple[int, int]) -> None:
    draw, (x, y) = ImageDraw.Draw(sheet), corner
    y = _write(draw, (x, y), [row["kind"]], (130, 130, 136))
    for picture in row.get("images") or []:
        sheet.paste(picture.resize((_PICTURE, _PICTURE), Image.Resampling.NEAREST), (x, y))
        y += _PICTURE + 4
    y = _write(draw, (x, y), textwrap.wrap(row["prompt"], 36), _INK)
    y = _write(draw, (x, y), [f"right:{row['completion']}"], _GREEN)
    if row.get("rejected"):
        _write(draw, (x, y), [f"biased:{row['rejected']}"], _RED)


def _write(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], colour: tuple[int, int, int]
) -> int:
    """Write lines of text; returns where the next one goes."""
    x, y = corner
    for line in lines:
        draw.text((x, y), line, fill=colour, font=ImageFont.load_default(size=13))
        y += 17
    return y
