"""Proposal features on disk: what the frozen part of a detector makes of each image, written once, read often.

A store is a folder. `store.json` says of which weights, annotations and settings it is, and how many rows of
what kind it has: a row is a proposal or an object of one view of an image (as it is, or mirrored). Shard N is
three flat files: `N.fc` [rows, stages, width] features, `N.rows` what else is known of them, `N.views` one
record per view, which says where its rows are; and `N.sums`, their checksums, which are written last: a
killed run goes on with the shards that are missing, whatever the number of ranks.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bags.core import distributed
from bags.core.errors import UserError
from bags.core.few_bits import BITS, StoredRows, decode
from bags.core.files import read_text, write_problem, write_text
from bags.core.progress import Progress
from bags.engine.shards import Layout, Record, Shard, ShardWriter, is_complete, open_shards

FORMAT = 2  # 1 had no checksums
MOST_IMAGES = 512  # of a shard; a killed run repeats at most one
PROBED = 8  # images at most, and one of 50, that the expected size is measured on

View = np.dtype([("position", "<i4"), ("mirrored", "?"), ("first", "<i8"), ("rows", "<i4")])
SeenView = np.dtype([*View.descr, ("size", "<i4", (2,)), ("scale", "<f8"), ("original", "<i4", (2,))])
SeenRow = np.dtype([("box", "<f4", (4,))])


def pool_row(stages: int) -> np.dtype:
    """The record of a training row: label and IoU in each stage, objectness, whether it is an object."""
    return np.dtype([("label", "<i4", (stages,)), ("overlap", "<f2", (stages,)), ("score", "<f2"), ("is_object", "?")])


class FeatureStore:
    """A complete store. `places` int64 [images, 2, 3]: shard, first row and rows of both views."""

    def __init__(self, folder: Path, layout: Layout, images: int, shards: list[Shard]):
        """shards: all of them, as `open_shards` gives them."""
        self.folder, self.layout, self.images, self.shards = folder, layout, images, shards
        self.views = [shard.views for shard in shards]
        self.starts = np.cumsum([0, *(shard.rows for shard in shards)])  # of each shard's rows in `whole`
        self.places = np.full((images, 2, 3), -1, np.int64)
        for shard in shards:
            views = shard.views
            place = np.column_stack([np.full(len(views), shard.number), views["first"], views["rows"]])
            self.places[views["position"], views["mirrored"].astype(int)] = place

    def __getitem__(self, key: tuple[int, bool]) -> tuple[np.ndarray, np.ndarray]:
        """(features [R, S, D], rows [R]) of (position, mirrored)."""
        return self.features(key), self.rows(key)

    def features(self, key: tuple[int, bool], chosen: np.ndarray | None = None) -> np.ndarray:
        """Features [R, S, D] of a view's rows, or of the chosen ones (int64 [R], positions in the view).

        float32 where the store is rounded to few bits, else of the layout's type.
        """
        shard, first, count = self.places[key[0], int(key[1])].tolist()
        features = self.shards[shard].read("fc", first, count, chosen)
        if self.layout.fc in BITS:
            return decode(torch.from_numpy(features), self.layout.fc, self.layout.width).numpy()
        return features

    def rows(self, key: tuple[int, bool]) -> np.ndarray:
        """The records of a view's rows, [R] of the layout's row type."""
        shard, first, count = self.places[key[0], int(key[1])].tolist()
        return self.shards[shard].read("rows", first, count)

    def nbytes(self) -> int:
        """Bytes of all features."""
        return sum(shard.nbytes() for shard in self.shards)

    def row_numbers(self, key: tuple[int, bool], rows: Tensor) -> Tensor:
        """Numbers, in `whole`, of some rows of a view."""
        shard, first, _ = self.places[key[0], int(key[1])].tolist()
        return rows + first + int(self.starts[shard])

    def whole(self, device: torch.device) -> StoredRows:
        """All features in the memory of a device."""
        kind, shape = self.layout.shape("fc")
        result = torch.empty((int(self.starts[-1]), *shape), dtype=getattr(torch, kind.name), device=device)
        for shard, first in zip(self.shards, self.starts.tolist(), strict=False):
            result[first : first + shard.rows] = torch.from_numpy(shard.read("fc", 0, shard.rows)).to(device)
        return StoredRows(result, self.layout.fc, self.layout.width)


def shards_of(images: int) -> list[range]:
    """Positions of the images of each shard; few images make small shards, so that little is repeated."""
    size = min(MOST_IMAGES, max(16, -(-images // 64)))
    return [range(first, min(first + size, images)) for first in range(0, images, size)]


def open_store(
    folder: Path,
    about: dict[str, str],
    layout: Layout,
    images: int,
    loader_of: Callable[[list[list[int]]], DataLoader],
    records_of: Callable[[list, list[dict], list[int]], Iterable[Record]],
    batch_size: int,
    title: str,
) -> FeatureStore:
    """The store in a folder; what is missing of it is made first, each rank its share.

    about: what a store's content depends on, by name; a folder that holds another one's raises UserError.
    loader_of(batches of positions) gives (images, targets); records_of(images, targets, positions) their views.
    """
    with _alone(folder):
        if distributed.is_main():
            _begin(folder, _header(about, layout, images))
        distributed.barrier()
        mine = range(distributed.rank(), len(shards_of(images)), distributed.world_size())
        missing = [number for number in mine if not is_complete(folder, number)]
        complete = all(is_complete(folder, number) for number in range(len(shards_of(images))))
        distributed.barrier()
        if not complete:
            if distributed.is_main():
                _announce(folder, layout, images, loader_of, records_of)
            _write(folder, layout, images, missing, loader_of, records_of, batch_size, title)
            distributed.barrier()
    return FeatureStore(folder, layout, images, open_shards(folder, layout, shards_of(images), title))


def find_store(folder: Path, about: dict[str, str], layout: Layout, images: int, title: str) -> FeatureStore | None:
    """The store in a folder, as `open_store` gives it, if it is there and complete; else None. Nothing is made."""
    shards = shards_of(images)
    if not (folder / "store.json").exists() or not all(is_complete(folder, number) for number in range(len(shards))):
        return None
    _begin(folder, _header(about, layout, images))
    return FeatureStore(folder, layout, images, open_shards(folder, layout, shards, title))


def _header(about: dict[str, str], layout: Layout, images: int) -> dict:
    """What `store.json` holds."""
    form = {
        "format": FORMAT,
        "number": images,
        "fc": layout.fc,
        "row": str(layout.row),
        "view": str(layout.view),
        "stages": layout.stages,
        "width": layout.width,
    }
    assert not form.keys() & about.keys()
    return form | about


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One run at a time makes a store; the others wait, and find it made. The main process holds the lock."""
    lock = _opened(folder) if distributed.is_main() else -1
    try:
        told = False
        while distributed.gather_objects(lock >= 0 and not _locked(lock))[0]:  # ranks ask together: none waits for long
            if lock >= 0 and not told:
                print(f"note: {folder}: another run is at this store: waiting for it", file=sys.stderr)
            told = True
            time.sleep(1)
        yield
    finally:
        if lock >= 0:
            os.close(lock)


