"""YAML files -> nested values -> frozen dataclasses, with an error for everything that does not fit."""

import dataclasses
import difflib
import inspect
import reprlib
import types
import typing
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Literal

import yaml

from bags.core.errors import UserError
from bags.core.settings import types_of

CHOSEN_BY_NAME = ("classifier", "sampler")  # a new `name` replaces these sections
NULLS = ("", "~", "null", "Null", "NULL")  # the spellings of null in YAML
MERGE = "tag:yaml.org,2002:merge"
MOST_MERGED = 10_000  # keys of a file that come from merge keys
MOST_ITEMS = 1_000_000  # of a list, or of its lists together
MOST_SECTIONS = 100  # of a list of sections
DEEPEST = 12  # sections in each other


class _UniqueKeyLoader(yaml.SafeLoader):
    """A key given twice is an error; plain YAML would silently keep the last.

    Merge keys (`<<`) follow YAML's rule, which not every version of PyYAML does: the mapping's own keys come first,
    then those of the first mapping that is merged.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.flat: set[yaml.Node] = set()  # mappings whose keys are checked and whose merge keys are resolved
        self.merged = 0

    def flatten_mapping(self, node: Any) -> None:
        """Checks the keys of a mapping, then replaces its merge key by what it stands for."""
        if node in self.flat:
            return
        self.flat.add(node)
        given: dict[Hashable, tuple] = {}
        merged: dict[Hashable, tuple] = {}
        for pair in node.value:
            key = MERGE if pair[0].tag == MERGE else self.construct_object(pair[0], deep=True)
            if not isinstance(key, Hashable):
                raise _refusal(pair[0], "a key must not be a list or a mapping")
            if key in given:
                raise _refusal(node, f"key '{pair[0].value}' is given twice")
            given[key] = pair
        for part in self._parts(given.pop(MERGE, (None, None))[1]):
            for pair in part.value:
                merged.setdefault(self.construct_object(pair[0], deep=True), pair)
        node.value = list({**merged, **given}.values())

    def _parts(self, node: yaml.Node | None) -> Iterator[yaml.Node]:
        """The mappings that a merge key names; their number of keys is limited, as aliases of aliases are many."""
        for part in node.value if isinstance(node, yaml.SequenceNode) else [node] if node else []:
            if not isinstance(part, yaml.MappingNode):
                raise _refusal(part, "<<: expected a mapping, or a list of them")
            self.flatten_mapping(part)
            self.merged += len(part.value)
            if self.merged > MOST_MERGED:
                raise _refusal(part, f"merge keys (<<) add up to more than {MOST_MERGED} keys")
            yield part


def _whole(loader: _UniqueKeyLoader, node: Any) -> int:
    """Refuse whole numbers that YAML 1.1 reads as another number than they look: 010 as 8, and 1:30 as 90."""
    value, digits = loader.construct_yaml_int(node), node.value.replace("_", "").lstrip("+-")
    if ":" in digits or (len(digits) > 1 and digits.isdecimal() and digits[0] == "0"):
        raise _refusal(node, f"{node.value} is read as {value}; write that, or quote a text")
    return value


def _fraction(loader: _UniqueKeyLoader, node: Any) -> float:
    """Refuse numbers of minutes and seconds, which YAML 1.1 reads in seconds."""
    value = loader.construct_yaml_float(node)
    if ":" in node.value:
        raise _refusal(node, f"{node.value} is read as {value}; write that, or quote a text")
    return value


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:int", _whole)
_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:float", _fraction)


def _refusal(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


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


def need_sections(tree: Any, kind: type, key: str, source: str) -> None:
    """Raise UserError for a section of a layer that is no mapping. `merge` would hide it, or what it is laid over."""
    if not isinstance(tree, dict):
        raise UserError(f"{source}: {key}: expected a section of keys, got {shown(tree)}")
    hints, prefix = types_of(kind), f"{key}." if key else ""
    for name, value in tree.items():
        options = typing.get_args(hints.get(name)) or (hints.get(name),)
        sections: list[Any] = [option for option in options if dataclasses.is_dataclass(option)]
        if len(sections) > 1 and not isinstance(value, dict):
            convert(value, hints[name], prefix + name, source)  # which names the sections to choose from
        elif len(sections) == 1:
            need_sections(value, sections[0], prefix + name, source)


def shown(value: Any) -> str:
    """A value in an error, cut short: aliases of aliases would fill the memory when spelt out."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxlist, brief.maxdict, brief.maxstring, brief.maxother = 3, 12, 12, 200, 200
    try:
        text = brief.repr(value)
    except ValueError:  # Python does not print whole numbers of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 300 else f"{text[:300]}..."


# --------------------------------------------------------------------------- types


