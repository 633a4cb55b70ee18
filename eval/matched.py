"""Methods compared at matched forgetting: what each keeps where it has forgotten as much as was asked for.

A weaker method keeps more because it forgets less, so figures at the end of training compare two things at once. Here
each method is followed over its settings and training steps. On one drawing of the items the point is chosen at which
it has forgotten enough and keeps most; on another drawing, which played no part in the choice, its figures are read.
Methods are compared pair by pair on the units (forget splits, base models, seeds) that they share. Needs numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from biasunlearn_trainer.eval.metrics import bootstrap_interval

Interval = tuple[float, float]
KEYS = ("at", "keep", "choose_on", "report_on", "against")


@dataclass(frozen=True)
class Matching:
    """What is compared, and where.

    Attributes:
        at: by metric, the highest value that counts as forgotten (accuracy on the forget set).
        keep: metrics of what is to stay, higher is better; their mean decides between points that have forgotten.
        choose_on: the task whose figures choose a point.
        report_on: the task whose figures are reported, on other items.
        against: the method that the others are compared with; None for the first one.
    """

    at: Mapping[str, float]
    keep: tuple[str, ...]
    choose_on: str
    report_on: str
    against: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Matching:
        """From plain values, as a table's YAML has them.

        Raises:
            ValueError: naming all that is missing, unknown or of another kind, a line each.
        """
        if not isinstance(given, Mapping):
            raise ValueError(f"expected a mapping of {', '.join(KEYS)}; got {given!r}.")
        faults = [f"unknown key `{key}`; there are {', '.join(KEYS)}." for key in given if key not in KEYS]
        faults += [f"`{key}` is missing." for key in KEYS[:-1] if key not in given]
        at, keep = given.get("at", {"": 0.0}), given.get("keep", [""])
        if not isinstance(at, Mapping) or not at or not all(isinstance(v, int | float) for v in at.values()):
            faults.append(f"`at` is {at!r}, expected metrics and the highest value of each, `{{forget_vqa: 0.15}}`.")
        if not isinstance(keep, list | tuple) or not keep or not all(isinstance(name, str) for name in keep):
            faults.append(f"`keep` is {keep!r}, expected a list of metrics.")
        if given.get("choose_on") is not None and given.get("choose_on") == given.get("report_on"):
            faults.append(
                "`choose_on` and `report_on` are the same task; a chosen point looks better on what chose it."
            )
        if faults:
            raise ValueError("\n".join(faults))
        return cls(dict(at), tuple(keep), str(given["choose_on"]), str(given["report_on"]), given.get("against"))


@dataclass(frozen=True)
class Point:
    """A model on its way: one method on one unit, with one setting, after so many steps.

    Attributes:
        method: what is compared.
        unit: what the comparison is paired by: a forget split, a base model, a seed.
        setting: what is tuned, for instance the learning rate.
        step: optimizer steps.
        chosen_on: metrics of the task that chooses.
        reported: metrics of the task that is reported.
    """

    method: str
    unit: str
    setting: str
    step: int
    chosen_on: Mapping[str, float]
    reported: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """One method over the units.

    Attributes:
        method: its name.
        num_units: how many units there are.
        chosen: by unit, the point that was chosen; a unit on which the method never forgot enough is left out.
        means: by metric, mean over the chosen points' reported figures and its 95 % interval over units.
        differences: by metric that is to be kept, and "kept" for their mean: this method minus the one it is compared
            with, on the units where both have a point, with its 95 % interval and their number. Empty for that one.
    """

    method: str
    num_units: int
    chosen: Mapping[str, Point]
    means: Mapping[str, tuple[float, Interval]]
    differences: Mapping[str, tuple[float, Interval, int]] = field(default_factory=dict)


def choose_point(points: Iterable[Point], matching: Matching) -> Point | None:
    """The point that has forgotten enough and keeps most, by the figures of `choose_on`.

    Args:
        points: of one method on one unit.
        matching: what counts as forgotten, and what is to be kept.

    Returns:
        Of equals the one with the fewest steps; None where no point has forgotten enough.

    Example:
        >>> matching = Matching({"forget": 0.15}, ("retain",), "a", "b")
        >>> def point(step, forget, retain):
        ...     return Point("npo", "0", "", step, {"forget": forget, "retain": retain}, {})
        >>> choose_point([point(10, 0.3, 1.0), point(20, 0.1, 0.9), point(30, 0.1, 0.8)], matching).step
        20
    """
    enough = [p for p in points if all(p.chosen_on[metric] <= most for metric, most in matching.at.items())]
    if not enough:
        return None
    return min(enough, key=lambda p: (-_kept(p.chosen_on, matching), p.step))


def _kept(figures: Mapping[str, float], matching: Matching) -> float:
    return float(np.mean([figures[metric] for metric in matching.keep]))


def compare_matched(points: Sequence[Point], matching: Matching) -> list[Comparison]:
    """Compare methods at matched forgetting.

    Args:
        points: of all methods, units, settings and steps.
        matching: what is compared, and where.

    Returns:
        A comparison for each method, in the order in which they come.

    Raises:
        ValueError: where there are no points, or `against` is not among the methods.
    """
    methods = list(dict.fromkeys(point.method for point in points))
    if not methods:
        raise ValueError("There are no points to compare: no run has figures of both tasks.")
    against = matching.against or methods[0]
    if against not in methods:
        raise ValueError(f"There is no method {against!r} to compare with; there are: {', '.join(methods)}.")
    units = list(dict.fromkeys(point.unit for point in points))
    chosen = {method: _chosen(points, method, units, matching) for method in methods}
    return [
        Comparison(
            method,
            len(units),
            chosen[method],
            _means(chosen[method], matching),
            {} if method == against else _differences(chosen[method], chosen[against], matching),
        )
        for method in methods
    ]


def _chosen(points: Sequence[Point], method: str, units: Sequence[str], matching: Matching) -> dict[str, Point]:
    found = {
        unit: choose_point([p for p in points if (p.method, p.unit) == (method, unit)], matching) for unit in units
    }
    return {unit: point for unit, point in found.items() if point is not None}


def _means(chosen: Mapping[str, Point], matching: Matching) -> dict[str, tuple[float, Interval]]:
    if not chosen:
        return {}
    shared = set.intersection(*(set(point.reported) for point in chosen.values()))
    ordered = [name for name in next(iter(chosen.values())).reported if name in shared]
    values = {name: np.array([point.reported[name] for point in chosen.values()]) for name in ordered}
    values["kept"] = np.array([_kept(point.reported, matching) for point in chosen.values()])
    return {name: (float(v.mean()), bootstrap_interval(v, f"matched {name}")) for name, v in values.items()}


def _differences(
    own: Mapping[str, Point], other: Mapping[str, Point], matching: Matching
) -> dict[str, tuple[float, Interval, int]]:
    both = [unit for unit in own if unit in other]
    if not both:
        return {}
    pairs = [(own[unit].reported, other[unit].reported) for unit in both]
    found = {name: np.array([a[name] - b[name] for a, b in pairs]) for name in matching.keep}
    found["kept"] = np.array([_kept(a, matching) - _kept(b, matching) for a, b in pairs])
    return {
        name: (float(d.mean()), bootstrap_interval(d, f"matched difference {name}"), len(both))
        for name, d in found.items()
    }


def verdict(difference: tuple[float, Interval, int] | None) -> str:
    """`keeps more`, `keeps less` or `undecided`, by whether the interval of a difference holds 0."""
    if difference is None:
        return "no common unit"
    low, high = difference[1]
    return "keeps more" if low > 0 else "keeps less" if high < 0 else "undecided"


def matched_markdown(comparisons: Sequence[Comparison], matching: Matching) -> str:
    """The comparison as a Markdown table, and what it says in words."""
    against = matching.against or comparisons[0].method
    shown = [*matching.at, *matching.keep]
    header = ["", "reached", *shown, "kept", f"kept minus {against}", "against it"]
    lines = [header, ["---"] + ["---:"] * (len(header) - 2) + ["---"]]
    for c in comparisons:
        figures = [_figure(c.means.get(name)) for name in (*shown, "kept")]
        difference = c.differences.get("kept")
        said = ["", ""] if c.method == against else [_difference(difference), verdict(difference)]
        lines.append([c.method, f"{len(c.chosen)} of {c.num_units}", *figures, *said])
    limits = " and ".join(f"`{metric}` at most {most:g}" for metric, most in matching.at.items())
    kept = ", ".join(f"`{metric}`" for metric in matching.keep)
    text = (
        f"Of each method the point (setting and step) with {limits} on `{matching.choose_on}` that keeps most there "
        f"(mean of {kept}); the figures are of `{matching.report_on}`. In brackets 95 % intervals over units; "
        "differences are paired by unit."
    )
    return f"{text}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _figure(found: tuple[float, Interval] | None) -> str:
    return "-" if found is None else f"{found[0]:.2f} [{found[1][0]:.2f}, {found[1][1]:.2f}]"


def _difference(found: tuple[float, Interval, int] | None) -> str:
    return "-" if found is None else f"{found[0]:+.2f} [{found[1][0]:+.2f}, {found[1][1]:+.2f}] (n {found[2]})"
