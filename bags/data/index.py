"""A COCO or LVIS annotation file as flat arrays, memory-mapped and shared by all processes.

The first `AnnotationIndex.open` packs the JSON into a folder of NumPy arrays, beside it if that place
can be written (`train.json` -> `train.json.index/`), else below the user's cache folder; the environment
variable BAGS_CACHE names another place for all of them. Later opens only map that folder.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bags.core.errors import UserError
from bags.core.files import open_regular, read_text, write_problem
from bags.data.images import image_path
from bags.data.packing import category_name, gather, offsets, pack, ranges

FORMAT = 5
LEAST_SIDE = 1e-3  # pixels of a box inside its image
ARRAYS = {  # name -> (type, columns); lengths: I images, A annotations, C categories, see AnnotationIndex
    "category_ids": (np.int64, 0),
    "image_ids": (np.int64, 0),
    "image_sizes": (np.int32, 2),
    "name_bytes": (np.uint8, 0),
    "name_starts": (np.int64, 0),
    "starts": (np.int64, 0),
    "annotation_ids": (np.int64, 0),
    "boxes": (np.float32, 4),
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
    boxes           float32 [A, 4] x1, y1, x2, y2 (pixels); labels int64 [A]
    crowd           bool [A]
    name_bytes, name_starts, points, rings, ring_starts, rle_bytes, rle_starts
                    see `file_name` and `segmentation`
    for_masks       whether masks are learnt, so that an object without a segmentation does not train: see `trained`
    sha256, state   digest of the whole file, and its size and times, when it was opened
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
    labels: np.ndarray
    crowd: np.ndarray
    points: np.ndarray
    rings: np.ndarray
    ring_starts: np.ndarray
    rle_bytes: np.ndarray
    rle_starts: np.ndarray
    cache: Path | None = None
    for_masks: bool = False
    sha256: str = ""
    state: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.image_ids)

    def __reduce__(self) -> tuple:
        """A process that is not forked maps the same folder again."""
        if self.cache is not None:
            return _reopen, (self.cache, self.path, self.for_masks)
        return AnnotationIndex, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @classmethod
    def open(cls, path: str | Path) -> "AnnotationIndex":
        """Maps the index of a file, which is made first where it is missing, stale or damaged.

        Raises UserError that names the file and the entry at fault.
        """
        path = Path(path)
        if not path.is_file():
            what = "not a regular file" if path.exists() else "no such file"
            raise UserError(f"{path}: {what}; check the path (in a configuration data.root and the names below it)")
        folders = _cache_folders(path)
        for folder in folders:
            index = _open_cache(folder, path)
            if index is not None:
                return index
        for folder in folders:
            try:
                return _make(folder, path)
            except OSError as error:  # a place that cannot be written, or is full
                if error.errno == errno.EMFILE:
                    raise
                reason = write_problem(error)
        places = " or ".join(str(folder.parent) for folder in folders)
        raise UserError(f"{path}: its index cannot be written to {places} ({reason}): set BAGS_CACHE to another folder")

    def check_unchanged(self) -> None:
        """Raise UserError if the file has other content than when it was opened."""
        if _state(self.path) != list(self.state) and _digest(self.path) != self.sha256:
            raise UserError(f"{self.path}: has changed while this command was running: give the command again")

    def content_digest(self, segmentations: bool = False) -> str:
        """SHA-256, in hexadecimal, of what training sees: images, boxes, labels, crowd flags; or segmentations, too."""
        names = ["image_ids", "image_sizes", "name_bytes", "name_starts", "starts", "boxes", "labels", "crowd"]
        if segmentations:
            names += ["points", "rings", "ring_starts", "rle_bytes", "rle_starts"]
        digest = hashlib.sha256()
        for name in names:
            digest.update(np.ascontiguousarray(getattr(self, name)).data)
        return digest.hexdigest()

    @property
    def category_names(self) -> list[str]:
        """C names, see `category_name`."""
        return [category_name(category) for category in self.categories]

    @property
    def trained(self) -> np.ndarray:
        """Which annotations are objects that train, bool [A]: the rule for statistics, groups, samplers and checks.

        Left out are crowd regions, boxes that are less than `LEAST_SIDE` pixels wide or high inside the image, and,
        where masks are learnt, objects without a segmentation.
        """
        trained = ~self.crowd & inside_image(self.boxes, self.image_sizes[self.owners])[1]
        return trained & self.has_segmentation if self.for_masks else trained

    @property
    def owners(self) -> np.ndarray:
        """The image (0..I-1) of each annotation, int64 [A]."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def file_name(self, image: int) -> str:
        """The file of image 0..I-1, relative to the image folder."""
        return self.name_bytes[slice(*self.name_starts[image : image + 2])].tobytes().decode()

    def image_path(self, folder: Path, image: int) -> Path:
        """The file of image 0..I-1 below a folder. Raises UserError for a name that leads out of it."""
        try:
            return image_path(folder, self.file_name(image))
        except UserError as error:
            raise UserError(f"{self.path}: image {self.image_ids[image]}: {error}") from None

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

    @property
    def has_segmentation(self) -> np.ndarray:
        """Whether each annotation has one, bool [annotations]."""
        return (np.diff(self.rle_starts) > 0) | (np.diff(self.ring_starts) > 0)

    def only(self, wanted: np.ndarray) -> "AnnotationIndex":
        """Only the images and annotations of some labels. wanted: bool [C + 1]; labels keep their numbers."""
        kept = wanted[self.labels] & self.trained
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
            labels=self.labels[annotations],
            crowd=self.crowd[annotations],
            points=points,
            rings=rings,
            ring_starts=offsets(np.diff(ring_starts)[annotations]),
            rle_bytes=rle_bytes,
            rle_starts=rle_starts,
            cache=None,
        )