def _opened(folder: Path) -> int:
    """A folder, made if need be, to be locked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({write_problem(error)}): set store.folder to another one"
        ) from None


def _locked(lock: int) -> bool:
    """Takes the lock, if it is free."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _begin(folder: Path, header: dict) -> None:
    """Refuses a folder that holds something else; else makes sure that it says what it holds."""
    path = folder / "store.json"
    mend = "remove the folder to have it made again, or set store.folder to another one"
    if path.exists():
        try:
            old = dict(json.loads(read_text(path)))
        except (OSError, ValueError, TypeError, RecursionError):
            raise UserError(f"{path}: cannot be read: {mend}") from None
        if old.get("format") == 1:
            raise UserError(f"{folder}: was made by an earlier version and has no checksums: {mend}")
        changed = _changed(header, old)
        if changed:
            raise UserError(f"{folder}: holds proposal features of other {', '.join(changed)}: {mend}")
        return
    if any(folder.iterdir()):
        raise UserError(f"{folder}: is no store of proposal features, and not empty: set store.folder to another one")
    try:
        write_text(path, json.dumps(header, indent=1))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({write_problem(error)}): set store.folder to another one"
        ) from None


def _changed(header: dict, old: dict) -> list[str]:
    """What differs between two headers, for a message: for settings their keys with both values, where they are known.

    `shown` is the readable form of `settings`, and is not compared: stores of earlier versions have none.
    """
    changed = [key for key in {**header, **old} if key != "shown" and header.get(key) != old.get(key)]
    try:
        before, now = (dict(json.loads(one["shown"])) for one in (old, header))
    except (KeyError, ValueError, TypeError):
        before, now = {}, {}
    keys = (
        [f"{k} ({before.get(k, False)}, now {now[k]})" for k in now if before.get(k, False) != now[k]]  # False: older
        if before
        else []
    )
    for name, words in (("fc", [f"store.features ({old.get('fc')!s:.20}, now {header['fc']})"]), ("settings", keys)):
        if name in changed and words:
            changed[changed.index(name) : changed.index(name) + 1] = words
    return changed


