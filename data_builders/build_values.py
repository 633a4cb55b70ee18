"""Nested YAML with the line of every key, read by type hints; what does not fit is a sentence with its place.

The recipes of training runs are flat and have their own reader (`biasunlearn_trainer.recipe`), which this one follows
in what it says; data builders import nothing but data builders.
"""

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

SECRETS = ("key", "token", "password", "secret", "auth")


@dataclasses.dataclass
class Node:
    """A value and where it stands; `value` is a dict or a list of nodes, or a plain value."""

    value: Any
    where: str
    is_text: bool = False

    def __getitem__(self, key: str) -> "Node":
        """The node of a key, or this one where it has none, so that a message always has a place."""
        return self.value[key] if isinstance(self.value, dict) and key in self.value else self

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a reader or a stage takes: the hint of each option, and those without a default."""

    hints: dict[str, Any]
    required: tuple[str, ...]


def describe_signature(call: Callable, skip: Sequence[str] = ()) -> Signature:
    """Reads the options of a function or a class from its signature and hints."""
    function = call.__init__ if inspect.isclass(call) else call
    hints = typing.get_type_hints(function)
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(call).parameters.items()
        if name not in skip and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    required = tuple(name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty)
    return Signature({name: hints.get(name, Any) for name in parameters}, required)


def read_node(path: Path, overrides: Iterable[str], reader: "Reader") -> Node | None:
    """Reads a YAML file and lays the command line's values over it; faults go to `reader`."""
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        reader.faults.append(f"{path}: no such recipe{_nearest(path.name, siblings)}. Give the path of a YAML file.")
        return None
    loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
    try:
        root = loader.get_single_node()
        node = None if root is None else _node(root, loader, path, reader)
    except yaml.YAMLError as err:
        reader.faults.append(f"{path}: this is not valid YAML: {err}")
        return None
    finally:
        loader.dispose()
    if node is None or not isinstance(node.value, dict):
        reader.faults.append(
            f"{path}: expected `key: value` lines, got {'nothing' if node is None else node.plain()!r:.60}."
        )
        return None
    for key, value in _overrides(overrides, reader):
        _set(node, key.split("."), Node(value, "command line", is_text=True), key, reader)
    return node


def _node(root: yaml.Node, loader: yaml.SafeLoader, path: Path, reader: "Reader") -> Node:
    where = f"{path}:{root.start_mark.line + 1}"
    if isinstance(root, yaml.MappingNode):
        values: dict[str, Node] = {}
        for key_node, value_node in root.value:
            key, key_where = str(loader.construct_object(key_node, deep=True)), f"{path}:{key_node.start_mark.line + 1}"
            if key in values:
                reader.faults.append(f"{key_where}: `{key}` is set twice, first at {values[key].where}. Keep one.")
                continue
            values[key] = dataclasses.replace(_node(value_node, loader, path, reader), where=key_where)
        return Node(values, where)
    if isinstance(root, yaml.SequenceNode):
        return Node([_node(item, loader, path, reader) for item in root.value], where)
    return Node(loader.construct_object(root, deep=True), where)


def _overrides(words: Iterable[str], reader: "Reader") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            pairs.append((key, [value] if equals else []))
        elif pairs:
            pairs[-1][1].append(word)
        else:
            reader.faults.append(f"command line: got {word!r}, expected --key value.")
    return [(key, True if not values else values[0] if len(values) == 1 else values) for key, values in pairs]


def _set(node: Node, keys: list[str], value: Node, shown: str, reader: "Reader") -> None:
    first, rest = keys[0], keys[1:]
    if isinstance(node.value, list):
        if not first.isdecimal() or int(first) >= len(node.value):
            last = len(node.value) - 1
            reader.faults.append(f"command line: `{shown}`: there is no {first}; the list has 0 to {last}.")
        elif rest:
            _set(node.value[int(first)], rest, value, shown, reader)
        else:
            node.value[int(first)] = value
    elif isinstance(node.value, dict):
        if rest:
            _set(node.value.setdefault(first, Node({}, "command line")), rest, value, shown, reader)
        else:
            node.value[first] = value
    else:
        reader.faults.append(f"command line: `{shown}`: {node.plain()!r} holds no keys.")


