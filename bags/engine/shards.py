"""The files of one shard of a store of proposal features: written once, checked, read in parts.

Shard N is three flat files: `N.fc` [rows, stages, width] features, `N.rows` [rows] what else is known of them,
and `N.views` [views] records, each of which says which rows are a view's. `N.sums` holds the checksums of the three
(CRC-32 by zlib, JSON); it is renamed last, and a shard without it is incomplete. Comparing checksums took 1.5 GB/s
on one CPU core; several threads share the work, so that the disk is the limit.
"""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bags.errors import UserError

KINDS = ("fc", "rows", "views")
BLOCK = 2**22  # bytes read at once
MEND = "remove this shard's files (or the whole folder): they are made again"


class Record(NamedTuple):
    """One view to be stored."""

    fc: Tensor  # [R, S, D]
    rows: np.ndarray  # [R] of the store's row type
    view: tuple  # (position, mirrored), and what else the store's views have after `rows`


class Layout(NamedTuple):
    """The types of a store's files; `fc` is "float16" or "float32"."""

    fc: str
    row: np.dtype
    view: np.dtype
    stages: int
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's features."""
        return self.stages * self.width * np.dtype(self.fc).itemsize


def is_complete(folder: Path, number: int) -> bool:
    """Whether all of a shard was written."""
    return (folder / f"{number}.sums").exists()


def verify(folder: Path, numbers: list[int], title: str | None) -> list[str]:
    """Compare shards with their checksums; return a line for each that differs. title: of the bar, None shows none."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        checks = threads.map(lambda number: _damage(folder, number), numbers)
        bar = tqdm(checks, desc=title, total=len(numbers), unit="shard", disable=title is None, delay=5)
        return [line for line in bar if line]


def _damage(folder: Path, number: int) -> str | None:
    """What is wrong with a shard, in words."""
    try:
        sums = json.loads((folder / f"{number}.sums").read_text())
        for kind in KINDS:
            if sums[kind] != _checksum(folder / f"{number}.{kind}"):
                return f"{folder}: shard {number} is damaged ({number}.{kind} is not what was written)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder}: shard {number} is damaged ({error})"
    return None


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def read_views(folder: Path, number: int, layout: Layout) -> np.ndarray:
    """The records of a shard's views."""
    path = folder / f"{number}.views"
    try:
        return np.fromfile(path, layout.view)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}): {MEND}") from None


def read_features(folder: Path, number: int, layout: Layout, first: int, count: int) -> np.ndarray:
    """Features [count, S, D] of a shard's rows from `first` on. Raises UserError where the file is cut."""
    shape = (count, layout.stages, layout.width)
    return _read(folder / f"{number}.fc", np.dtype(layout.fc), shape, first * layout.row_bytes)


def read_rows(folder: Path, number: int, layout: Layout, first: int, count: int) -> np.ndarray:
    """What is known of a shard's rows [count] from `first` on. Raises UserError where the file is cut."""
    return _read(folder / f"{number}.rows", layout.row, (count,), first * layout.row.itemsize)


def _read(path: Path, kind: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
    values = np.empty(shape, kind)
    if not values.nbytes:
        return values
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            target, done = values.reshape(-1).view(np.uint8).data, 0
            while done < values.nbytes and (read := file.readinto(target[done:])):
                done += read
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}): {MEND}") from None
    if done < values.nbytes:
        raise UserError(f"{path}: is cut ({path.stat().st_size} bytes): {MEND}")
    return values


class ShardWriter:
    """The files of a shard while they are written; a disk that fills up leaves none of them."""

    def __init__(self, folder: Path, number: int, layout: Layout):
        self.folder, self.number, self.layout = folder, number, layout
        self.rows = 0
        self.sums = dict.fromkeys(KINDS, 0)
        self.files = {kind: self._temporary(kind).open("wb") for kind in KINDS}

    def add(self, record: Record) -> None:
        """Append one view. Raises UserError for features that are not finite, and for a full disk."""
        fc = record.fc.to(getattr(torch, self.layout.fc)).cpu().numpy()
        if not np.isfinite(fc).all():
            raise UserError(f"{self.folder}: a feature is not a finite number in {self.layout.fc}: train.features=live")
        position, mirrored, *more = record.view
        view = np.array([(position, mirrored, self.rows, len(record.rows), *more)], self.layout.view)
        self.rows += len(record.rows)
        try:
            for kind, values in (("fc", fc), ("rows", record.rows), ("views", view)):
                content = np.ascontiguousarray(values).tobytes()
                self.files[kind].write(content)
                self.sums[kind] = zlib.crc32(content, self.sums[kind])
        except OSError as error:
            self._remove(error)

    def close(self) -> None:
        """Put everything on disk, then under its name, the checksums last."""
        try:
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            with self._temporary("sums").open("w") as sums:
                sums.write(json.dumps(self.sums))
                sums.flush()
                os.fsync(sums.fileno())
        except OSError as error:
            self._remove(error)
        for kind in (*KINDS, "sums"):
            self._temporary(kind).replace(self.folder / f"{self.number}.{kind}")

    def _temporary(self, kind: str) -> Path:
        return self.folder / f"{self.number}.{kind}.tmp"

    def _remove(self, error: OSError) -> None:
        for kind in (*KINDS, "sums"):
            self._temporary(kind).unlink(missing_ok=True)
        raise UserError(
            f"{self.folder}: cannot be written ({error}); the shards that are complete stay: the same command goes on"
        ) from None
