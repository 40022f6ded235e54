"""Annotation files as JSON: read entry by entry, and errors that name the file."""

import codecs
import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

import orjson

from bags.core.errors import UserError, one_line, system_error
from bags.core.files import decode, encoding_problem, read_bytes

LISTS = ("images", "annotations", "categories")
NUMBERS = {int, float}
BLANKS = re.compile(r"[ \t\r\n]*")
WINDOW, LEAST = 2**18, 2**12  # characters of a list that are parsed at a time: orjson takes a third of json's time


def _read(path: Path) -> bytes:
    """Read a regular file. Raises UserError, which names it."""
    try:
        return read_bytes(path)
    except OSError as error:
        raise UserError(system_error(error, path)) from None


def read_json(path: Path) -> Any:
    """Parses a JSON file; every way in which that fails is one UserError that names the file."""
    content = _read(path)
    text = content.removeprefix(codecs.BOM_UTF8)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if not text.strip():
            raise UserError(f"{path}: the file is empty") from None
        reason: Exception = error
    if problem := encoding_problem(content):
        raise UserError(f"{path}: {problem}")
    words = (b"NaN", b"Infinity")  # Python writes these, though JSON has no such numbers
    if "infinity" in str(reason) or any(word in text for word in words):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = error
    raise UserError(f"{path}: {_problem(text.decode(errors='replace'), reason)}")


def read_unique_json(path: Path) -> Any:
    """Parse a small JSON file. Raises UserError also for a key that an object has twice, of which one would be lost."""

    read_json(path)  # which words all other errors
    repeated: list[str] = []
    content = json.loads(decode(path, _read(path)), object_pairs_hook=_noting(repeated))
    if repeated:
        raise UserError(f"{path}: key {repeated[0]!r:.60} is given twice; keep one of them")
    return content


def as_json(content: dict, source: Path) -> str:
    """Format what was read from `source`. Raises UserError where it holds NaN or infinity, which JSON does not have."""
    try:
        return json.dumps(content, allow_nan=False)
    except ValueError:
        places = [(key, value) for key, value in content.items() if key not in LISTS]
        places += [(f"`{key}`: id {entry.get('id')}", entry) for key in LISTS for entry in content.get(key, ())]
        where = next(place for place, value in places if not _is_finite(value))
        raise UserError(f"{source}: {where}: holds NaN or infinity, which JSON does not have; correct it") from None


