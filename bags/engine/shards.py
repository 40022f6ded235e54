"""The files of a feature store's shards: written once, compared with their checksums, and read.

Shard N has four files. `N.fc`, `N.rows` and `N.views` are flat arrays; `N.sums` holds the size and the CRC-32 of each
and is written last: a shard without it is made again. A store is compared with its checksums each time that it is
opened, each shard by one rank. zlib's CRC-32 does 3.4 GB/s on one core (sha256: 1.1 GB/s), so that the disk sets the
pace; with reading, 0.9 GB/s were measured on two cores that others used, too.

Files are read, not memory-mapped: a map of a file that is cut meanwhile ends the process by SIGBUS, without a word.
Drawing 512 of an image's 1024 rows of 1024 numbers took 3.1 ms where the file is in memory (with maps 1.4 ms, as only
the drawn rows are copied) and 3.6 ms where it is not (with maps 4.4 ms).
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from bags.core import distributed
from bags.core.errors import UserError
from bags.core.few_bits import BITS, encode, row_bytes
from bags.core.files import open_regular, read_text, write_problem, write_text
from bags.core.progress import Progress

Result = TypeVar("Result")
KINDS = ("fc", "rows", "views")
BLOCK = 2**22  # bytes that are read at a time for a checksum
THREADS = 8  # at most, that compute checksums: fast disks need several
SHOWN_FROM = 2**30  # bytes of a store from which its comparison has a progress bar


class Record(NamedTuple):
    """One view to be stored."""

    fc: Tensor  # [R, S, D]
    rows: np.ndarray  # [R] of the store's row type
    view: tuple  # (position, mirrored), and what else the store's views have after `rows`


class Layout(NamedTuple):
    """The types of a store's files."""

    fc: str  # "float16", "float32", or one of `few_bits.BITS`, to which features are rounded
    row: np.dtype  # of a row, the record of a proposal
    view: np.dtype  # of a view, the record of an image or of its mirror image
    stages: int  # S, classifiers of the detector
    width: int  # D, features of a row for each stage

    def shape(self, kind: str) -> tuple[np.dtype, tuple[int, ...]]:
        """(type, shape) of one entry of a file: of a row's features [S, D], of a row, of a view."""
        if kind == "fc":
            if self.fc in BITS:
                return np.dtype(np.uint8), (self.stages, row_bytes(self.fc, self.width))
            return np.dtype(self.fc), (self.stages, self.width)
        return (self.row if kind == "rows" else self.view), ()


def is_complete(folder: Path, number: int) -> bool:
    """Whether a shard has been written to its end."""
    return (folder / f"{number}.sums").exists()


@dataclass
class Shard:
    """A shard whose files have been compared with their checksums.

    stamps: (bytes, time of the last change in ns) of each file then, which every later reading compares.
    """

    folder: Path  # of the store
    number: int  # from 0, in the names of its files
    layout: Layout
    stamps: dict[str, tuple[int, int]]  # by the file's kind
    views: np.ndarray  # [V] of the layout's view type

    @property
    def rows(self) -> int:
        """Rows of all views."""
        return int(self.views["rows"].sum())

    def nbytes(self) -> int:
        """Bytes of the features."""
        return self.stamps["fc"][0]

    def read(self, kind: str, first: int, count: int, chosen: np.ndarray | None = None) -> np.ndarray:
        """Entries first .. first + count of a file, or of these the `chosen` ones (int64 positions), one by one.

        Raises UserError where the file is not as it was when it was compared with its checksum.
        """
        kind_of, shape = self.layout.shape(kind)
        size = kind_of.itemsize * int(np.prod(shape, dtype=np.int64))
        with self._opened(kind) as descriptor:
            if chosen is None:
                entries = np.empty((count, *shape), kind_of)
                self._fill(descriptor, kind, entries, first * size)
                return entries
            entries = np.empty((len(chosen), *shape), kind_of)
            for entry, position in enumerate(chosen.tolist()):
                self._fill(descriptor, kind, entries[entry : entry + 1], (first + position) * size)
            return entries

    @contextmanager
    def _opened(self, kind: str) -> Iterator[int]:
        """The file descriptor of an unchanged file; opened for each view, as a store may have hundreds of files."""
        path = self.folder / f"{self.number}.{kind}"
        try:
            with open_regular(path) as file:
                if _stamp(file.fileno()) != self.stamps[kind]:
                    raise UserError(f"{path}: was changed while it was in use: {_mend(self.folder, self.number)}")
                yield file.fileno()
        except OSError as error:
            reason = f"cannot be read any more ({os.strerror(error.errno or 0)})"
            raise UserError(f"{path}: {reason}: {_mend(self.folder, self.number)}") from None

    def _fill(self, descriptor: int, kind: str, entries: np.ndarray, place: int) -> None:
        """Reads an array's bytes from a place of the file."""
        wanted = entries.reshape(-1).view(np.uint8).data if entries.size else memoryview(b"")
        while wanted:
            number = os.preadv(descriptor, [wanted], place)
            if not number:
                path = self.folder / f"{self.number}.{kind}"
                raise UserError(f"{path}: was cut while it was in use: {_mend(self.folder, self.number)}")
            wanted, place = wanted[number:], place + number


def _stamp(file: int | Path) -> tuple[int, int]:
    stat = os.stat(file)
    return stat.st_size, stat.st_mtime_ns


def _mend(folder: Path, number: int) -> str:
    return f"remove {folder / str(number)}.* and repeat the command: this shard is made again"


# --------------------------------------------------------------------------- opening