def _announce(folder: Path, layout: Layout, images: int, loader_of: Callable, records_of: Callable) -> None:
    """Prints how large the store will be, measured on a few images. Raises UserError where the disk is too small."""
    probed = np.linspace(0, images - 1, min(PROBED, -(-images // 50)), dtype=int).tolist()
    records = [
        record
        for position, (shown, targets) in zip(probed, loader_of([[p] for p in probed]), strict=True)
        for record in records_of(shown, targets, [position])
    ]
    kind, shape = layout.shape("fc")
    row = int(np.prod(shape)) * kind.itemsize + layout.row.itemsize
    per_image = row * sum(len(record.rows) for record in records) / len(probed)
    there = sum(path.stat().st_size for path in folder.glob("*.fc"))
    needed, free = per_image * images - there, shutil.disk_usage(folder).free
    print(
        f"{folder}: about {per_image / 1e6:.2f} MB for each of {images} images, {needed / 1e9:.2f} GB to write, "
        f"{free / 1e9:.1f} GB free",
        file=sys.stderr,
    )
    if needed * 1.02 > free:
        raise UserError(
            f"{folder}: about {needed / 1e9:.1f} GB of proposal features do not fit ({free / 1e9:.1f} GB are free): "
            "set store.folder to another disk, store.features=uint8 (or uint4), store.mirrored=false or fewer "
            "store.negatives, or train.features=live"
        )


def _write(
    folder: Path,
    layout: Layout,
    images: int,
    missing: list[int],
    loader_of: Callable,
    records_of: Callable,
    batch_size: int,
    title: str,
) -> None:
    shards = shards_of(images)
    plan = [
        (number, list(shards[number][first : first + batch_size]))
        for number in missing
        for first in range(0, len(shards[number]), batch_size)
    ]
    loader = loader_of([positions for _, positions in plan])
    bar = Progress(
        total=sum(len(p) for _, p in plan), desc=f"{title}: features", unit="image", disable=not distributed.is_main()
    )
    with bar:
        writer = None
        for (number, positions), (shown, targets) in zip(plan, loader, strict=True):
            if writer is None or writer.number != number:
                if writer:
                    writer.close()
                writer = ShardWriter(folder, number, layout)
            for record in records_of(shown, targets, positions):
                writer.add(record)
            bar.update(len(positions))
        if writer:
            writer.close()
