"""Annotation JSON -> checked, flat arrays (what `index.py` keeps on disk)."""

import array
import json
from pathlib import Path

import numpy as np
import orjson
from pycocotools import mask as coco_mask

from bags.errors import UserError


def read_json(path: Path) -> object:
    """Parses a JSON file; every way in which that fails is one UserError that names the file."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check data.root and the names below it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if not text.strip():
            raise UserError(f"{path}: the file is empty") from None
        reason = error
    if any(word in text for word in (b"NaN", b"Infinity")):  # Python writes these, though JSON has no such numbers
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = error
    raise UserError(f"{path}: not valid JSON ({' '.join(str(reason).split())})") from None


def is_number(value: object) -> bool:
    """True for a finite or infinite number; bool is none."""
    return type(value) in (int, float)


def is_box(value: object) -> bool:
    """True for a list of four numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def read_annotations(path: Path) -> dict:
    """The content of an annotation file; UserError where it has not the three lists."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a COCO or LVIS annotation object, found a {type(content).__name__}")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise UserError(f"{path}: no list `{key}`: this is not a COCO or LVIS annotation file")
        for position, entry in enumerate(content[key]):
            if not isinstance(entry, dict):
                raise UserError(f"{path}: `{key}`: entry {position}: expected an object, found {entry!r:.60}")
    for key in ("images", "categories"):
        if not content[key]:
            raise UserError(f"{path}: `{key}` is empty: nothing to train on or to evaluate")
    return content


def pack(path: Path) -> dict:
    """The arrays of AnnotationIndex by name, and `categories`. Raises UserError for the first defect.

    Entries are let go as they are packed, so that memory never holds the file twice.
    """
    content = read_annotations(path)
    categories = sorted(content.pop("categories"), key=lambda category: _id(path, "categories", category))
    images, annotations = content.pop("images"), content.pop("annotations")
    category_ids, image_ids = _unique(path, "categories", categories), _unique(path, "images", images)
    _unique(path, "annotations", annotations)
    sizes = np.array([_size(path, image) for image in images], np.int32)
    names = [file_name_of(path, image).encode() for image in images]
    packed = _Annotations(path, category_ids, image_ids, sizes)
    for position, annotation in enumerate(annotations):
        packed.add(annotation)
        annotations[position] = None
    kept = ("id", "name", "instance_count", "image_count", "frequency")
    return {
        "categories": [{key: category[key] for key in kept if key in category} for category in categories],
        "category_ids": category_ids,
        "image_ids": image_ids,
        "image_sizes": sizes,
        "name_bytes": np.frombuffer(b"".join(names), np.uint8),
        "name_starts": offsets([len(name) for name in names]),
        **packed.arrays(),
    }


def _id(path: Path, kind: str, entry: dict) -> int:
    value = entry.get("id")
    if type(value) is not int or abs(value) >= 2**63:
        raise UserError(f"{path}: `{kind}`: expected a whole-number id, found {value!r:.60}")
    return value


def _unique(path: Path, kind: str, entries: list[dict]) -> np.ndarray:
    ids = np.array([_id(path, kind, entry) for entry in entries], np.int64)
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise UserError(f"{path}: `{kind}`: id {values[counts > 1][0]} occurs {counts.max()} times; ids must be unique")
    return ids


def _size(path: Path, image: dict) -> tuple[int, int]:
    height, width = image.get("height"), image.get("width")
    if not (type(height) is type(width) is int and 0 < height < 2**20 and 0 < width < 2**20):
        found = f"{width!r:.40} x {height!r:.40}"
        raise UserError(f"{path}: image {image['id']}: expected width and height in pixels, found {found}")
    return height, width


def file_name_of(path: Path, image: dict) -> str:
    """`file_name`, or in LVIS v1, whose images lie in COCO's folders, the end of `coco_url`."""
    name = image.get("file_name")
    if name is None and isinstance(image.get("coco_url"), str):
        name = "/".join(image["coco_url"].split("/")[-2:])
    if not isinstance(name, str) or not name or "\0" in name or not name.isprintable():
        raise UserError(f"{path}: image {image['id']}: expected a file_name (or coco_url), found {name!r:.60}")
    return name


def rle_fits(counts: bytes, pixels: int) -> bool:
    """Whether compressed RLE counts (COCO's coding) are whole and add up to the pixels of the image.

    The decoder does not check this, and writes where it should not.
    """
    runs, position = [], 0
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


