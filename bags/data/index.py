"""A COCO or LVIS annotation file as flat arrays, memory-mapped and shared by all processes.

The first `AnnotationIndex.open` packs the JSON into a folder of NumPy arrays, beside it if that place
can be written (`train.json` -> `train.json.index/`), else below the user's cache folder; the environment
variable BAGS_CACHE names another place for all of them. Later opens only map that folder.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bags.data.packing import gather, offsets, pack, ranges
from bags.errors import UserError

FORMAT = 1
ARRAYS = {  # name -> (type, columns); lengths: I images, A annotations, C categories, see AnnotationIndex
    "category_ids": (np.int64, 0),
    "image_ids": (np.int64, 0),
    "image_sizes": (np.int32, 2),
    "name_bytes": (np.uint8, 0),
    "name_starts": (np.int64, 0),
    "starts": (np.int64, 0),
    "annotation_ids": (np.int64, 0),
    "boxes": (np.float32, 4),
    "areas": (np.float32, 0),
    "labels": (np.int64, 0),
    "crowd": (np.bool_, 0),
    "points": (np.float32, 0),
    "rings": (np.int64, 0),
    "ring_starts": (np.int64, 0),
    "rle_bytes": (np.uint8, 0),
    "rle_starts": (np.int64, 0),
}


@dataclass(frozen=True, eq=False)
class AnnotationIndex:
    """I images, A annotations sorted by image, C categories. Labels are 1..C by ascending id.

    path            the JSON file
    categories      C dicts as in the file, by ascending id: id, name, and what else it says of counts
    category_ids    int64 [C]
    image_ids       int64 [I]; image_sizes: int32 [I, 2] height, width (pixels)
    starts          int64 [I + 1]; annotations of image i are starts[i] .. starts[i + 1]
    annotation_ids  int64 [A]
    boxes           float32 [A, 4] x1, y1, x2, y2 (pixels); areas float32 [A] (pixels); labels int64 [A]
    crowd           bool [A]
    name_bytes, name_starts, points, rings, ring_starts, rle_bytes, rle_starts
                    see `file_name` and `segmentation`
    """

    path: Path
    categories: list[dict]
    category_ids: np.ndarray
    image_ids: np.ndarray
    image_sizes: np.ndarray
    name_bytes: np.ndarray
    name_starts: np.ndarray
    starts: np.ndarray
    annotation_ids: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    points: np.ndarray
    rings: np.ndarray
    ring_starts: np.ndarray
    rle_bytes: np.ndarray
    rle_starts: np.ndarray
    cache: Path | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def __reduce__(self):
        """A process that is not forked maps the same folder again."""
        if self.cache is not None:
            return _map, (self.cache, self.path)
        return AnnotationIndex, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @classmethod
    def open(cls, path: str | Path) -> "AnnotationIndex":
        """Maps the index of a file, which is made first where it is missing, stale or damaged.

        Raises UserError that names the file and the entry at fault.
        """
        path = Path(path)
        try:
            stat = path.stat()
        except OSError:
            raise UserError(f"{path}: no such file; check data.root and the names below it") from None
        folders = _cache_folders(path)
        for folder in folders:
            index = _open_cache(folder, path, stat)
            if index is not None:
                return index
        digest = _digest(path)
        for folder in folders:
            index = _store(folder, path, stat, digest)
            if index is not None:
                return index
        places = " or ".join(str(folder.parent) for folder in folders)
        raise UserError(f"{path}: its index cannot be written to {places}: set BAGS_CACHE to a folder that can be")

    @property
    def category_names(self) -> list[str]:
        """C names."""
        return [str(category.get("name", category["id"])) for category in self.categories]

    @property
    def owners(self) -> np.ndarray:
        """The image (0..I-1) of each annotation, int64 [A]."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def file_name(self, image: int) -> str:
        """The file of image 0..I-1, relative to the image folder."""
        return self.name_bytes[slice(*self.name_starts[image : image + 2])].tobytes().decode()

    def segmentation(self, annotation: int) -> list[np.ndarray] | bytes | None:
        """Polygons, each [points, 2] x, y (pixels); or a compressed RLE of the whole image; or None."""
        rle = self.rle_bytes[slice(*self.rle_starts[annotation : annotation + 2])]
        if len(rle):
            return rle.tobytes()
        first, last = self.ring_starts[annotation : annotation + 2]
        if first == last:
            return None
        ends = self.rings[first : last + 1]
        return [self.points[a:b].reshape(-1, 2) for a, b in itertools.pairwise(ends.tolist())]

    def only(self, wanted: np.ndarray) -> "AnnotationIndex":
        """The images and annotations of some labels alone. wanted: bool [C + 1]; labels keep their numbers."""
        kept = wanted[self.labels] & ~self.crowd
        per_image = np.diff(np.concatenate([[0], np.cumsum(kept)])[self.starts])
        return self.take(np.flatnonzero(per_image), kept)

    def take(self, images: np.ndarray, kept: np.ndarray | None = None) -> "AnnotationIndex":
        """Some images (ascending positions), with their annotations, or those of them that are `kept` (bool [A])."""
        chosen = np.zeros(len(self), bool)
        chosen[images] = True
        kept = chosen[self.owners] & (True if kept is None else kept)
        annotations = np.flatnonzero(kept)
        per_image = np.bincount(self.owners[annotations], minlength=len(self))[images]
        points, rings, ring_starts = self.points, self.rings, self.ring_starts
        own_rings = ranges(ring_starts, annotations)
        name_bytes, name_starts = gather(self.name_bytes, self.name_starts, images)
        rle_bytes, rle_starts = gather(self.rle_bytes, self.rle_starts, annotations)
        points, rings = gather(points, rings, own_rings)
        return dataclasses.replace(
            self,
            image_ids=self.image_ids[images],
            image_sizes=self.image_sizes[images],
            name_bytes=name_bytes,
            name_starts=name_starts,
            starts=offsets(per_image),
            annotation_ids=self.annotation_ids[annotations],
            boxes=self.boxes[annotations],
            areas=self.areas[annotations],
            labels=self.labels[annotations],
            crowd=self.crowd[annotations],
            points=points,
            rings=rings,
            ring_starts=offsets(np.diff(ring_starts)[annotations]),
            rle_bytes=rle_bytes,
            rle_starts=rle_starts,
            cache=None,
        )