def inside_image(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(boxes float32 [A, 4] clipped to their images, whether anything of them is left, bool [A]).

    boxes: x1, y1, x2, y2 in pixels; sizes: [A, 2] or [2], height and width of their images.
    """
    clipped = np.clip(boxes, 0, np.tile(sizes[..., ::-1], 2).astype(np.float32))
    return clipped, (clipped[:, 2:] - clipped[:, :2] >= LEAST_SIDE).all(1)


# --------------------------------------------------------------------------- cache


def _cache_folders(path: Path) -> list[Path]:
    """Where an index may lie, the preferred place first."""
    unique = f"{path.name}.{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}.index"
    if os.environ.get("BAGS_CACHE"):
        return [_in_home("BAGS_CACHE", os.environ["BAGS_CACHE"]) / unique]
    folders = [path.with_name(f"{path.name}.index")]
    user = os.environ.get("XDG_CACHE_HOME", "")
    user = user if os.path.isabs(user) else os.path.expanduser("~/.cache")  # the standard ignores relative ones
    if os.path.isabs(user) and os.path.expanduser("~") != "/":  # a process without a home has no cache folder
        folders.append(Path(user, "bags", unique))
    return folders


def _in_home(variable: str, folder: str) -> Path:
    """A folder whose leading ~ is expanded. Raises UserError where nothing says which folder that is."""
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise UserError(f"{variable}={folder}: the home folder is unknown; write the folder out") from None


def _state(path: Path) -> list[int]:
    """Size and times of a file, which change when it is written or copied."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_cache(folder: Path, path: Path) -> AnnotationIndex | None:
    """The index in a folder, if it is whole and of this file as it is now."""
    try:
        about = _read(folder)
        if any(_checksum(folder / f"{name}.npy") != sums for name, sums in about["files"].items()):
            return None
        state = _state(path)
        if about["state"] != state:
            if about["state"][0] != state[0] or about["sha256"] != _digest(path):
                return None
            about["state"] = state
            with contextlib.suppress(OSError):  # the same content: need not be read again the next time
                _write(folder, about)
        return _map(folder, path, about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _read(folder: Path) -> dict:
    """What `_write` wrote. Raises ValueError for anything else."""
    about, sums = json.loads(read_text(folder / "about.json"))
    if sums != zlib.crc32(json.dumps(about).encode()) or about["format"] != FORMAT:
        raise ValueError("damaged, or of another version")
    return about


def _checksum(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    size = crc = 0
    with open_regular(path) as file:
        while block := file.read(2**22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _write(folder: Path, about: dict) -> None:
    temporary = folder / f"about.{os.getpid()}.tmp"
    temporary.write_text(json.dumps([about, zlib.crc32(json.dumps(about).encode())]))
    os.replace(temporary, folder / "about.json")


def _reopen(folder: Path, path: Path, for_masks: bool) -> AnnotationIndex:
    """The index that another process has opened."""
    return _map(folder, path, _read(folder), for_masks)


def _map(folder: Path, path: Path, about: dict, for_masks: bool = False) -> AnnotationIndex:
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS if name in about["files"]}
    empty: dict[str, np.ndarray] = {
        name: np.zeros((0, columns) if columns else (0,), kind) for name, (kind, columns) in ARRAYS.items()
    }
    known = {"categories": about["categories"], "cache": folder, "for_masks": for_masks}
    known |= {"sha256": about["sha256"], "state": tuple(about["state"])}
    return AnnotationIndex(path=path, **known, **{**empty, **arrays})


def _make(folder: Path, path: Path) -> AnnotationIndex:
    """Packs the file into a folder of its own, which then takes its place. Raises OSError where that cannot be written.

    One process does this at a time; the others wait, and find it made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        index = _open_cache(folder, path)
        if index is not None:
            return index
        for left_over in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            os.chmod(temporary, 0o755)  # other users of the dataset share it
            state, digest = _state(path), _digest(path)
            packed = pack(path)
            categories, files = packed.pop("categories"), {}
            for name, values in packed.items():
                if len(values):  # an empty file cannot be mapped
                    with (temporary / f"{name}.npy").open("wb") as file:
                        np.save(file, values)
                        file.flush()
                        os.fsync(file.fileno())
                    files[name] = _checksum(temporary / f"{name}.npy")
            about = {"format": FORMAT, "source": str(path), "state": state, "sha256": digest, "files": files}
            about["categories"] = categories
            _write(temporary, about)
            if folder.exists():
                os.replace(folder, temporary.with_name(f"{temporary.name}.old"))
            os.replace(temporary, folder)
            return _map(folder, path, about)
        finally:
            for rest in (temporary, temporary.with_name(f"{temporary.name}.old")):
                shutil.rmtree(rest, ignore_errors=True)
    finally:
        os.close(lock)
