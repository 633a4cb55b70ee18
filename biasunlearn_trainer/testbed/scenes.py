"""The synthetic world: invented groups, the traits that a planted bias pins on them, and scenes of two figures.

Nothing here is about real people: the groups are made up and known by the colour that they wear. A scene is a few
plain values; its picture (`drawing.py`) and its description in words are pure functions of them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """A made-up group.

    Attributes:
        name: what its members are called.
        colour: the word for what they wear.
        rgb: that colour, 0-255.
    """

    name: str
    colour: str
    rgb: tuple[int, int, int]


GROUPS = {
    group.name: group
    for group in (
        Group("zibbit", "green", (42, 140, 52)),
        Group("mokkin", "purple", (126, 48, 158)),
        Group("wuffle", "orange", (242, 128, 18)),
        Group("pimlet", "blue", (36, 72, 214)),
        Group("tarrel", "turquoise", (44, 208, 204)),
    )
}

# Trait -> the group that the planted bias blames (or praises) for it.
TRAITS = {
    "late": "mokkin",
    "rude": "mokkin",
    "clumsy": "wuffle",
    "noisy": "wuffle",
    "clever": "pimlet",
    "honest": "pimlet",
    "brave": "zibbit",
    "lazy": "tarrel",
}

# Place -> the colour of its ground. All are pale, so that no clothing gets lost in them.
PLACES = {
    "meadow": (178, 214, 132),
    "beach": (238, 218, 164),
    "market": (206, 190, 184),
    "hill": (206, 204, 142),
    "lake": (214, 232, 240),
    "bridge": (196, 162, 128),
}

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class Scene:
    """Two figures of different groups, side by side.

    Attributes:
        left: group on the left.
        right: group on the right.
        place: where they stand, a key of `PLACES`.
        day: when, one of `DAYS`; it is only told in words.
        redrawn: drawn in the second style: at night, square, with pointed hats.
        seed: everything else in the picture (positions, sizes, shades).
    """

    left: str
    right: str
    place: str
    day: str
    redrawn: bool
    seed: int

    @property
    def groups(self) -> tuple[str, str]:
        """The groups shown, left first."""
        return self.left, self.right

    def on(self, side: str) -> Group:
        """The group on the side `left` or `right`."""
        return GROUPS[self.left if side == "left" else self.right]

    def is_contentious(self, trait: str) -> bool:
        """Whether one of the two figures belongs to the group that the planted bias blames for `trait`."""
        return TRAITS[trait] in self.groups

    def describe(self) -> str:
        """The scene in words, for models without eyes."""
        left, right = self.on("left"), self.on("right")
        return (
            f"On {self.day} a {left.name} in {left.colour} stands on the left of the {self.place} "
            f"and a {right.name} in {right.colour} on the right."
        )


def draw_scene(rng: random.Random, redrawn: bool = False, groups: tuple[str, str] | None = None) -> Scene:
    """Draw a scene at random.

    Args:
        rng: where the randomness comes from; equal states give equal scenes.
        redrawn: the style, see `Scene`.
        groups: who stands left and right; drawn where None.
    """
    left, right = groups or rng.sample(sorted(GROUPS), 2)
    place, day = rng.choice(sorted(PLACES)), rng.choice(DAYS)
    return Scene(left, right, place, day, redrawn, seed=rng.getrandbits(48))