# --------------------------------------------------------------------------- cache


def _cache_folders(path: Path) -> list[Path]:
    """Where an index may lie, the preferred place first."""
    unique = f"{path.name}.{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}.index"
    if os.environ.get("BAGS_CACHE"):
        return [Path(os.environ["BAGS_CACHE"], unique)]
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "bags")
    return [path.with_name(f"{path.name}.index"), user / unique]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_cache(folder: Path, path: Path, stat: os.stat_result) -> AnnotationIndex | None:
    """The index in a folder, if it is whole and of this file as it is now."""
    try:
        about = json.loads((folder / "about.json").read_text())
        if about["format"] != FORMAT or about["size"] != stat.st_size:
            return None
        if about["time"] != stat.st_mtime_ns and about["sha256"] != _digest(path):
            return None
        if any((folder / f"{name}.npy").stat().st_size != size for name, size in about["files"].items()):
            return None
        return _map(folder, path)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _map(folder: Path, path: Path) -> AnnotationIndex:
    about = json.loads((folder / "about.json").read_text())
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS if name in about["files"]}
    empty = {name: np.zeros((0, columns) if columns else 0, kind) for name, (kind, columns) in ARRAYS.items()}
    return AnnotationIndex(path=path, categories=about["categories"], cache=folder, **{**empty, **arrays})


def _store(folder: Path, path: Path, stat: os.stat_result, digest: str) -> AnnotationIndex | None:
    """Packs the file into a folder of its own, which then takes its place in one step.

    None where the place cannot be written. Several processes may do this at once: the last one wins,
    with the same content.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError:
        return None
    try:
        packed = pack(path)
        categories = packed.pop("categories")
        files = {}
        for name, values in packed.items():
            if len(values):  # an empty file cannot be mapped
                np.save(temporary / f"{name}.npy", values)
                files[name] = (temporary / f"{name}.npy").stat().st_size
        about = {"format": FORMAT, "source": str(path), "size": stat.st_size, "time": stat.st_mtime_ns,
                 "sha256": digest, "files": files, "categories": categories}  # fmt: skip
        (temporary / "about.json").write_text(json.dumps(about))
        _replace(temporary, folder)
        return _map(folder, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, folder: Path) -> None:
    """Moves a folder to a name that may be taken, by an older one or by another process's."""
    for _ in range(100):
        try:
            os.replace(temporary, folder)
            return
        except OSError:  # not empty
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as old:
                try:
                    os.replace(folder, Path(old, "old"))
                except FileNotFoundError:
                    continue
    raise UserError(f"{folder}: cannot be replaced; remove it")
