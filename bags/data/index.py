"""A COCO or LVIS annotation file as flat arrays."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bags.errors import UserError


@dataclass(frozen=True)
class AnnotationIndex:
    """I images, A annotations sorted by image, C categories. Labels are 1..C by ascending id.

    path          the JSON file
    category_ids  int64 [C]; category_names: C names
    image_ids     int64 [I]; file_names: I names; image_sizes: int32 [I, 2] height, width (pixels)
    starts        int64 [I + 1]; annotations of image i are starts[i] .. starts[i + 1]
    boxes         float32 [A, 4] x1, y1, x2, y2 (pixels); labels int64 [A]; crowd bool [A]
    """

    path: Path
    category_ids: np.ndarray
    category_names: list[str]
    image_ids: np.ndarray
    file_names: list[str]
    image_sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray

    def __len__(self) -> int:
        return len(self.image_ids)

    def only(self, wanted: np.ndarray) -> "AnnotationIndex":
        """The images and annotations of some labels alone. wanted: bool [C + 1]; labels keep their numbers."""
        kept = wanted[self.labels] & ~self.crowd
        per_image = np.diff(np.concatenate([[0], np.cumsum(kept)])[self.starts])
        images = np.flatnonzero(per_image)
        return dataclasses.replace(
            self,
            image_ids=self.image_ids[images],
            file_names=[self.file_names[i] for i in images],
            image_sizes=self.image_sizes[images],
            starts=np.concatenate([[0], np.cumsum(per_image[images])]),
            boxes=self.boxes[kept],
            labels=self.labels[kept],
            crowd=self.crowd[kept],
        )

    @classmethod
    def open(cls, path: str | Path) -> "AnnotationIndex":
        """Reads and checks a file. Raises UserError that names the file and the entry at fault."""
        path = Path(path)
        content = read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected a COCO or LVIS annotation object, found a {type(content).__name__}")
        for key in ("images", "annotations", "categories"):
            if not isinstance(content.get(key), list):
                raise UserError(f"{path}: no list `{key}`: this is not a COCO or LVIS annotation file")
        for key in ("images", "categories"):
            if not content[key]:
                raise UserError(f"{path}: `{key}` is empty: nothing to train on or to evaluate")
        try:
            return cls._pack(path, content)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{path}: an entry lacks a field or has one of a wrong type ({error!r})") from None

    @classmethod
    def _pack(cls, path: Path, content: dict) -> "AnnotationIndex":
        categories = sorted(content["categories"], key=lambda c: c["id"])
        images, annotations = content["images"], content["annotations"]
        category_ids = _unique_ids(path, "categories", categories)
        image_ids = _unique_ids(path, "images", images)
        _unique_ids(path, "annotations", annotations)
        for image in images:
            width, height = image["width"], image["height"]
            if not (type(width) is type(height) is int and width > 0 and height > 0):
                raise UserError(f"{path}: image {image['id']} has size {width!r} x {height!r}: expected pixels")

        label_of = {int(c): label for label, c in enumerate(category_ids, start=1)}
        position_of = {int(i): position for position, i in enumerate(image_ids)}
        boxes = np.zeros((len(annotations), 4), np.float64)
        labels, owners = np.zeros((2, len(annotations)), np.int64)
        for k, annotation in enumerate(annotations):
            where = f"{path}: annotation {annotation['id']}"
            if annotation["category_id"] not in label_of:
                raise UserError(f"{where}: category_id {annotation['category_id']} is not among `categories`")
            if annotation["image_id"] not in position_of:
                raise UserError(f"{where}: image_id {annotation['image_id']} is not among `images`")
            box = annotation["bbox"]
            if not is_box(box):
                raise UserError(f"{where}: bbox: expected [x, y, width, height], got {box}")
            boxes[k] = box
            if not np.isfinite(boxes[k]).all():
                raise UserError(f"{where}: bbox holds a number that is not finite: {annotation['bbox']}")
            labels[k] = label_of[annotation["category_id"]]
            owners[k] = position_of[annotation["image_id"]]
        boxes[:, 2:] += boxes[:, :2]

        order = np.argsort(owners, kind="stable")
        odd = next((a for a in annotations if a.get("iscrowd", 0) not in (0, 1)), None)
        if odd is not None:
            raise UserError(f"{path}: annotation {odd['id']}: iscrowd: expected 0 or 1, got {odd['iscrowd']!r}")
        crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], bool)
        return cls(
            path=path,
            category_ids=category_ids,
            category_names=[str(c.get("name", c["id"])) for c in categories],
            image_ids=image_ids,
            file_names=[_file_name(image) for image in images],
            image_sizes=np.array([(image["height"], image["width"]) for image in images], np.int32),
            starts=np.searchsorted(owners[order], np.arange(len(images) + 1)),
            boxes=boxes[order].astype(np.float32),
            labels=labels[order],
            crowd=crowd[order],
        )


def is_box(value: object) -> bool:
    """True for a list of four numbers."""
    return isinstance(value, list) and len(value) == 4 and all(type(v) in (int, float) for v in value)


def read_json(path: Path) -> object:
    """Parses a JSON file; every way in which that fails is one UserError that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check data.root and the names below it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be an annotation or results file") from None
    except ValueError as error:  # also a number of thousands of digits
        found = "the file is empty" if path.stat().st_size == 0 else f"not valid JSON ({error})"
        raise UserError(f"{path}: {found}") from None


def _unique_ids(path: Path, kind: str, entries: list[dict]) -> np.ndarray:
    odd = next((entry["id"] for entry in entries if type(entry["id"]) is not int or abs(entry["id"]) >= 2**63), None)
    if odd is not None:
        raise UserError(f"{path}: `{kind}`: expected whole-number ids, found {odd!r}")
    ids = np.array([entry["id"] for entry in entries], np.int64)
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise UserError(f"{path}: `{kind}`: id {values[counts > 1][0]} occurs {counts.max()} times; ids must be unique")
    return ids


def _file_name(image: dict) -> str:
    """`file_name`, or in LVIS v1, whose images lie in COCO's folders, the end of `coco_url`."""
    name = image["file_name"] if "file_name" in image else "/".join(image["coco_url"].split("/")[-2:])
    if not isinstance(name, str) or not name or "\0" in name:
        raise TypeError(f"file_name {name!r} of image {image['id']}")
    return name