class _Annotations:
    """Annotations in the order of the file, then sorted by image."""

    def __init__(self, path: Path, category_ids: np.ndarray, image_ids: np.ndarray, sizes: np.ndarray):
        self.path, self.sizes = path, sizes
        self.label_of = {int(c): label for label, c in enumerate(category_ids, start=1)}
        self.position_of = {int(i): position for position, i in enumerate(image_ids)}
        self.ids, self.owners, self.labels = (array.array("q") for _ in range(3))
        self.boxes, self.areas, self.crowd = array.array("d"), array.array("d"), array.array("b")
        self.points, self.ring_lengths, self.ring_counts = array.array("f"), array.array("q"), array.array("q")
        self.rle, self.rle_lengths = bytearray(), array.array("q")

    def add(self, annotation: dict) -> None:
        """Takes in one annotation, or raises UserError."""
        self.where = f"{self.path}: annotation {annotation['id']}"
        self.labels.append(self._known(annotation, "category_id", self.label_of, "categories"))
        self.owners.append(self._known(annotation, "image_id", self.position_of, "images"))
        box, area, crowd = annotation.get("bbox"), annotation.get("area"), annotation.get("iscrowd", 0)
        if not is_box(box):
            raise UserError(f"{self.where}: bbox: expected [x, y, width, height], got {box!r:.80}")
        if not all(abs(value) < 1e9 for value in box):  # NaN too
            raise UserError(f"{self.where}: bbox holds a number that is not finite: {box}")
        if area is None:
            area = max(box[2], 0) * max(box[3], 0)
        if not is_number(area) or not abs(area) < 1e18:
            raise UserError(f"{self.where}: area: expected a number of pixels, got {area!r:.60}")
        if crowd not in (0, 1):
            raise UserError(f"{self.where}: iscrowd: expected 0 or 1, got {crowd!r:.60}")
        self.ids.append(annotation["id"])
        self.boxes.extend(box)
        self.areas.append(area)
        self.crowd.append(int(crowd))
        self._add_segmentation(annotation.get("segmentation"))

    def _known(self, annotation: dict, key: str, known: dict[int, int], kind: str) -> int:
        value = annotation.get(key)
        if type(value) is not int or value not in known:
            raise UserError(f"{self.where}: {key} {value!r:.60} is not among `{kind}`")
        return known[value]

    def _add_segmentation(self, value: object) -> None:
        rings, length = 0, 0
        if isinstance(value, dict):
            rle = self._rle(value)
            self.rle += rle
            length = len(rle)
        elif isinstance(value, list):
            for ring in value:
                if not isinstance(ring, list) or len(ring) % 2 or not all(is_number(v) and abs(v) < 1e9 for v in ring):
                    raise UserError(
                        f"{self.where}: segmentation: expected polygons [x, y, x, y, ...], got {ring!r:.80}"
                    )
                if len(ring) >= 6:  # fewer than three points have no area
                    self.points.extend(ring)
                    self.ring_lengths.append(len(ring))
                    rings += 1
        elif value is not None:
            raise UserError(f"{self.where}: segmentation: expected polygons or RLE, got {value!r:.80}")
        self.ring_counts.append(rings)
        self.rle_lengths.append(length)

    def _rle(self, value: dict) -> bytes:
        height, width = self.sizes[self.owners[-1]].tolist()
        size, counts = value.get("size"), value.get("counts")
        if size != [height, width]:
            raise UserError(
                f"{self.where}: segmentation: RLE of size {size!r:.40}, but the image is [{height}, {width}]"
            )
        if isinstance(counts, str) and counts.isascii() and rle_fits(counts.encode(), height * width):
            return counts.encode()
        valid = isinstance(counts, list) and all(type(c) is int and c >= 0 for c in counts)
        if not valid or sum(counts) != height * width:
            raise UserError(f"{self.where}: segmentation: expected RLE counts that add up to {height * width} pixels")
        return coco_mask.frPyObjects(value, height, width)["counts"]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, sorted by image; annotations of an image stay in the order of the file."""
        owners = np.asarray(self.owners, np.int64)
        order = np.argsort(owners, kind="stable")
        boxes = np.asarray(self.boxes, np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        ring_starts = offsets(self.ring_counts)
        own_rings = ranges(ring_starts, order)
        points, rings = gather(np.asarray(self.points, np.float32), offsets(self.ring_lengths), own_rings)
        rle_bytes, rle_starts = gather(np.frombuffer(bytes(self.rle), np.uint8), offsets(self.rle_lengths), order)
        return {
            "starts": np.searchsorted(owners[order], np.arange(len(self.sizes) + 1)),
            "annotation_ids": np.asarray(self.ids, np.int64)[order],
            "boxes": boxes[order].astype(np.float32),
            "areas": np.asarray(self.areas, np.float32)[order],
            "labels": np.asarray(self.labels, np.int64)[order],
            "crowd": np.asarray(self.crowd, np.bool_)[order],
            "points": points,
            "rings": rings,
            "ring_starts": offsets(np.diff(ring_starts)[order]),
            "rle_bytes": rle_bytes,
            "rle_starts": rle_starts,
        }


# --------------------------------------------------------------------------- ragged arrays


def offsets(lengths) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def ranges(starts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """All positions starts[c] .. starts[c + 1] of the chosen rows, in order."""
    lengths = starts[chosen + 1] - starts[chosen]
    shift = np.repeat(starts[chosen] - offsets(lengths)[:-1], lengths)
    return np.arange(len(shift)) + shift


def gather(values: np.ndarray, starts: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chosen rows of a ragged array: (values, starts)."""
    return values[ranges(starts, chosen)], offsets(starts[chosen + 1] - starts[chosen])
