"""Frozen dataclasses that state which values their fields may hold, and check them when they are made.

    @dataclass(frozen=True)
    class Example(Settings):
        beta: Annotated[float, Range(ge=0, lt=1)] = 0.999
        log_every: Annotated[int, Range(ge=1), NO_RESULT] = 20

`Example(beta=2)` raises ValueError: "beta: expected 0 <= beta < 1, got 2". A YAML file and a library call meet the same
check, because both make the same object.
"""

import functools
import itertools
import math
import types
import typing
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

NO_RESULT = "does not change a result"  # marks a field that two runs with equal results may differ in
_MISSING = object()


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a field may hold: at least `ge`, above `gt`, at most `le`, below `lt`.

    Infinity and NaN are outside every range, and so are whole numbers of more than 64 bits. In a list every number must
    be in the range; besides, `items` is the length of the list (None: any), `empty` whether it may have none, and
    `rising` whether each number must exceed the one before it.
    """

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf
    items: int | None = None
    empty: bool = True
    rising: bool = False

    def allows(self, value: Any) -> bool:
        """Whether a number, or every number of a list or a list of lists, is in the range."""
        if not isinstance(value, list | tuple):
            return self._holds(value)
        fits = len(value) == self.items if self.items is not None else bool(value) or self.empty
        if not (fits and all(map(self.allows, value))):
            return False
        return not self.rising or all(low < high for low, high in itertools.pairwise(value))

    def _holds(self, number: Any) -> bool:
        try:
            inside = bool(self.ge <= number <= self.le and self.gt < number < self.lt)
        except TypeError:  # not a number
            return False
        return inside and not (isinstance(number, int) and number.bit_length() > 63)

    def describe(self, name: str, in_list: bool = False) -> str:
        """The range in words, for an error about the field `name`."""
        starts, ends = self.ge > -math.inf, self.le < math.inf  # that is, with a number that is allowed itself
        if self.lt < math.inf:
            text = f"{self.ge} <= {name} < {self.lt}" if starts else f"between {self.gt} and {self.lt}"
        elif starts:
            text = f"{self.ge} to {self.le}" if ends else f"{self.ge} or more"
        else:
            text = f"above {self.gt}, to {self.le}" if ends else f"above {self.gt}"
        if not in_list:
            return text
        number = f"{self.items} " if self.items is not None else "" if self.empty else "one or more "
        return f"{number}{'rising ' if self.rising else ''}numbers {'of ' if starts else ''}{text}"


class Settings:
    """Base of frozen dataclasses whose annotations say what each field may hold."""

    def __post_init__(self) -> None:
        """Check ranges and choices. Raises ValueError, naming the field, for a value that is not allowed.

        A subclass that adds rules about several fields calls this first. The types themselves are not checked.
        """
        for name, rule in _rules(cast(Hashable, type(self))).items():
            value = getattr(self, name)
            if not rule.allows(value):
                need(False, name, rule.describe(name), _as_list(value))


def _as_list(value: Any) -> Any:
    """Turn tuples into lists, as they are written in YAML."""
    return [_as_list(item) for item in value] if isinstance(value, tuple) else value


class _Rule(NamedTuple):
    choices: tuple  # values of Literal types, and None where the field may be null
    types: tuple  # all other types
    range: Range | None

    def allows(self, value: Any) -> bool:
        """Whether the field may hold the value."""
        if any(value is choice or (type(value) is type(choice) and value == choice) for choice in self.choices):
            return True
        if self.range:
            return self.range.allows(value)
        return bool(self.types) and value is not None and (str in self.types or not isinstance(value, str))

    def describe(self, name: str) -> str:
        """What the field may hold, in words for an error."""
        is_list = any(typing.get_origin(kind) is tuple for kind in self.types)
        words = [self.range.describe(name, is_list)] if self.range else []
        texts = [repr(choice) for choice in self.choices if choice is not None]
        words += [f"one of {', '.join(texts)}"] if len(texts) > 1 else texts
        return ", or ".join([*words, *(["null"] if None in self.choices else [])])


@functools.cache
def _rules(kind: Hashable) -> dict[str, _Rule]:
    """Field -> what it may hold, read from its annotation."""
    rules, fields = {}, marks(kind)
    for name, hint in types_of(kind).items():
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = typing.get_args(hint) if is_union else (hint,)
        literals = [choice for o in options if typing.get_origin(o) is Literal for choice in typing.get_args(o)]
        null = [None] if type(None) in options else []
        rest = tuple(o for o in options if typing.get_origin(o) is not Literal and o is not type(None))
        limits = [mark for mark in fields[name] if isinstance(mark, Range)]
        rules[name] = _Rule((*literals, *null), rest, limits[0] if limits else None)
    return rules


def types_of(kind: Any) -> dict[str, Any]:
    """Field -> its type, without what the annotation adds."""
    return _annotations(kind, False)


def marks(kind: Any) -> dict[str, tuple]:
    """Field -> what its annotation adds to the type: a Range, NO_RESULT, or nothing."""
    return {name: getattr(hint, "__metadata__", ()) for name, hint in _annotations(kind, True).items()}


@functools.cache
def _annotations(kind: Hashable, extras: bool) -> dict[str, Any]:
    """Kept, because Python reads annotations anew each time."""
    return typing.get_type_hints(kind, include_extras=extras)


def need(holds: bool, name: str, expected: str, given: object = _MISSING) -> None:
    """Raise ValueError "NAME: expected EXPECTED, got GIVEN" unless the condition holds."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}" + ("" if given is _MISSING else f", got {given!r:.300}"))
