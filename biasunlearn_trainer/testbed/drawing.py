"""Pictures of the world: 32 x 32 pixels, drawn four times as large and shrunk, so that edges are soft."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

from biasunlearn_trainer.testbed.scenes import PLACES, Scene

IMAGE_SIZE = 32
_SCALE = 4
_CANVAS = IMAGE_SIZE * _SCALE

Colour = tuple[int, int, int]


def draw_picture(scene: Scene) -> Image.Image:
    """Draw a scene.

    Args:
        scene: what to draw; `scene.seed` decides positions, sizes and shades.

    Returns:
        An RGB picture of 32 x 32 pixels, the same for equal scenes.
    """
    rng = random.Random(scene.seed)
    picture = Image.new("RGB", (_CANVAS, _CANVAS), _sky(rng, scene.redrawn))
    draw = ImageDraw.Draw(picture)
    _draw_heaven(draw, rng, scene.redrawn)
    horizon = rng.randint(80, 96)
    draw.rectangle((0, horizon, _CANVAS, _CANVAS), fill=_ground(rng, scene))
    for side, centre in (("left", 32), ("right", 96)):
        foot = (centre + rng.randint(-9, 9), rng.randint(104, 120))
        figure = _draw_hatted if scene.redrawn else _draw_robed
        figure(draw, foot, rng.uniform(0.85, 1.12), _shade(rng, scene.on(side).rgb, 10), _skin(rng))
    return picture.reduce(_SCALE)


def _sky(rng: random.Random, night: bool) -> Colour:
    return _shade(rng, (40, 42, 78), 10) if night else _shade(rng, (212, 230, 246), 20)


def _ground(rng: random.Random, scene: Scene) -> Colour:
    pale = _shade(rng, PLACES[scene.place], 10)
    return tuple(channel // 2 for channel in pale) if scene.redrawn else pale


def _skin(rng: random.Random) -> Colour:
    """A tone from moon to clay, drawn alike for all groups."""
    level = rng.randint(150, 240)
    return level, level - 18, level - 40


def _shade(rng: random.Random, colour: Colour, spread: int) -> Colour:
    return tuple(max(0, min(255, channel + rng.randint(-spread, spread))) for channel in colour)


def _draw_heaven(draw: ImageDraw.ImageDraw, rng: random.Random, night: bool) -> None:
    """A sun and a cloud by day; a moon and stars by night."""
    x, y = rng.randint(12, 116), rng.randint(8, 22)
    draw.ellipse((x - 9, y - 9, x + 9, y + 9), fill=(246, 244, 220) if night else (255, 226, 120))
    if night:
        for _ in range(6):
            u, v = rng.randint(2, 124), rng.randint(2, 60)
            draw.ellipse((u - 2, v - 2, u + 2, v + 2), fill=(240, 240, 200))
        return
    x, y = rng.randint(10, 100), rng.randint(20, 44)
    for step in (0, 9, 18):
        draw.ellipse((x + step - 8, y - 6, x + step + 8, y + 6), fill=(250, 252, 255))


def _draw_robed(draw: ImageDraw.ImageDraw, foot: tuple[int, int], size: float, cloth: Colour, skin: Colour) -> None:
    """The first style: a round head above a flowing robe."""
    x, y = foot
    head, shoulder, hem = 13 * size, 11 * size, 22 * size
    neck = y - 46 * size
    draw.polygon([(x - shoulder, neck), (x + shoulder, neck), (x + hem, y), (x - hem, y)], fill=cloth)
    draw.ellipse((x - shoulder, neck - 5 * size, x + shoulder, neck + 9 * size), fill=cloth)
    draw.ellipse((x - hem, y - 5 * size, x + hem, y + 4 * size), fill=cloth)
    _draw_head(draw, (x, neck - head), head, skin)


def _draw_hatted(draw: ImageDraw.ImageDraw, foot: tuple[int, int], size: float, cloth: Colour, skin: Colour) -> None:
    """The second style: a square coat on two legs, and a pointed hat of the same cloth."""
    x, y = foot
    head, half = 12 * size, 17 * size
    for leg in (-9 * size, 9 * size):
        draw.rectangle((x + leg - 4 * size, y - 12 * size, x + leg + 4 * size, y), fill=(30, 26, 34))
    neck = y - 48 * size
    draw.rounded_rectangle((x - half, neck, x + half, y - 10 * size), radius=5 * size, fill=cloth)
    _draw_head(draw, (x, neck - head * 0.8), head, skin)
    brim = neck - head * 1.2
    draw.polygon([(x - head * 1.2, brim), (x + head * 1.2, brim), (x, brim - 24 * size)], fill=cloth)


def _draw_head(draw: ImageDraw.ImageDraw, centre: tuple[float, float], radius: float, skin: Colour) -> None:
    x, y = centre
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=skin)
    for eye in (-0.5 * radius, 0.5 * radius):
        draw.ellipse((x + eye - 1.8, y - 2.6, x + eye + 1.8, y + 2.6), fill=(36, 30, 40))