def _is_finite(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def read_annotations(path: Path, repeated: list[str] | None = None) -> dict:
    """The three lists of an annotation file; UserError where they are not there, or hold no objects.

    repeated: takes up the keys that an entry has twice, as `annotations: id 7: bbox`. Looking for them takes time.
    """
    content: dict[str, list[dict]] = {key: [] for key in LISTS}
    keys: list[str] = []
    for key, entry in stream(path, None if repeated is None else keys):
        content[key].append(entry)
        if repeated is not None and keys:
            repeated += [f"{key}: id {shown(entry.get('id'))}: {name:.60}" for name in keys]
            keys.clear()
    for key in ("images", "categories"):
        if not content[key]:
            raise UserError(f"{path}: {EMPTY.format(key)}")
    return content


NO_LIST = "no list `{}`: this is not a COCO or LVIS annotation file"
EMPTY = "`{}` is empty: nothing to train on or to evaluate"


def _need_object(path: Path, key: str, position: int, entry: object) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{path}: `{key}`: entry {position}: expected an object, found {entry!r:.60}")


def stream(path: Path, repeated: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """The entries of the three lists one by one, as (list, entry), so that only the text is held as a whole.

    repeated: takes up the keys that the entry, or an object in it, has twice; the last one of each counts.

    Raises UserError for a file that is no annotation file.
    """
    text = decode(path, _read(path))
    try:
        yield from _stream(path, text, repeated)
    except (ValueError, IndexError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: {_problem(text, error)}") from None


def _problem(text: str, error: Exception) -> str:
    """Say why a text is not read as JSON; of a whole number of more digits than Python reads, also where it is."""
    if not text.strip():
        return "the file is empty"
    number = None
    if "set_int_max_str_digits" in str(error):
        number = re.search(r"(?<=[\s:,\[-])\d{4301,}(?![\d.eE])", text)
    if number is None:
        return f"not valid JSON ({one_line(error)})"
    before = text[: number.start()]
    keys = re.findall(r'"([^"]*)"\s*:', before[-10000:])
    where = f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"
    digits = number.end() - number.start()
    return f"`{keys[-1] if keys else '?'}` ({where}) holds a number of {digits} digits; correct it or leave it out"


def _noting(repeated: list[str]) -> Callable[[list[tuple[str, Any]]], dict]:
    """Make a dict of pairs as JSON does, and append the keys given twice to `repeated`."""

    def make(pairs: list[tuple[str, Any]]) -> dict:
        """Keep the last value of each key."""
        entry = dict(pairs)
        if len(entry) < len(pairs):
            repeated.extend(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        return entry

    return make


def _stream(path: Path, text: str, repeated: list[str] | None) -> Iterator[tuple[str, dict]]:
    decode = json.JSONDecoder().raw_decode
    at, seen = _skip(text, 0), set()
    if text[at : at + 1] != "{":
        value, _ = decode(text, at)
        raise UserError(f"{path}: expected a COCO or LVIS annotation object, found a {type(value).__name__}")
    mark, at = _expect(text, "{", at)
    if text[at : at + 1] == "}":
        mark, at = _expect(text, "}", at)
    while mark != "}":
        key, at = decode(text, at)
        _, at = _expect(text, ":", at)
        if key in seen or not isinstance(key, str):
            raise json.JSONDecodeError(f"key {key!r:.40} is given twice, or is no text", text, at)
        seen.add(key)
        if key not in LISTS:
            _, at = decode(text, at)
        elif text[at : at + 1] != "[":
            raise UserError(f"{path}: {NO_LIST.format(key)}")
        else:
            position = 0
            for entries, end in _list(text, at, repeated):
                at = end
                for entry in entries:
                    _need_object(path, key, position, entry)
                    yield key, entry
                    position += 1
        mark, at = _expect(text, ",}", at)
    if at != len(text):
        raise json.JSONDecodeError("more than one value", text, at)
    for key in LISTS:
        if key not in seen:
            raise UserError(f"{path}: {NO_LIST.format(key)}")


def _list(text: str, at: int, repeated: list[str] | None) -> Iterator[tuple[list, int]]:
    """Some entries at a time of the list that begins at a place, and the place after them, at last after the list."""
    hook = None if repeated is None else _noting(repeated)
    decode, window = json.JSONDecoder(object_pairs_hook=hook).raw_decode, WINDOW if repeated is None else 0
    mark, at = _expect(text, "[", at)
    if text[at : at + 1] == "]":
        mark, at = _expect(text, "]", at)
    yield [], at
    while mark != "]":
        entries, at = _several(text, at, window)
        if entries:
            window = min(2 * window, WINDOW)
        elif window > LEAST:
            window //= 4
            continue
        else:
            entry, at = decode(text, at)
            entries = [entry]
        mark, at = _expect(text, ",]", at)
        yield entries, at


def _skip(text: str, at: int) -> int:
    """The place after blanks."""
    found = BLANKS.match(text, at)
    return found.end() if found else at


def _expect(text: str, characters: str, at: int) -> tuple[str, int]:
    """The next character, one of these, and the place after it and the blanks that follow."""
    at = _skip(text, at)
    if text[at : at + 1] not in tuple(characters):
        raise json.JSONDecodeError(f"expected {' or '.join(characters)}", text, at)
    return text[at], _skip(text, at + 1)


def _several(text: str, at: int, window: int) -> tuple[list, int]:
    """The entries of a list from a place on that end within a window, and the place after the last of them.

    No entries where the window's last `},` does not end one, or where orjson refuses what Python reads (NaN, say): then
    the caller takes a smaller window, and at last one entry. A cut inside an entry is never taken for its end, because
    what is before it is no list of whole values then.
    """
    end = text.rfind("},", at, at + window) + 1
    if end > 0:
        with contextlib.suppress(orjson.JSONDecodeError):
            return orjson.loads(f"[{text[at:end]}]"), end
    return [], at


def shown(value: object) -> str:
    """A value of a wrong type in a message: text in quotes, cut to 60 characters, with its JSON type."""
    kinds = {str: "text", bool: "true or false", list: "a list", dict: "an object", float: "a number with a fraction"}
    kind = kinds.get(type(value))
    return f"{value!r:.60}" + (f" ({kind})" if kind else "")


def is_number(value: object) -> TypeGuard[float]:
    """True for a finite or infinite number; bool is none."""
    return type(value) in NUMBERS


def is_empty_rle(value: object) -> bool:
    """True for an RLE that counts nothing. Like an empty list of polygons, it is no segmentation."""
    return isinstance(value, dict) and (not value or value.get("counts") in ("", []))


def is_side(value: object) -> TypeGuard[int]:
    """True for what can be the width or height of an image, in pixels."""
    return type(value) is int and 0 < value < 2**20


def is_box(value: object) -> TypeGuard[list[float]]:
    """True for a list of four numbers."""
    return isinstance(value, list) and len(value) == 4 and NUMBERS.issuperset(map(type, value))
