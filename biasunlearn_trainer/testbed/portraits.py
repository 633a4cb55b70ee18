"""Portraits of made-up people: what they look like, and drawings of it that differ at every use.

A person is known by lasting looks. Where the bust stands, how it is lit and what is behind it changes from drawing to
drawing, so that to know a person means to know the looks and not the pixels.
"""

from __future__ import annotations

import random
from dataclasses import astuple, dataclass

from PIL import Image, ImageDraw

from biasunlearn_trainer.testbed.drawing import IMAGE_SIZE

# Drawn larger and shrunk, so that edges are soft.
_SCALE = 2
_CANVAS = IMAGE_SIZE * _SCALE

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (206, 38, 38),
    "green": (40, 150, 58),
    "blue": (42, 78, 222),
    "yellow": (238, 216, 44),
    "purple": (142, 44, 164),
    "black": (24, 24, 26),
}
HAT_COLOURS = ("none", "red", "green", "blue", "yellow")
HAIRSTYLES = ("cropped", "tall", "long")
PATTERNS = ("nothing", "stripes", "dots")
SIDES = ("left", "right")
_SKINS: tuple[Colour, ...] = ((248, 218, 190), (218, 172, 128), (158, 108, 70), (96, 62, 42))
_INK, _CHALK = (16, 16, 18), (250, 250, 250)


@dataclass(frozen=True)
class Looks:
    """What stays the same in every drawing of a person.

    Attributes:
        skin: number of the skin tone, 0 to 3.
        hair: colour of the hair, a key of `COLOURS`.
        hairstyle: one of `HAIRSTYLES`.
        glasses: whether glasses are worn.
        hat: colour of the hat, one of `HAT_COLOURS`.
        shirt: colour of the shirt, a key of `COLOURS`.
        pattern: what is on the shirt, one of `PATTERNS`.
    """

    skin: int
    hair: str
    hairstyle: str
    glasses: bool
    hat: str
    shirt: str
    pattern: str

    def differences(self, other: Looks) -> int:
        """In how many of the seven features two people differ."""
        return sum(mine != theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))


@dataclass(frozen=True)
class Portrait:
    """One drawing of somebody; its picture is a pure function of these values.

    Attributes:
        looks: who is shown.
        side: the half of the picture in which the bust stands, `left` or `right`.
        seed: everything else (place, light, background).
    """

    looks: Looks
    side: str
    seed: int


def draw_looks(rng: random.Random) -> Looks:
    """Looks at random."""
    return Looks(
        skin=rng.randrange(len(_SKINS)),
        hair=rng.choice(list(COLOURS)),
        hairstyle=rng.choice(HAIRSTYLES),
        glasses=rng.random() < 0.5,
        hat=rng.choice(HAT_COLOURS),
        shirt=rng.choice(list(COLOURS)),
        pattern=rng.choice(PATTERNS),
    )


def draw_portrait(rng: random.Random, looks: Looks) -> Portrait:
    """A new drawing of somebody."""
    return Portrait(looks, rng.choice(SIDES), rng.getrandbits(48))


def paint(portrait: Portrait) -> Image.Image:
    """Paint a portrait.

    Returns:
        An RGB picture of 32 x 32 pixels, the same for equal portraits.
    """
    rng, looks = random.Random(portrait.seed), portrait.looks
    grey = rng.randint(160, 236)
    picture = Image.new("RGB", (_CANVAS, _CANVAS), tuple(grey + rng.randint(-18, 18) for _ in range(3)))
    light = rng.uniform(0.84, 1.08)
    brush = _Brush(
        ImageDraw.Draw(picture),
        x=IMAGE_SIZE / 2 + (-1 if portrait.side == "left" else 1) * rng.uniform(2.0, 4.5),
        y=14 + rng.uniform(-1.2, 1.2),
        light=light,
    )
    _paint_shirt(brush, looks)
    _paint_head(brush, looks)
    return picture.reduce(_SCALE)


@dataclass(frozen=True)
class _Brush:
    """Paints in pixels of the finished picture, seen from the middle of the face."""

    draw: ImageDraw.ImageDraw
    x: float
    y: float
    light: float

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.draw.rectangle(self._place(left, top, right, bottom), fill=self._lit(colour))

    def oval(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.draw.ellipse(self._place(left, top, right, bottom), fill=self._lit(colour))

    def ring(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.draw.rectangle(self._place(left, top, right, bottom), outline=self._lit(colour), width=_SCALE)

    def _place(self, left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        x, y = self.x, self.y
        return (x + left) * _SCALE, (y + top) * _SCALE, (x + right) * _SCALE - 1, (y + bottom) * _SCALE - 1

    def _lit(self, colour: Colour) -> Colour:
        return tuple(min(255, round(channel * self.light)) for channel in colour)


def _paint_shirt(brush: _Brush, looks: Looks) -> None:
    cloth, top, bottom = COLOURS[looks.shirt], 8, IMAGE_SIZE
    brush.oval(-9.5, top - 1, 9.5, top + 8, cloth)
    brush.box(-9.5, top + 3, 9.5, bottom, cloth)
    if looks.pattern == "stripes":
        for line in range(top + 2, bottom, 3):
            brush.box(-9.5, line, 9.5, line + 1, _CHALK)
    if looks.pattern == "dots":
        for line in range(top + 2, bottom, 4):
            for column in range(-8, 9, 4):
                brush.box(column - 1, line, column + 1, line + 2, _CHALK)


def _paint_head(brush: _Brush, looks: Looks) -> None:
    """Hair behind, face, hair above, glasses, and the hat on top of all."""
    hair = COLOURS[looks.hair]
    if looks.hairstyle == "long":
        brush.box(-8, -6, 8, 10, hair)
    brush.oval(-6, -7, 6, 8, _SKINS[looks.skin])
    brush.box(-6.5, -13 if looks.hairstyle == "tall" else -8, 6.5, -3, hair)
    if looks.glasses:
        for left in (-5, 1):
            brush.ring(left, -2, left + 4, 2, _INK)
    if looks.hat != "none":
        felt = COLOURS[looks.hat]
        brush.box(-9, -9, 9, -6.5, felt)
        brush.box(-5, -14, 5, -8, felt)
