"""Annotation JSON -> checked, flat arrays (what `index.py` keeps on disk)."""

import array
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from pycocotools import mask as coco_mask

from bags.core.errors import UserError
from bags.data.json_files import EMPTY, NUMBERS, is_box, is_empty_rle, is_number, is_side, shown, stream

LIMIT = 1e9  # coordinates of boxes beyond this are no pixels
FEWEST = 5  # objects from which a habit can be told
POLYGON_LIMIT = 2**17  # ... of polygons
OUTLINE_LIMIT = 2**21  # length of a polygon's outline in pixels: drawing takes 40 bytes for each
UNDRAWABLE = f"expected polygons within {POLYGON_LIMIT} pixels whose outlines are at most {OUTLINE_LIMIT} pixels long"

# --------------------------------------------------------------------------- packing


def pack(path: Path) -> dict:
    """The arrays of AnnotationIndex by name, and `categories`. Raises UserError for the first defect."""
    categories, annotations = [], _Annotations(path)
    ids, sides, names = [], array.array("i"), []
    for key, entry in stream(path):
        if key == "annotations":
            annotations.add(entry)
        elif key == "images":
            ids.append(_id(path, "images", entry))
            sides.extend(_size(path, entry))
            names.append(file_name_of(path, entry).encode())
        else:
            _id(path, "categories", entry)
            categories.append({name: entry[name] for name in KEPT if name in entry})
    for key, entries in (("images", ids), ("categories", categories)):
        if not entries:
            raise UserError(f"{path}: {EMPTY.format(key)}")
    categories.sort(key=lambda category: category["id"])
    category_ids = _unique(path, "categories", [category["id"] for category in categories])
    image_ids, sizes = _unique(path, "images", ids), np.asarray(sides, np.int32).reshape(-1, 2)
    return {
        "categories": categories,
        "category_ids": category_ids,
        "image_ids": image_ids,
        "image_sizes": sizes,
        "name_bytes": np.frombuffer(b"".join(names), np.uint8),
        "name_starts": offsets([len(name) for name in names]),
        **annotations.arrays(category_ids, image_ids, sizes),
    }


KEPT = ("id", "name", "instance_count", "image_count", "frequency")  # of a category


def category_name(category: dict) -> str:
    """A category's name, or its id where the file gives neither text nor a number. Lone surrogates are escaped."""
    name = category.get("name")
    usable = (isinstance(name, str) and name.strip()) or is_number(name)
    return str(name if usable else category["id"]).encode("utf-8", "backslashreplace").decode()


def _id(path: Path, kind: str, entry: dict) -> int:
    value = entry.get("id")
    if type(value) is not int or abs(value) >= 2**63:
        raise UserError(f"{path}: `{kind}`: expected a whole-number id below 2**63, got {shown(value)}")
    return value


def unique_ids(path: Path, kind: str, entries: list[dict]) -> np.ndarray:
    """The entries' ids, int64. Raises UserError where one is no whole number, or occurs twice."""
    return _unique(path, kind, [_id(path, kind, entry) for entry in entries])


def _unique(path: Path, kind: str, ids: ArrayLike) -> np.ndarray:
    ids = np.asarray(ids, np.int64)
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise UserError(f"{path}: `{kind}`: id {values[counts > 1][0]} occurs {counts.max()} times; ids must be unique")
    return ids


def _size(path: Path, image: dict) -> tuple[int, int]:
    height, width = image.get("height"), image.get("width")
    if not (is_side(height) and is_side(width)):
        given = f"{width!r:.40} x {height!r:.40}"
        raise UserError(f"{path}: image {image['id']}: expected width and height in pixels, found {given}")
    return height, width


def file_name_of(path: Path, image: dict) -> str:
    """`file_name`, or in LVIS v1, whose images lie in COCO's folders, the end of `coco_url`."""
    name = image.get("file_name")
    if name is None and isinstance(image.get("coco_url"), str):
        name = "/".join(image["coco_url"].split("/")[-2:])
    if not isinstance(name, str) or not name or any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise UserError(f"{path}: image {image['id']}: expected a file_name (or coco_url), found {name!r:.60}")
    return name


def rle_fits(counts: bytes, pixels: int) -> bool:
    """Whether compressed RLE counts (COCO's coding) are whole and add up to the pixels of the image.

    The decoder does not check this, and writes where it should not.
    """
    runs: list[int] = []
    position = 0
    while position < len(counts):
        value = shift = 0
        while True:
            if position >= len(counts) or shift > 60:
                return False
            code = counts[position] - 48
            if not 0 <= code < 64:
                return False
            value |= (code & 0x1F) << shift
            position, shift = position + 1, shift + 5
            if not code & 0x20:
                if code & 0x10:
                    value -= 1 << shift
                break
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        if runs[-1] < 0:
            return False
    return sum(runs) == pixels


