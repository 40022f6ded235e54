"""YAML files -> nested values -> frozen dataclasses, with an error for everything that does not fit."""

import dataclasses
import difflib
import reprlib
import types
import typing
from typing import Any, Literal

import yaml

from bags.errors import UserError

CHOSEN_BY_NAME = ("classifier", "sampler")  # a new `name` replaces these sections


class _UniqueKeyLoader(yaml.SafeLoader):
    """A key given twice is an error; plain YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        """Adds the check."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for k, key in enumerate(keys) if key in keys[:k]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key '{twice}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """`yaml.safe_load`, but for keys given twice. Raises yaml.YAMLError, ValueError or RecursionError."""
    return yaml.load(text, _UniqueKeyLoader)


def merge(tree: dict, changes: dict) -> dict:
    """Lays `changes` over `tree` in place; a section whose `name` changes is replaced."""
    for key, value in changes.items():
        old = tree.get(key)
        renamed = (
            isinstance(old, dict) and isinstance(value, dict) and value.get("name", old.get("name")) != old.get("name")
        )
        if isinstance(old, dict) and isinstance(value, dict) and not (renamed and key in CHOSEN_BY_NAME):
            merge(old, value)
        else:
            tree[key] = value
    return tree


def shown(value: Any) -> str:
    """A value in an error, cut short: aliases of aliases would fill the memory when spelt out."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxlist, brief.maxdict, brief.maxstring, brief.maxother = 3, 12, 12, 200, 200
    text = brief.repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


# --------------------------------------------------------------------------- types


def convert(value: Any, kind: Any, key: str, source: str) -> Any:
    """`value` as `kind` (dataclass, union, tuple, Literal or scalar), or UserError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _convert_section(value, kind, key, source)
    if origin in (typing.Union, types.UnionType):
        named: list[Any] = [k for k in arguments if dataclasses.is_dataclass(k)]
        sections = {k.name: k for k in named}
        if sections:
            return _convert_section(value, _chosen(value, sections, key, source), key, source)
        for option in arguments:
            try:
                return convert(value, option, key, source)
            except UserError:
                continue
    elif origin is Literal:
        if value in arguments and type(value) in map(type, arguments):
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(convert(v, arguments[0], key, source) for v in value)
    elif kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except (ValueError, OverflowError):
            pass
    elif kind is type(None):
        if value is None:
            return None
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        if kind is str and "\0" in value:
            raise UserError(f"{source}: {key}: a text must not hold NUL characters")
        return value
    raise UserError(f"{source}: {key}: expected {_describe(kind)}, got {shown(value)}{_as_list(value, kind)}")


def _as_list(value: Any, kind: Any) -> str:
    """A hint, where brackets make a list of `value`: 10,100 is a text."""
    if isinstance(value, (int, float, str)) and typing.get_origin(kind) is tuple:
        try:
            convert(parse_yaml(f"[{value}]"), kind, "", "")
            return f"; write [{value}]"
        except (yaml.YAMLError, ValueError, RecursionError):
            pass
    choices = typing.get_args(kind) if typing.get_origin(kind) is not tuple else ()
    return next(filter(None, (_as_list(value, k) for k in choices if typing.get_origin(k) is tuple)), "")


def _convert_section(value: Any, kind: type, key: str, source: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{source}: {key}: expected a section of keys, got {shown(value)}")
    hints, prefix = typing.get_type_hints(kind), f"{key}." if key else ""
    for name in value:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, 1, 0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(hints)}"
            raise UserError(f"{source}: {prefix}{name}: unknown key; {hint}")
    return kind(**{n: convert(v, hints[n], prefix + n, source) for n, v in value.items()})


def _chosen(value: Any, sections: dict, key: str, source: str) -> type:
    if not isinstance(value, dict):
        hint = f"write {key}.name={value}" if value in tuple(sections) else f"names: {', '.join(sections)}"
        raise UserError(f"{source}: {key}: expected a section of keys, got {shown(value)}; {hint}")
    name = value.get("name")
    if not isinstance(name, str) or name not in sections:
        near = difflib.get_close_matches(shown(name), sections, 1)
        hint = f"did you mean {near[0]}?" if near else f"one of: {', '.join(sections)}"
        raise UserError(f"{source}: {key}.name: unknown name {shown(name)}; {hint}")
    return sections[name]


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        return f"a list of ({_describe(arguments[0])})"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(kind, str(kind))