def open_shards(folder: Path, layout: Layout, shards: list[range], title: str) -> list[Shard]:
    """All shards of a store, compared with their checksums; the ranks share the work, several threads each.

    shards: the positions of the images of each. Raises UserError, on all ranks, that names the damaged shards.
    """
    mine = range(distributed.rank(), len(shards), distributed.world_size())
    nbytes = sum(path.stat().st_size for path in folder.glob("*.fc"))
    bar = Progress(
        total=len(mine),
        desc=f"{title}: checksums",
        unit="shard",
        mininterval=1,
        disable=not distributed.is_main() or nbytes < SHOWN_FROM,
    )

    def compared(number: int) -> Shard | str:
        """The shard, or what is wrong with it."""
        try:
            return _compared(folder, number, layout, shards[number])
        except UserError as error:
            return str(error)
        finally:
            bar.update()

    with bar, ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        of_rank = list(pool.map(compared, mine))
    opened: dict[int, Shard | str] = {}
    for rank, results in enumerate(distributed.gather_objects(of_rank)):
        opened |= {rank + k * distributed.world_size(): result for k, result in enumerate(results)}
    problems = [result for result in opened.values() if isinstance(result, str)]
    if problems:
        bad = [number for number in sorted(opened) if isinstance(opened[number], str)]
        more = f" (damaged shards: {', '.join(map(str, bad))})" if len(bad) > 1 else ""
        raise UserError(problems[0] + more)
    return [shard for number in range(len(shards)) if isinstance(shard := opened[number], Shard)]


def _compared(folder: Path, number: int, layout: Layout, positions: range) -> Shard:
    """A shard whose files are what was written. Raises UserError that names the file at fault."""
    stamps: dict[str, tuple[int, int]] = {}
    try:
        sums = json.loads(read_text(folder / f"{number}.sums"))
        for kind in KINDS:
            path = folder / f"{number}.{kind}"
            stamps[kind] = _stamp(path)
            if list(_checksum(path)) != sums[kind] or _stamp(path) != stamps[kind]:
                raise UserError(f"{path}: damaged (its checksum differs): {_mend(folder, number)}")
        views = np.fromfile(folder / f"{number}.views", layout.view)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = write_problem(error) if isinstance(error, OSError) else "its checksums cannot be read"
        raise UserError(f"{folder}: shard {number} is damaged ({reason}): {_mend(folder, number)}") from None
    shard = Shard(folder, number, layout, stamps, views)
    if not _is_consistent(shard, positions):
        raise UserError(f"{folder}: shard {number} is damaged (its files disagree): {_mend(folder, number)}")
    return shard


def _checksum(path: Path) -> tuple[int, int]:
    """(bytes, CRC-32) of a file; other threads run meanwhile."""
    block, size, crc = bytearray(BLOCK), 0, 0
    with open_regular(path) as file:
        while number := file.readinto(block):
            crc = zlib.crc32(memoryview(block)[:number], crc)
            size += number
    return size, crc


def _is_consistent(shard: Shard, positions: range) -> bool:
    """Whether the views are of the shard's images, and lie in its files one after the other."""
    views = shard.views
    for kind in ("fc", "rows"):
        kind_of, shape = shard.layout.shape(kind)
        if shard.stamps[kind][0] != shard.rows * kind_of.itemsize * int(np.prod(shape, dtype=np.int64)):
            return False
    ends = np.cumsum(views["rows"], dtype=np.int64)
    inside = (views["position"] >= positions.start) & (views["position"] < positions.stop) & (views["rows"] >= 0)
    return bool(inside.all() and (views["first"] == ends - views["rows"]).all())


# --------------------------------------------------------------------------- writing


class ShardWriter:
    """The files of a shard while they are written; a disk that fills up leaves none of them."""

    def __init__(self, folder: Path, number: int, layout: Layout):
        self.folder, self.number, self.layout = folder, number, layout
        self.rows = 0
        self.sums = dict.fromkeys(KINDS, (0, 0))  # bytes and CRC-32 so far
        self.files = self._safely(lambda: {kind: self._path(kind, ".tmp").open("wb") for kind in KINDS})

    def _path(self, kind: str, suffix: str = "") -> Path:
        return self.folder / f"{self.number}.{kind}{suffix}"

    def add(self, record: Record) -> None:
        """Appends one view."""
        kind = self.layout.fc
        fc = record.fc if kind in BITS else record.fc.to(getattr(torch, kind))
        if not fc.isfinite().all():
            raise UserError(f"{self.folder}: a feature is not a finite number in {kind}: train.features=live")
        position, mirrored, *more = record.view
        view = np.array([(position, mirrored, self.rows, len(record.rows), *more)], self.layout.view)
        self.rows += len(record.rows)
        stored = (encode(fc, kind) if kind in BITS else fc).cpu().numpy()
        for kind, values in {"fc": stored, "rows": record.rows, "views": view}.items():
            content = np.ascontiguousarray(values).tobytes()
            size, crc = self.sums[kind]
            self.sums[kind] = size + len(content), zlib.crc32(content, crc)
            self._safely(partial(self.files[kind].write, content))

    def close(self) -> None:
        """Puts everything on disk, then under its name; the checksums come last."""
        self._safely(self._finish)

    def _finish(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for kind in KINDS:
            self._path(kind, ".tmp").replace(self._path(kind))
        write_text(self._path("sums"), json.dumps(self.sums))

    def _safely(self, action: Callable[[], Result]) -> Result:
        """Does something with the files. Where the system refuses, they are removed, and UserError says why."""
        try:
            return action()
        except OSError as error:
            for file in getattr(self, "files", {}).values():
                with suppress(OSError):
                    file.close()
            for kind in KINDS:
                self._path(kind, ".tmp").unlink(missing_ok=True)
            raise UserError(
                f"{self.folder}: cannot be written ({write_problem(error)}); the shards that are complete stay: "
                "the same command goes on"
            ) from None