def convert(value: Any, kind: Any, key: str, source: str) -> Any:
    """`value` as `kind` (dataclass, union, tuple, Literal or scalar), or UserError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        chosen = _chosen(value, _named_below(kind), key, source) if inspect.isabstract(kind) else kind
        return _convert_section(value, chosen, key, source)
    if origin in (typing.Union, types.UnionType):
        named: list[Any] = [k for k in arguments if dataclasses.is_dataclass(k)]
        sections = {k.name: k for k in named}
        if sections:
            return _convert_section(value, _chosen(value, sections, key, source), key, source)
        if str in arguments and isinstance(value, str):
            return convert(value, str, key, source)
        for option in arguments:
            try:
                return convert(value, option, key, source)
            except UserError:
                continue
    elif origin is Literal:
        if type(value) in map(type, arguments) and value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            items = sum(len(v) if isinstance(v, (list, tuple)) else 1 for v in value)
            most = MOST_SECTIONS if dataclasses.is_dataclass(arguments[0]) else MOST_ITEMS
            if items > most:  # aliases of aliases are many
                raise UserError(f"{source}: {key}: {items} values, expected at most {most}")
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
        if kind is str:
            _need_one_line(value, key, source)
        if kind is int and abs(value) >= 2**63:
            raise UserError(
                f"{source}: {key}: expected a whole number below 2^63, got one of {value.bit_length()} bits"
            )
        return value
    raise UserError(f"{source}: {key}: expected {_describe(kind)}, got {shown(value)}{_as_list(value, kind)}")


def _need_one_line(text: str, key: str, source: str) -> None:
    """Raises UserError for a text that a path, a YAML file or a line of output could not hold as it is."""
    if "\0" in text:
        raise UserError(f"{source}: {key}: a text must not hold NUL characters")
    if text.splitlines() not in ([], [text]):
        raise UserError(f"{source}: {key}: a text must be a single line, got {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{source}: {key}: a text must be valid UTF-8, got {shown(ascii(text))}") from None


def read_override(text: str, kinds: Sequence[Any]) -> Any:
    """The value that `key=text` gives to a key of one of these types (`option_types`).

    A text is taken as it is. Numbers, lists, sections and true or false are read as YAML. Where several types are
    allowed, null (or nothing) is None, then a listed word is itself, then any text is itself. Raises yaml.YAMLError,
    ValueError or RecursionError for other types and no YAML.
    """
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    structured = [kind for kind in kinds if kind not in (str, type(None)) and typing.get_origin(kind) is not Literal]
    if type(None) in kinds and text in NULLS:
        return None
    if text in words or str in kinds or not structured:
        return text
    return parse_yaml(text)


def option_types(kind: Any, key: str, tree: Any) -> list[Any]:
    """The types that the value of a dotted key may have, in a tree of type `kind`; none for an unknown key.

    tree: nested values, whose `name` chooses the type of a section that has several.
    """
    options = list(typing.get_args(kind)) if typing.get_origin(kind) in (typing.Union, types.UnionType) else [kind]
    if not key:
        return options
    part, _, rest = key.partition(".")
    sections = [option for option in options if dataclasses.is_dataclass(option)]
    inner = tree if isinstance(tree, dict) else {}
    if len(sections) > 1 and part != "name":
        sections = [option for option in sections if getattr(option, "name", None) == inner.get("name")]
    hints = types_of(sections[0]) if sections else {}
    return option_types(hints[part], rest, inner.get(part)) if part in hints else []


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
    if key.count(".") >= DEEPEST:
        raise UserError(f"{source}: {key}: expected at most {DEEPEST} sections in each other")
    hints, prefix = types_of(kind), f"{key}." if key else ""
    for name in value:
        if name not in hints:
            key_text = name if isinstance(name, str) and len(name) < 100 else shown(name)
            near = difflib.get_close_matches(key_text, hints, 1, 0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(hints)}"
            raise UserError(f"{source}: {prefix}{key_text}: unknown key; {hint}")
    fields = {n: convert(v, hints[n], prefix + n, source) for n, v in value.items()}
    try:
        return kind(**fields)
    except ValueError as error:  # of Settings, about a range or about keys that do not go together
        raise UserError(f"{source}: {prefix}{error}") from None


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


def _named_below(kind: Any) -> dict[str, Any]:
    """The sections that an abstract one stands for: all that derive from it and have a name."""
    below = {name: k for child in kind.__subclasses__() for name, k in _named_below(child).items()}
    return {**below, **({kind.name: kind} if kind.name else {})}


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        return f"a list of ({_describe(arguments[0])})"
    if dataclasses.is_dataclass(kind):
        return "sections of keys"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(kind, str(kind))
