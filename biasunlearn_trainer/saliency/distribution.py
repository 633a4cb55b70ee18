"""How chosen weights, salient or most changed, spread over a model's places; as tables and as JSON."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from biasunlearn_trainer.saliency.masks import SaliencyMask
from biasunlearn_trainer.saliency.places import Place, Places


@dataclass(frozen=True)
class Share:
    """A part of a set of weights.

    Attributes:
        covered: how many weights there are.
        chosen: how many of them were chosen; not whole where a tie was split.
    """

    covered: int = 0
    chosen: float = 0

    @property
    def share(self) -> float:
        """chosen / covered, 0 to 1; 0 of no weights."""
        return self.chosen / max(1, self.covered)

    def __add__(self, other: Share) -> Share:
        return Share(self.covered + other.covered, self.chosen + other.chosen)

    def to_dict(self) -> dict[str, float]:
        """As JSON holds it."""
        return {"covered": self.covered, "chosen": self.chosen, "share": self.share}


@dataclass(frozen=True)
class Distribution:
    """Shares by place.

    Attributes:
        title: what was chosen, in a few words.
        shares: by place, in the model's order.
        facts: what else is known, for the JSON.
    """

    title: str
    shares: Mapping[Place, Share]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> Share:
        """The share of all weights together."""
        return sum(self.shares.values(), Share())

    @property
    def groups(self) -> list[str]:
        """The groups with any weight, in the model's order."""
        return list(dict.fromkeys(place.group for place in self.shares))

    def of_groups(self, groups: Iterable[str]) -> Share:
        """The share of one group, or of several together."""
        chosen = set(groups)
        return sum((share for place, share in self.shares.items() if place.group in chosen), Share())

    def unions(self) -> dict[tuple[str, ...], Share]:
        """Shares of the groups and of all their unions, smaller unions first."""
        sizes = range(1, len(self.groups) + 1)
        return {some: self.of_groups(some) for size in sizes for some in combinations(self.groups, size)}

    def kinds(self, group: str) -> dict[str, Share]:
        """Shares by module kind, over all layers of a group."""
        found: dict[str, Share] = defaultdict(Share)
        for place, share in self.shares.items():
            if place.group == group:
                found[place.kind] += share
        return dict(found)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "title": self.title,
            **self.facts,
            **self.total.to_dict(),
            "groups": [{"groups": list(some), **share.to_dict()} for some, share in self.unions().items()],
            "places": [
                {"group": place.group, "layer": place.layer, "kind": place.kind, **share.to_dict()}
                for place, share in self.shares.items()
            ],
        }


def in_mask(mask: SaliencyMask, places: Places) -> Distribution:
    """How a mask's salient weights spread over a model.

    Args:
        mask: of the model's weights or of its adapter's; weights that it does not cover count nowhere.
        places: of the model.

    Raises:
        KeyError: where the mask has an entry for a weight that the model lacks.
    """
    found: dict[Place, Share] = defaultdict(Share)
    for name in mask.shapes:
        found[places.of(name)] += Share(math.prod(mask.shapes[name]), mask.count(name))
    made = mask.provenance
    kind = {"fisher": "Salient weights", "random": "Random mask"}.get(made.get("kind"), "Masked weights")
    shares = {place: found[place] for place in places.sizes if place in found}
    return Distribution(kind, shares, {"mask": {key: value for key, value in made.items() if key != "dtypes"}})


def groups_table(found: Sequence[Distribution]) -> str:
    """Markdown: a row for each group and union of groups; the counts of the first distribution, the shares of all."""
    unions = list(dict.fromkeys(some for one in found for some in one.unions()))
    unions.sort(key=len)
    rows = []
    for some in unions:
        first, *others = (one.unions().get(some, Share()) for one in found)
        counts = [f"{first.covered:,}", _count(first.chosen)] if first.covered else ["", ""]
        rows.append([" + ".join(some), *counts, *map(percent, (first, *others))])
    return markdown_table(["groups", "weights", "chosen", *(one.title for one in found)], rows)


def layers_table(found: Distribution, group: str) -> str:
    """Markdown: a row for each layer of a group, a column for each module kind, shares in per cent."""
    cells = {(place.layer, place.kind): share for place, share in found.shares.items() if place.group == group}
    kinds = list(dict.fromkeys(kind for layer, kind in cells if layer is not None))
    layers = sorted({layer for layer, _ in cells if layer is not None})
    rows = [[str(layer), *(percent(cells.get((layer, kind))) for kind in kinds)] for layer in layers]
    totals = found.kinds(group)
    rows.append(["all", *(percent(totals[kind]) for kind in kinds)])
    return markdown_table(["layer", *kinds], rows) if layers else ""


def single_table(found: Distribution, group: str) -> str:
    """Markdown: the modules of a group that are in no layer."""
    alone = {place.kind: share for place, share in found.shares.items() if place.group == group and place.layer is None}
    rows = [[kind, f"{share.covered:,}", _count(share.chosen), percent(share)] for kind, share in alone.items()]
    return markdown_table(["module", "weights", "chosen", "share"], rows) if alone else ""


def percent(share: Share | None) -> str:
    """A share in per cent, empty where there is nothing to have a share of."""
    return f"{100 * share.share:.1f} %" if share is not None and share.covered else ""


def _count(number: float) -> str:
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.1f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column holds names, and the others numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
