"""Matrices of MATLAB 5 files (.mat): whole numbers, and rows of texts.

The format is "MAT-File Level 5" of the MATLAB documentation. Only what annotations need is read: little-endian files,
compressed or not, with dense matrices of integers and cells of text.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bags.core.errors import UserError
from bags.core.files import read_bytes

HEADER = 128  # bytes
NUMBERS = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 12: "<i8", 13: "<u8"}
TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}
MATRIX, COMPRESSED = 14, 15
CELL, CHARACTERS = 1, 4  # classes of matrices
REAL = range(6, 16)  # doubles, too: MATLAB stores their values as integers where it can
LARGEST = 1 << 28  # bytes of an unpacked matrix


def read_matrix(path: Path, name: str) -> np.ndarray | list[str]:
    """The variable `name` of a file: an integer matrix, or the texts of a cell array in MATLAB's order.

    Raises UserError for a missing or damaged file, and for one without such a variable.
    """
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; the checkout is not complete") from None
    try:
        if content[:6] != b"MATLAB" or content[126:128] != b"IM":
            raise ValueError("no MATLAB 5 file of little-endian numbers")
        for kind, data in _elements(content[HEADER:]):
            if kind == COMPRESSED:
                kind, data = next(_elements(zlib.decompressobj().decompress(data, LARGEST)))
            if kind == MATRIX and (found := _variable(data))[0] == name:
                return found[1]
        raise ValueError(f"no variable {name}")
    except (ValueError, KeyError, StopIteration, IndexError, struct.error, zlib.error) as error:
        words = f"expected a MATLAB 5 file with the variable {name} of whole numbers or texts"
        raise UserError(f"{path}: {words} ({error}); fetch the checkout again") from None


def _elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and data of the elements that follow each other in `content`."""
    at = 0
    while at < len(content):
        kind, size = struct.unpack_from("<II", content, at)
        if kind >> 16:  # a small element: type, size and data in eight bytes
            kind, size, begin, following = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        else:
            begin = at + 8
            following = begin + size + (0 if kind == COMPRESSED else -size % 8)
        if begin + size > len(content):
            raise ValueError("it is cut short")
        yield kind, content[begin : begin + size]
        at = following


def _variable(data: bytes) -> tuple[str, np.ndarray | list[str]]:
    """Name and value of a matrix."""
    (_, flags), (_, sizes), (_, name), *parts = _elements(data)
    kind, shape = flags[0], np.frombuffer(sizes, "<i4").tolist()
    if kind == CELL:
        return name.decode("latin-1"), [_text(part) for _, part in parts]
    if kind not in REAL:
        raise ValueError(f"a matrix of class {kind}")
    stored, values = parts[0]
    return name.decode("latin-1"), np.frombuffer(values, NUMBERS[stored]).reshape(shape, order="F")


def _text(data: bytes) -> str:
    """The text of a cell."""
    (_, flags), _, _, *parts = _elements(data)
    if flags[0] != CHARACTERS:
        raise ValueError(f"a cell of class {flags[0]}")
    return "".join(content.decode(TEXTS[kind]) for kind, content in parts[:1])
