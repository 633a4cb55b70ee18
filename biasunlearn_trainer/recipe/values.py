"""Checks a recipe's values against the types that its dataclasses declare.

PyYAML and argparse lose what a person meant: `1e-5` is a string, `method: yes` a boolean, `beta:` None, and the first
wrong type ends the run. Here a value is read by the type of its field, and what does not fit is a sentence.
"""

import dataclasses
import json
import math
import types
from collections.abc import Iterable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from biasunlearn_trainer.recipe.keys import Entry, nearest


@dataclasses.dataclass(frozen=True)
class FieldSpec:
    """What a field of a config dataclass accepts."""

    name: str
    hint: Any
    default: Any
    choices: tuple | None
    help: str
    owner: type


def field_specs(classes: Iterable[type]) -> dict[str, FieldSpec]:
    """Lists what the dataclasses accept, by field name.

    Args:
        classes: config dataclasses; the first to declare a name owns it.
    """
    specs: dict[str, FieldSpec] = {}
    for cls in classes:
        hints = get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if f.init and f.name not in specs:
                default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
                choices = tuple(f.metadata["choices"]) if f.metadata.get("choices") else None
                specs[f.name] = FieldSpec(f.name, hints[f.name], default, choices, f.metadata.get("help", ""), cls)
    return specs


def coerce_entry(entry: Entry, spec: FieldSpec) -> Any:
    """Turns what was written into a value that the field accepts.

    Args:
        entry: the key and what was written.
        spec: the field.

    Returns:
        The value; numbers written as `1e-5` become floats, one word for a list becomes a list of one.

    Raises:
        ValueError: the value fits none of the field's types or choices; the text says what was got and expected.
    """
    if entry.value is None and (spec.default is None or type(None) in get_args(spec.hint)):
        return None
    try:
        value = _coerce(entry.value, spec.hint, entry.is_text)
    except _Mismatch:
        expected = _choices_text(entry.value, spec.choices) if spec.choices else describe(spec.hint, entry.value)
        raise ValueError(f"`{entry.key}` is {_got(entry)}, expected {expected}.") from None
    if spec.choices and value is not None and value not in spec.choices:
        raise ValueError(f"`{entry.key}` is {_got(entry)}, expected {_choices_text(value, spec.choices)}.")
    return value


class _Mismatch(Exception):
    """A value is not of a type."""


def _coerce(value: Any, hint: Any, is_text: bool) -> Any:
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(_is_enum(m) for m in members):
        members = tuple(m for m in members if m is not str)
    for member in sorted(members, key=_eagerness):
        try:
            return _coerce_one(value, member, is_text, has_str=str in members)
        except _Mismatch:
            continue
    raise _Mismatch


def _eagerness(member: Any) -> int:
    """Text fits everything on a command line, so it is tried late; a list takes any single value, so it comes last."""
    return 2 if get_origin(member) is list or member is list else 1 if member is str else 0


def _coerce_one(value: Any, member: Any, is_text: bool, has_str: bool) -> Any:
    origin = get_origin(member) or member
    if origin is type(None):
        if value is None or (is_text and not has_str and str(value).lower() in ("null", "none")):
            return None
        raise _Mismatch
    if origin is Any:
        return value
    if origin is Literal or _is_enum(origin):
        allowed = get_args(member) if origin is Literal else [m.value for m in origin]
        for choice in allowed:
            if (value == choice and type(value) is type(choice)) or (is_text and value == str(choice)):
                return choice
        raise _Mismatch
    reader = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str, list: _to_list, dict: _to_dict}.get(origin)
    if reader is None:
        raise _Mismatch
    return reader(value, member, is_text)


def _to_bool(value: Any, member: Any, is_text: bool) -> bool:
    words = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
    if isinstance(value, bool):
        return value
    if is_text and str(value).lower() in words:
        return words[str(value).lower()]
    raise _Mismatch


def _to_int(value: Any, member: Any, is_text: bool) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if is_text and isinstance(value, str) and value.lstrip("+-").isdecimal():
        return int(value)
    raise _Mismatch


def _to_float(value: Any, member: Any, is_text: bool) -> float:
    """Strings count from YAML too: PyYAML takes `1e-5`, without a dot, for a string."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _Mismatch
    try:
        number = float(value)
    except ValueError:
        raise _Mismatch from None
    if not math.isfinite(number):
        raise _Mismatch
    return value if isinstance(value, int) else number


def _to_str(value: Any, member: Any, is_text: bool) -> str:
    if isinstance(value, str):
        return value
    raise _Mismatch


def _to_list(value: Any, member: Any, is_text: bool) -> list:
    inner = (get_args(member) or (Any,))[0]
    if isinstance(value, dict) or value is None or (is_text and value is True):
        raise _Mismatch
    return [_coerce(item, inner, is_text) for item in (value if isinstance(value, list) else [value])]


def _to_dict(value: Any, member: Any, is_text: bool) -> dict:
    if isinstance(value, dict):
        return value
    try:
        loaded = json.loads(value) if isinstance(value, str) else None
    except json.JSONDecodeError:
        loaded = None
    if isinstance(loaded, dict):
        return loaded
    raise _Mismatch


def _is_enum(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, Enum)


def describe(hint: Any, value: Any = None) -> str:
    """Says in words what a type hint accepts.

    Args:
        hint: a type, a union, a Literal, an Enum or a list of those.
        value: what was got, to name the nearest of several choices.

    >>> describe(float | None)
    'a number or null'
    """
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(_is_enum(m) for m in members):
        members = tuple(m for m in members if m is not str)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    words = []
    for member in members:
        origin = get_origin(member) or member
        if origin is Literal:
            words.append(_choices_text(value, get_args(member)))
        elif _is_enum(origin):
            words.append(_choices_text(value, [m.value for m in origin]))
        elif origin is list:
            words.append(f"a list ({describe((get_args(member) or (str,))[0])} each)")
        else:
            words.append(
                names.get(origin, "a mapping" if origin is dict else f"a {getattr(origin, '__name__', origin)}")
            )
    return " or ".join(dict.fromkeys(words))


def _choices_text(value: Any, choices: Iterable) -> str:
    choices = [str(c) for c in choices]
    return f"one of {', '.join(choices)}{nearest(str(value), choices)}"


def _got(entry: Entry) -> str:
    """Names what was got, and the YAML trap behind it where there is one."""
    value = entry.value
    if value is None:
        return "empty (null)"
    if value is True and entry.is_text:
        return "given without a value"
    if isinstance(value, bool):
        trap = "YAML reads a bare yes, no, on or off as one; quote it if you mean the word"
        return f"the boolean {str(value).lower()} ({trap})"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    return repr(value)