def is_drawable(ring: Sequence[float]) -> bool:
    """Whether a polygon [x, y, ...] has an outline of usual length; drawing it takes memory in proportion to that."""
    if not all(abs(value) < POLYGON_LIMIT for value in ring):
        return False
    if len(ring) * max(map(abs, ring), default=0) <= OUTLINE_LIMIT:  # each of its edges is at most twice the maximum
        return True
    points = np.asarray(ring, np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()) <= OUTLINE_LIMIT


class _Annotations:
    """Annotations in the order of the file; what needs the other lists, or all numbers at once, is checked last."""

    def __init__(self, path: Path):
        self.path = path
        self.ids, self.images, self.categories = (array.array("q") for _ in range(3))
        self.boxes, self.crowd = array.array("d"), array.array("b")
        self.points, self.ring_lengths, self.ring_counts = array.array("f"), array.array("q"), array.array("q")
        self.rle, self.rle_lengths, self.rle_sizes = bytearray(), array.array("q"), array.array("q")

    def add(self, annotation: dict) -> None:
        """Takes in one annotation, or raises UserError."""
        key, box = _id(self.path, "annotations", annotation), annotation.get("bbox")
        for name, column in (("category_id", self.categories), ("image_id", self.images)):
            value = annotation.get(name)
            if type(value) is not int or abs(value) >= 2**63:
                raise self._error(key, f"{name}: expected a whole number below 2**63, got {shown(value)}")
            column.append(value)
        if not is_box(box):
            raise self._error(key, f"bbox: expected [x, y, width, height], got {box!r:.80}")
        if annotation.get("iscrowd", 0) not in (0, 1):
            raise self._error(key, f"iscrowd: expected 0 or 1, got {shown(annotation['iscrowd'])}")
        self.ids.append(key)
        self.crowd.append(int(annotation.get("iscrowd", 0)))
        try:
            self.boxes.extend(box)
            self._add_segmentation(key, annotation.get("segmentation"))
        except OverflowError:
            raise self._error(key, "bbox or segmentation: a number is too large to be a pixel") from None

    def _error(self, key: int, text: str) -> UserError:
        return UserError(f"{self.path}: annotation {key}: {text}")

    def _add_segmentation(self, key: int, value: object) -> None:
        rings, rle, size = 0, b"", [0, 0]
        if is_empty_rle(value):
            value = None
        if isinstance(value, dict):
            rle, size = self._rle(key, value), value["size"]
        elif isinstance(value, list):
            for ring in value:
                if not (isinstance(ring, list) and len(ring) % 2 == 0 and NUMBERS.issuperset(map(type, ring))):
                    raise self._error(key, f"segmentation: expected polygons [x, y, ...], got {ring!r:.80}")
                if len(ring) >= 6:  # fewer than three points have no area
                    self.points.extend(ring)
                    self.ring_lengths.append(len(ring))
                    rings += 1
        elif value is not None:
            raise self._error(key, f"segmentation: expected polygons or RLE, got {value!r:.80}")
        self.ring_counts.append(rings)
        self.rle += rle
        self.rle_lengths.append(len(rle))
        self.rle_sizes.extend(size)

    def _rle(self, key: int, value: dict) -> bytes:
        size, counts = value.get("size"), value.get("counts")
        if not (isinstance(size, list) and len(size) == 2 and all(map(is_side, size))):
            raise self._error(key, f"segmentation: RLE: size: expected [height, width], got {size!r:.60}")
        pixels = size[0] * size[1]
        if isinstance(counts, str) and counts.isascii() and rle_fits(counts.encode(), pixels):
            return counts.encode()
        if not (isinstance(counts, list) and all(type(c) is int and c >= 0 for c in counts) and sum(counts) == pixels):
            raise self._error(key, f"segmentation: expected RLE counts that add up to {pixels} pixels")
        return coco_mask.frPyObjects(value, *size)["counts"]  # type: ignore[call-overload]  # also lists of counts

    def arrays(self, category_ids: np.ndarray, image_ids: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """Everything, sorted by image; annotations of an image stay in the order of the file."""
        ids = _unique(self.path, "annotations", self.ids)
        labels = self._positions("category_id", self.categories, category_ids, "categories") + 1
        owners = self._positions("image_id", self.images, image_ids, "images")
        boxes = np.asarray(self.boxes, np.float64).reshape(-1, 4)
        self._refuse(~(np.abs(boxes) < LIMIT).all(1), "bbox holds a number that is not finite")
        points, point_starts = np.asarray(self.points, np.float32), offsets(self.ring_lengths)
        ring_starts, rle_starts = offsets(self.ring_counts), offsets(self.rle_lengths)
        self._refuse(self._undrawable(points, point_starts, ring_starts), f"segmentation: {UNDRAWABLE}")
        rle_sizes = np.asarray(self.rle_sizes, np.int64).reshape(-1, 2)
        differs = (rle_sizes != sizes[owners]).any(1) & (np.asarray(self.rle_lengths) > 0)
        self._refuse(differs, "segmentation: the RLE has another size than the image")

        order = np.argsort(owners, kind="stable")
        boxes[:, 2:] += boxes[:, :2]
        points, rings = gather(points, point_starts, ranges(ring_starts, order))
        rle_bytes, rle_starts = gather(np.frombuffer(bytes(self.rle), np.uint8), rle_starts, order)
        return {
            "starts": np.searchsorted(owners[order], np.arange(len(sizes) + 1)),
            "annotation_ids": ids[order],
            "boxes": boxes[order].astype(np.float32),
            "labels": labels[order],
            "crowd": np.asarray(self.crowd, np.bool_)[order],
            "points": points,
            "rings": rings,
            "ring_starts": offsets(np.diff(ring_starts)[order]),
            "rle_bytes": rle_bytes,
            "rle_starts": rle_starts,
        }

    def _undrawable(self, points: np.ndarray, point_starts: np.ndarray, ring_starts: np.ndarray) -> np.ndarray:
        """Which annotations have a polygon that is not drawable: bool [annotations]."""
        if not len(points):
            return np.zeros(len(self.ids), bool)
        farthest = np.maximum.reduceat(np.abs(points), point_starts[:-1])  # NaN where a point is
        usual = (farthest < POLYGON_LIMIT) & (farthest * np.diff(point_starts) <= OUTLINE_LIMIT)
        candidates = np.flatnonzero(~usual)
        rings = [k for k in candidates if not is_drawable(points[point_starts[k] : point_starts[k + 1]].tolist())]
        odd = np.zeros(len(self.ids), bool)
        odd[np.searchsorted(ring_starts, rings, side="right") - 1] = True
        return odd

    def _positions(self, name: str, column: array.array, known: np.ndarray, kind: str) -> np.ndarray:
        """The position of each value among the known ids."""
        values, order = np.asarray(column, np.int64), np.argsort(known)
        places = np.searchsorted(known[order], values).clip(max=len(known) - 1)
        unknown = known[order][places] != values
        if unknown.any():
            first = int(unknown.argmax())
            raise self._error(self.ids[first], f"{name} {values[first]} is not among `{kind}`")
        return order[places]

    def _refuse(self, bad: np.ndarray | np.bool_, text: str) -> None:
        if bad.any():
            raise self._error(self.ids[int(bad.argmax())], text)


# --------------------------------------------------------------------------- ragged arrays


def offsets(lengths: ArrayLike) -> np.ndarray:
    """Where each of consecutive runs starts, and the end: int64 [runs + 1]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def ranges(starts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """All positions starts[c] .. starts[c + 1] of the chosen rows, in order."""
    lengths = starts[chosen + 1] - starts[chosen]
    shift = np.repeat(starts[chosen] - offsets(lengths)[:-1], lengths)
    return np.arange(len(shift)) + shift


def gather(values: np.ndarray, starts: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chosen rows of a ragged array: (values, starts)."""
    return values[ranges(starts, chosen)], offsets(starts[chosen + 1] - starts[chosen])


def implausible(boxes: np.ndarray, sizes: np.ndarray) -> dict[str, str]:
    """Kind of finding -> what was seen, of boxes that look like another unit or format than x, y, width, height.

    boxes: float64 [A, 4], x1, y1, x2, y2 as x, y, width, height say; sizes: [A, 2], width and height of their images.
    Kinds: "normalised boxes" (most are smaller than a pixel, as fractions of the image are), "corner boxes" (all lie
    in one quarter of their images, as boxes of smaller copies do) and "boxes of two corners" (x1, y1, x2, y2).
    """
    number = len(boxes)
    if number < FEWEST:
        return {}
    sides = boxes[:, 2:] - boxes[:, :2]
    small = (sides < 1).all(1) & (boxes[:, 2:] <= 2).all(1)
    if small.mean() > 0.5:
        return {"normalised boxes": f"{small.sum()} of {number} boxes are smaller than one pixel"}
    beyond = (boxes[:, 2:] > sizes + 1).any(1)
    as_corners = (sides > boxes[:, :2]).all(1) & (sides <= sizes + 1).all(1)
    if as_corners.mean() > 0.95 and beyond.mean() > 0.2:
        return {
            "boxes of two corners": f"{beyond.sum()} of {number} boxes leave their images; read as x1, y1, x2, y2 "
            f"{as_corners.sum()} fit"
        }
    if number >= 4 * FEWEST and (boxes[:, 2:] <= sizes / 2).all():
        return {"corner boxes": f"all {number} boxes lie in the upper left quarter of their images"}
    return {}