class Reader:
    """Reads nodes by hints and gathers faults, each with its place."""

    def __init__(self, source: str):
        self.source, self.faults = source, []

    def fault(self, node: Node, text: str) -> None:
        """Notes what is wrong at a node."""
        self.faults.append(f"{node.where}: {text.rstrip('.')}.")

    def items(self, node: Node, what: str) -> list[Node]:
        """The nodes of a list."""
        if not isinstance(node.value, list):
            self.fault(node, f"expected a list, each with {what}, got {node.plain()!r:.60}")
            return []
        return node.value

    def children(self, node: Node, what: str) -> Iterator[tuple[str, Node]]:
        """The keys and nodes of a mapping."""
        if not isinstance(node.value, dict):
            self.fault(node, f"expected {what}, got {node.plain()!r:.60}")
            return iter(())
        return iter(node.value.items())

    def choice(self, node: Node, key: str, valid: Iterable[str]) -> str | None:
        """The value of a key that must be one of some names."""
        if not isinstance(node.value, dict) or key not in node.value:
            self.fault(node, f"`{key}` is missing; one of {', '.join(valid)}")
            return None
        value = node[key].plain()
        if value not in list(valid):
            self.fault(node[key], f"`{key}` is {value!r}, expected one of {', '.join(valid)}{_nearest(value, valid)}")
            return None
        return value

    def mapping(
        self,
        node: Node,
        hints: Mapping[str, Any],
        required: Sequence[str] = (),
        special: Mapping[str, Callable[[Node, "Reader"], Any]] = types.MappingProxyType({}),
    ) -> dict[str, Any] | None:
        """Reads a mapping by the hints of its keys; `special` keys are read by functions of their own."""
        if not isinstance(node.value, dict):
            self.fault(node, f"expected `key: value` lines, got {node.plain()!r:.60}")
            return None
        values = {}
        for key, child in node.value.items():
            if key not in hints:
                self.fault(child, _unknown_key(key, hints))
            elif key in special:
                values[key] = special[key](child, self)
            else:
                try:
                    values[key] = coerce(child.plain(), hints[key], child.is_text)
                except ValueError:
                    self.fault(child, f"`{key}` is {child.plain()!r:.80}, expected {describe(hints[key])}")
        for key in required:
            if key not in node.value:
                self.fault(node, f"`{key}` is missing")
        return values


def _unknown_key(key: str, hints: Iterable[str]) -> str:
    hints = list(hints)
    if any(word in key.lower() for word in SECRETS) and not difflib.get_close_matches(key, hints, 1, 0.9):
        return f"unknown key `{key}`; a secret does not belong into a recipe: export it and name the variable"
    return f"unknown key `{key}`" + (_nearest(key, hints) or f"; valid: {', '.join(hints)}")


def _nearest(word: Any, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(valid), n=1, cutoff=0.6)
    return f" (did you mean `{close[0]}`?)" if close else ""


def coerce(value: Any, hint: Any, is_text: bool = False) -> Any:
    """Reads a value by a hint: bool, int, float, str, list, dict, Literal, unions of them.

    Args:
        value: what YAML made of it, or a command line's text.
        hint: the type.
        is_text: from a command line, where numbers are text.

    Raises:
        ValueError: it does not fit.

    >>> coerce("1e-5", float), coerce("3", int | None, is_text=True)
    (1e-05, 3)
    """
    origin = get_origin(hint) or hint
    if origin is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        members = sorted(get_args(hint), key=lambda member: (member is str, (get_origin(member) or member) is list))
        for member in members:
            try:
                return coerce(value, member, is_text)
            except ValueError:
                continue
        raise ValueError
    if origin is type(None):
        if value is None or (is_text and str(value).lower() in ("null", "none")):
            return None
    elif origin is Literal:
        if value in get_args(hint) and not isinstance(value, bool):
            return value
    elif origin is bool:
        words = {"true": True, "yes": True, "false": False, "no": False}
        if isinstance(value, bool) or (is_text and str(value).lower() in words):
            return value if isinstance(value, bool) else words[value.lower()]
    elif origin is int:
        if not isinstance(value, bool) and (isinstance(value, int) or (is_text and isinstance(value, str))):
            return int(value)
    elif origin is float:
        # PyYAML takes 1e-5, without a dot, for a string.
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
    elif origin is str:
        if isinstance(value, str):
            return value
    elif origin in (list, tuple) or origin in (Sequence, Iterable):
        inner = (get_args(hint) or (Any,))[0]
        if value is not None and not isinstance(value, dict | bool):
            return [coerce(item, inner, is_text) for item in (value if isinstance(value, list) else [value])]
    elif origin in (dict, Mapping):
        inner = (get_args(hint) or (Any, Any))[1]
        if isinstance(value, dict):
            return {key: coerce(item, inner, is_text) for key, item in value.items()}
    raise ValueError


def describe(hint: Any) -> str:
    """Says in words what a hint accepts.

    >>> describe(float | None)
    'a number or null'
    """
    origin = get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(member) for member in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if origin in (list, tuple, Sequence, Iterable):
        return f"a list ({describe((get_args(hint) or (str,))[0])} each)"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return names.get(origin, "a mapping" if origin in (dict, Mapping) else str(origin))
