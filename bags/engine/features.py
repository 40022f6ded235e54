"""Proposal features on disk: what the frozen part of a detector makes of each image, written once, read often.

A store is a folder. `store.json` says of which weights, annotations and settings it is, and how many rows of
what kind it has: a row is a proposal or an object of one view of an image (as it is, or mirrored). Shard N is
three flat files: `N.fc` [rows, stages, width] features, `N.rows` what else is known of them, `N.views` one
record per view, which says where its rows are. A shard is there when its views are, which are renamed last: a
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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from tqdm import tqdm

from bags import distributed
from bags.errors import UserError
from bags.files import read_text, write_text

FORMAT = 1
MOST_IMAGES = 512  # of a shard; a killed run repeats at most one
PROBED = 8  # images at most, and one of 50, that the expected size is measured on

View = np.dtype([("position", "<i4"), ("mirrored", "?"), ("first", "<i8"), ("rows", "<i4")])
SeenView = np.dtype([*View.descr, ("size", "<i4", (2,)), ("scale", "<f8"), ("original", "<i4", (2,))])
SeenRow = np.dtype([("box", "<f4", (4,))])


def pool_row(stages: int) -> np.dtype:
    """What is known of a row to train from: label and IoU in each stage, objectness, whether it is an object."""
    return np.dtype([("label", "<i4", (stages,)), ("overlap", "<f2", (stages,)), ("score", "<f2"), ("is_object", "?")])


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


class FeatureStore:
    """A complete store, memory-mapped. `places` int64 [images, 2, 3]: shard, first row and rows of both views."""

    def __init__(self, folder: Path, layout: Layout, images: int):
        self.folder, self.layout, self.images = folder, layout, images
        self.shards, self.views = [], []
        self.places = np.full((images, 2, 3), -1, np.int64)
        for number in range(len(shards_of(images))):
            fc = _mapped(folder / f"{number}.fc", np.dtype(layout.fc), (-1, layout.stages, layout.width))
            rows = _mapped(folder / f"{number}.rows", layout.row, (-1,))
            views = np.fromfile(folder / f"{number}.views", layout.view)
            if not len(fc) == len(rows) == views["rows"].sum():
                raise UserError(f"{folder}: shard {number} is damaged: remove its three files, they are made again")
            self.shards.append((fc, rows))
            self.views.append(views)
            own = np.column_stack([np.full(len(views), number), views["first"], views["rows"]])
            self.places[views["position"], views["mirrored"].astype(int)] = own

    def __reduce__(self):
        return FeatureStore, (self.folder, self.layout, self.images)  # loader processes map it themselves

    def __getitem__(self, key: tuple[int, bool]) -> tuple[np.ndarray, np.ndarray]:
        """(features [R, S, D], rows [R]) of (position, mirrored), not read before they are used."""
        shard, first, count = self.places[key[0], int(key[1])]
        fc, rows = self.shards[shard]
        return fc[first : first + count], rows[first : first + count]

    def nbytes(self) -> int:
        """Bytes of all features."""
        return sum(fc.nbytes for fc, _ in self.shards)

    def row_numbers(self, key: tuple[int, bool], rows: Tensor) -> Tensor:
        """Numbers, in `whole`, of some rows of a view."""
        shard, first, _ = self.places[key[0], int(key[1])]
        return rows + int(first) + sum(len(fc) for fc, _ in self.shards[:shard])

    def whole(self, device: torch.device) -> Tensor:
        """All features [rows, S, D] in the memory of a device."""
        shape = (sum(len(fc) for fc, _ in self.shards), self.layout.stages, self.layout.width)
        result, first = torch.empty(shape, dtype=getattr(torch, self.layout.fc), device=device), 0
        for fc, _ in self.shards:
            result[first : first + len(fc)] = torch.from_numpy(np.array(fc)).to(device)
            first += len(fc)
        return result


def _mapped(path: Path, kind: np.dtype, shape: tuple) -> np.ndarray:
    if not path.stat().st_size:
        return np.empty((0, *shape[1:]), kind)
    try:
        return np.memmap(path, kind, "r").reshape(shape)
    except ValueError:
        raise UserError(f"{path}: damaged: remove this shard's three files, they are made again") from None


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
    form = {"format": FORMAT, "number": images, "fc": layout.fc, "row": str(layout.row),
            "view": str(layout.view), "stages": layout.stages, "width": layout.width}  # fmt: skip
    assert not form.keys() & about.keys()
    with _alone(folder):
        if distributed.is_main():
            _begin(folder, form | about)
        distributed.barrier()
        mine = range(distributed.rank(), len(shards_of(images)), distributed.world_size())
        missing = [number for number in mine if not (folder / f"{number}.views").exists()]
        complete = all((folder / f"{number}.views").exists() for number in range(len(shards_of(images))))
        distributed.barrier()
        if not complete:
            if distributed.is_main():
                _announce(folder, layout, images, loader_of, records_of)
            _write(folder, layout, images, missing, loader_of, records_of, batch_size, title)
            distributed.barrier()
    return FeatureStore(folder, layout, images)


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
        raise UserError(f"{folder}: cannot be written ({error}): set store.folder to another one") from None


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
            old = json.loads(read_text(path))
        except ValueError:
            raise UserError(f"{path}: cannot be read: {mend}") from None
        changed = [key for key in {**header, **old} if header.get(key) != old.get(key)]
        if changed:
            raise UserError(f"{folder}: holds proposal features of other {', '.join(changed)}: {mend}")
        return
    if any(folder.iterdir()):
        raise UserError(f"{folder}: is no store of proposal features, and not empty: set store.folder to another one")
    try:
        write_text(path, json.dumps(header, indent=1))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}): set store.folder to another one") from None


def _announce(folder: Path, layout: Layout, images: int, loader_of, records_of) -> None:
    """Prints how large the store will be, measured on a few images. Raises UserError where the disk is too small."""
    probed = np.linspace(0, images - 1, min(PROBED, -(-images // 50)), dtype=int).tolist()
    records = [
        record
        for position, (shown, targets) in zip(probed, loader_of([[p] for p in probed]), strict=True)
        for record in records_of(shown, targets, [position])
    ]
    row = layout.stages * layout.width * np.dtype(layout.fc).itemsize + layout.row.itemsize
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
            "set store.folder to another disk, store.mirrored=false or fewer store.negatives, or train.features=live"
        )


def _write(folder, layout, images, missing, loader_of, records_of, batch_size, title) -> None:
    shards = shards_of(images)
    plan = [
        (number, list(shards[number][first : first + batch_size]))
        for number in missing
        for first in range(0, len(shards[number]), batch_size)
    ]
    loader = loader_of([positions for _, positions in plan])
    bar = tqdm(total=sum(len(p) for _, p in plan), desc=f"{title}: features", unit="image",
               disable=not distributed.is_main())  # fmt: skip
    with bar:
        writer = None
        for (number, positions), (shown, targets) in zip(plan, loader, strict=True):
            if writer is None or writer.number != number:
                if writer:
                    writer.close()
                writer = _Shard(folder, number, layout)
            for record in records_of(shown, targets, positions):
                writer.add(record)
            bar.update(len(positions))
        if writer:
            writer.close()


class _Shard:
    """The three files of a shard while they are written; a disk that fills up leaves none of them."""

    def __init__(self, folder: Path, number: int, layout: Layout):
        self.folder, self.number, self.layout = folder, number, layout
        self.rows = 0
        self.files = {kind: (folder / f"{number}.{kind}.tmp").open("wb") for kind in ("fc", "rows", "views")}

    def add(self, record: Record) -> None:
        """Appends one view."""
        fc = record.fc.to(getattr(torch, self.layout.fc)).cpu().numpy()
        if not np.isfinite(fc).all():
            raise UserError(f"{self.folder}: a feature is not a finite number in {self.layout.fc}: train.features=live")
        position, mirrored, *more = record.view
        view = np.array([(position, mirrored, self.rows, len(record.rows), *more)], self.layout.view)
        self.rows += len(record.rows)
        self._put({"fc": fc, "rows": record.rows, "views": view})

    def _put(self, parts: dict[str, np.ndarray]) -> None:
        try:
            for kind, values in parts.items():
                self.files[kind].write(np.ascontiguousarray(values).tobytes())
        except OSError as error:
            self._remove(error)

    def close(self) -> None:
        """Everything on disk, then under its own name."""
        try:
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
        except OSError as error:
            self._remove(error)
        for kind in self.files:
            (self.folder / f"{self.number}.{kind}.tmp").replace(self.folder / f"{self.number}.{kind}")

    def _remove(self, error: OSError) -> None:
        for kind in self.files:
            (self.folder / f"{self.number}.{kind}.tmp").unlink(missing_ok=True)
        raise UserError(
            f"{self.folder}: cannot be written ({error}); the shards that are complete stay: the same command goes on"
        ) from None


class TrainingFeatures(Dataset):
    """Samples drawn from a store as `RoIHeads` draws them from an image, for each (position, seed) anew.

    For (position, seed, label) only the label's proposals are drawn, and as many of background (class-balanced).

    An item is ([features [n, D] of each stage], [labels [n] of each stage]); where the features are
    resident elsewhere, numbers of rows [n] stand for them.
    """

    def __init__(self, store: FeatureStore, flip: float, batch_size: int, positive_fraction: float, resident: bool):
        """flip: probability of the mirrored view; batch_size, positive_fraction: proposals per image as in RoIHeads."""
        self.store, self.flip, self.resident = store, flip, resident
        self.sampler = BalancedPositiveNegativeSampler(batch_size, positive_fraction)

    def __len__(self) -> int:
        return self.store.images

    def __getitem__(self, key: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
        position, seed, *label = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            mirrored = bool(torch.rand(1) < self.flip) if self.flip > 0 else False  # as v2.RandomHorizontalFlip
            fc, rows = self.store[position, mirrored]
            drawn = self._draw_label(rows, *label) if label else self._draw(rows)
        features, labels = [], []
        for stage, chosen in enumerate(drawn):
            labels.append(torch.from_numpy(rows["label"][chosen, stage].astype(np.int64)))
            if self.resident:
                features.append(self.store.row_numbers((position, mirrored), chosen))
            else:
                features.append(torch.from_numpy(fc[chosen.numpy(), stage]))
        return features, labels

    def _draw(self, rows: np.ndarray) -> list[Tensor]:
        """Rows [n] of each stage: what one stage draws, and the objects, are what the next one may draw from."""
        labels = torch.from_numpy(rows["label"].astype(np.int64))
        is_object = torch.from_numpy(rows["is_object"].copy())
        available, drawn = torch.arange(len(rows)), []
        for stage in range(labels.shape[1]):
            (positive,), (negative,) = self.sampler([labels[available, stage]])
            chosen = available[torch.where(positive | negative)[0]]
            drawn.append(chosen)
            available = torch.cat([chosen[~is_object[chosen]], torch.where(is_object)[0]])
        return drawn

    def _draw_label(self, rows: np.ndarray, label: int) -> list[Tensor]:
        """Rows [n] of each stage, each stage for itself: those of a label, and as many of background, if there are."""
        drawn = []
        for labels in torch.from_numpy(rows["label"].astype(np.int64)).unbind(1):
            own, background = (torch.where(labels == wanted)[0] for wanted in (label, 0))
            background = background[torch.randperm(len(background))[: len(own)]]
            drawn.append(torch.cat([own, background]).sort().values)
        return drawn


def collate_samples(items: list[tuple[list[Tensor], list[Tensor]]]) -> tuple[list[Tensor], list[dict]]:
    """A batch as `FromFeatures` takes it: features [N, D] and {"labels": [N]} of each stage."""
    features, labels = zip(*items, strict=True)
    targets = [{"labels": torch.cat(own)} for own in zip(*labels, strict=True)]
    return [torch.cat(own) for own in zip(*features, strict=True)], targets


class SeenFeatures(Dataset):
    """(what `make` builds from fc [R, S, D], boxes [R, 4], size, scale, original; target) of each position."""

    def __init__(self, store: FeatureStore, make: Callable, target_of: Callable[[int], dict]):
        self.store, self.make, self.target_of = store, make, target_of
        views = np.concatenate(store.views)
        self.order, self.views = np.argsort(views["position"]), views

    def __len__(self) -> int:
        return self.store.images

    def __getitem__(self, position: int) -> tuple[object, dict]:
        fc, rows = self.store[position, False]
        view = self.views[self.order[position]]
        size, original = (tuple(view[key].tolist()) for key in ("size", "original"))
        features, boxes = torch.from_numpy(np.array(fc)), torch.from_numpy(rows["box"].copy())
        return self.make(features, boxes, size, float(view["scale"]), original), self.target_of(position)
