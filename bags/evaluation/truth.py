"""Ground truth of an annotation file, reduced to the fields that scoring needs.

Engines never see the file itself. Metadata (`info`, licences, names, dates, supercategories, keypoints) therefore
cannot stop or change an evaluation, and ids may be any whole numbers.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
from pycocotools import mask as coco_mask

from bags.core.errors import UserError
from bags.data.json_files import LISTS, is_box, is_empty_rle, is_number, is_side, read_annotations, shown
from bags.data.packing import LIMIT, UNDRAWABLE, category_name, is_drawable, unique_ids
from bags.data.statistics import CategoryStats

NEGATIVE, PARTIAL = "neg_category_ids", "not_exhaustive_category_ids"  # of LVIS's images
LARGEST_AREA = 1e10  # the protocol ignores objects beyond it
EMPTY_AREA = 1e-9  # of an empty box: the official lvis drops objects of area 0, the other tools count them as missed


@dataclass(frozen=True, eq=False)
class Truth:
    """I images, A annotations, C categories.

    image_ids      int64 [I], ascending
    category_ids   int64 [C], ascending; names: C texts in this order
    content        what the engines read: `images`, `annotations` and `categories`, in the order of the file. Images
                   and categories have their ranks 1..I and 1..C as ids, annotations 1..A. Every annotation has bbox
                   (x, y, width, height in pixels), area and iscrowd; a segmentation where it has a mask
    annotation_ids int64 [A], in the order of the file
    counts         C dicts in label order: instance_count, image_count and frequency, where the file gives them
    lvis           whether most images list negative categories, so that LVIS's protocol applies
    notes          sentences about repaired or unusual entries, for the user
    count_notes    the same about `counts`, for where they are used
    """

    path: Path
    image_ids: np.ndarray
    category_ids: np.ndarray
    annotation_ids: np.ndarray
    names: list[str]
    content: dict[str, list[dict]]
    counts: list[dict]
    lvis: bool
    notes: list[str]
    count_notes: list[str]

    def engine_content(self, masks: bool) -> dict[str, list[dict]]:
        """`content`, with or without segmentations."""
        if masks:
            return self.content
        plain = [
            {name: value for name, value in annotation.items() if name != "segmentation"}
            for annotation in self.content["annotations"]
        ]
        return {**self.content, "annotations": plain}

    def category_counts(self) -> list[dict]:
        """Categories by ascending id, with `counts`, as `statistics.training_of` takes them."""
        return [{"id": key} | counts for key, counts in zip(self.category_ids.tolist(), self.counts, strict=True)]

    def counts_itself(self) -> bool:
        """Whether every `instance_count` is the number of this file's own objects, so hardly that of training."""
        objects = Counter(a["category_id"] for a in self.content["annotations"] if not a["iscrowd"])
        return all(counts.get("instance_count") == objects[key] for key, counts in enumerate(self.counts, start=1))

    def lacks_masks(self) -> str | None:
        """Why masks cannot be scored, or None: every object needs a segmentation."""
        bare = ["segmentation" not in annotation for annotation in self.content["annotations"]]
        if not any(bare):
            return None
        first = self.annotation_ids[bare.index(True)]
        return f"{sum(bare)} of {len(bare)} objects have no segmentation (first: annotation {first})"

    def check_masks(self) -> None:
        """Raise UserError that names the first annotation without a mask of its image's size."""
        if reason := self.lacks_masks():
            raise UserError(f"{self.path}: {reason}: masks cannot be scored")
        sizes = mask_sizes(self)
        for key, annotation in zip(self.annotation_ids, self.content["annotations"], strict=True):
            check_mask(f"{self.path}: annotation {key}", annotation["segmentation"], sizes[annotation["image_id"]])

    def training_counts(self, stats: CategoryStats, source: object) -> dict[str, list[int]]:
        """`instance_counts` and `image_counts` of the C categories, as `score` takes them.

        source: the file of `stats`, for messages. Raises UserError for other categories.
        """
        positions = {key: k for k, key in enumerate(stats.category_ids)}
        for key, name in zip(self.category_ids.tolist(), self.names, strict=True):
            other = stats.names[positions[key]] if key in positions else None
            if other != name:
                known = "is not there" if other is None else f"is {other!r} there"
                raise UserError(f"{source}: category {key} ({name!r} in {self.path}) {known}: other training data")
        rows = [positions[key] for key in self.category_ids.tolist()]
        instances, images = ([counts[row] for row in rows] for counts in (stats.instance_counts, stats.image_counts))
        return {"instance_counts": instances, "image_counts": images}


def read_truth(path: str | Path) -> Truth:
    """Read and check an annotation file.

    A missing or impossible area is replaced by that of the mask or box, with a note. Raises UserError that names the
    file and the annotation, image or category at fault.
    """
    path = Path(path)
    content = read_annotations(path)
    if not content["annotations"]:
        raise UserError(f"{path}: `annotations` is empty: nothing to evaluate against")
    ids = {key: unique_ids(path, key, content[key]) for key in LISTS}
    images, categories = (ranks_of(ids[key]) for key in ("images", "categories"))
    notes, count_notes = Notes(path), Notes(path)
    by_id = sorted(content["categories"], key=lambda category: category["id"])
    lvis, image_entries = _images(content["images"], images, categories, notes)
    sizes = {image["id"]: (image["height"], image["width"]) for image in image_entries}
    annotations = []
    for rank, (key, annotation) in enumerate(zip(ids["annotations"].tolist(), content["annotations"], strict=True), 1):
        entry = _annotation(f"{path}: annotation {key}", annotation, images, categories)
        entry["id"] = rank
        entry["area"] = _area(f"annotation {key}", entry, annotation.get("area"), sizes[entry["image_id"]], notes)
        annotations.append(entry)
    crowd = sum(entry["iscrowd"] for entry in annotations)
    if crowd == len(annotations):
        notes.sentences.append(f"all {crowd} objects are crowd regions (iscrowd 1), which are not scored: no AP exists")
    category_entries = [
        {"id": categories[category["id"]], "name": f"{category['id']}", "frequency": "f", "image_count": 1}
        for category in content["categories"]
    ]
    return Truth(
        path,
        np.sort(ids["images"]),
        np.sort(ids["categories"]),
        ids["annotations"],
        [category_name(category) for category in by_id],
        {"images": image_entries, "annotations": annotations, "categories": category_entries},
        [_counts(category, count_notes) for category in by_id],
        lvis,
        notes.all(),
        count_notes.all(),
    )


class Notes:
    """Repaired and unusual entries of a file: for each kind their number and the first one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kinds: dict[str, list] = {}
        self.sentences: list[str] = []

    def add(self, kind: str, where: str) -> None:
        """Count one entry of a kind, which is a plural noun phrase."""
        self.kinds.setdefault(kind, [0, where])[0] += 1

    def all(self) -> list[str]:
        """One sentence for each kind."""
        counted = [f"{kind}: {number} (first: {first})" for kind, (number, first) in self.kinds.items()]
        return [f"{self.path}: {sentence}" for sentence in counted + self.sentences]


def ranks_of(ids: np.ndarray) -> dict[int, int]:
    """The rank, from 1, of each id [N] among the sorted ones."""
    return {key: rank for rank, key in enumerate(np.sort(ids).tolist(), start=1)}


def _images(
    entries: list[dict], images: dict[int, int], categories: dict[int, int], notes: Notes
) -> tuple[bool, list[dict]]:
    """(whether LVIS's protocol applies, minimal images). A list that an image lacks is empty."""
    listed, minimal = sum(isinstance(image.get(NEGATIVE), list) for image in entries), []
    lvis = 2 * listed > len(entries)
    if listed > 0 and not lvis:
        notes.sentences.append(f"only {listed} of {len(entries)} images have {NEGATIVE}: COCO's protocol applies")
    for image in entries:
        sides = {side: image[side] if is_side(image.get(side)) else 0 for side in ("width", "height")}
        lists: dict[str, list[int]] = {}
        for name in (NEGATIVE, PARTIAL) if lvis else ():
            value = image.get(name)
            if isinstance(value, list) and all(type(key) is int for key in value):
                lists[name] = [categories[key] for key in value if key in categories]
            else:
                lists[name] = []
                if name == NEGATIVE or value is not None:
                    notes.add(f"images without a list of ids as {name}, taken as empty", f"image {image['id']}")
        minimal.append({"id": images[image["id"]], **sides, **lists})
    return lvis, minimal


def _annotation(where: str, annotation: dict, images: dict[int, int], categories: dict[int, int]) -> dict:
    """The minimal annotation, without id and area."""
    entry: dict[str, Any] = {}
    for name, ranks, kind in (("image_id", images, "images"), ("category_id", categories, "categories")):
        value = annotation.get(name)
        if type(value) is not int:
            raise UserError(f"{where}: {name}: expected a whole number, got {shown(value)}")
        if value not in ranks:
            raise UserError(f"{where}: {name} {shown(value)} is not among `{kind}`")
        entry[name] = ranks[value]
    box, crowd = annotation.get("bbox"), annotation.get("iscrowd", 0)
    if not is_box(box):
        raise UserError(f"{where}: bbox: expected [x, y, width, height], got {box!r:.80}")
    x, y, width, height = box
    if not (abs(x) < LIMIT and abs(y) < LIMIT and abs(width) < LIMIT and abs(height) < LIMIT):
        raise UserError(f"{where}: bbox: expected numbers below {LIMIT:g} pixels, got {box!r:.80}")
    if crowd not in (0, 1):
        raise UserError(f"{where}: iscrowd: expected 0 or 1, got {shown(crowd)}")
    entry["bbox"], entry["iscrowd"] = [float(x), float(y), float(width), float(height)], int(crowd)
    mask = usable_mask(annotation.get("segmentation"))
    if mask is not None:
        entry["segmentation"] = mask
    return entry


def usable_mask(value: object) -> Any:
    """A segmentation without polygons of fewer than three points, as in training; None where nothing is left."""
    if is_empty_rle(value):
        return None
    if not isinstance(value, list):
        return value or None
    short = [isinstance(ring, list) and len(ring) < 6 for ring in value]
    if any(short):
        value = [ring for ring, drop in zip(value, short, strict=True) if not drop]
    return value or None


def _area(where: str, entry: dict, area: object, size: tuple[int, int], notes: Notes) -> float:
    """The area of an object: the file's where it is possible, else that of its mask, else that of its box."""
    _, _, width, height = entry["bbox"]
    empty = not (width > 0 and height > 0)
    if empty:
        notes.add("empty boxes, which count as objects that no detection finds", where)
    if is_number(area) and (EMPTY_AREA if empty else 0) < area <= LARGEST_AREA:
        return float(area)
    if area is not None and not (empty and is_number(area) and area == 0):
        notes.add("impossible areas, replaced by the area of the mask or box", f"{where}: {shown(area)}")
    drawn = mask_area(entry.get("segmentation"), size)
    return min(drawn or (EMPTY_AREA if empty else width * height), LARGEST_AREA)


def _counts(category: dict, notes: Notes) -> dict:
    """The usable counts and frequency of a category in training, as the file gives them."""
    counts: dict[str, int | str] = {}
    for name in ("instance_count", "image_count"):
        value = category.get(name)
        if type(value) is int and 0 <= value < 2**62:
            counts[name] = value
        elif value is not None:
            notes.add(
                f"categories whose {name} is not a whole number, so that none is used",
                f"category {category['id']}: {shown(value)}",
            )
    letter = category.get("frequency")
    if isinstance(letter, str) and letter in ("r", "c", "f"):
        counts["frequency"] = letter
    elif letter is not None:
        notes.add(
            "categories whose frequency is not r, c or f, so that none is used",
            f"category {category['id']}: {shown(letter)}",
        )
    return counts


# --------------------------------------------------------------------------- masks


def mask_sizes(truth: Truth) -> dict[int, list[int]]:
    """[height, width] of each image (by rank) in pixels; 0 where the file gives none."""
    return {image["id"]: [image["height"], image["width"]] for image in truth.content["images"]}


def check_mask(where: str, value: object, size: list[int]) -> None:
    """Raise UserError for a segmentation that is not a mask of its image: decoders would not notice."""
    if not is_mask(value, size):
        raise UserError(
            f"{where}: segmentation: {UNDRAWABLE}, or an RLE of {size} (height, width) "
            "whose counts do not exceed its pixels"
        )


def is_mask(value: object, size: Sequence[int]) -> bool:
    """Whether this is polygons, or an RLE, of an image of size (height, width), known and above 0."""
    if not all(size):
        return False
    if isinstance(value, dict):
        counts: Any = value.get("counts")
        if value.get("size") != list(size) or not all(type(side) is int for side in value["size"]):
            return False
        if isinstance(counts, list):
            return all(type(count) is int and count >= 0 for count in counts) and sum(counts) <= math.prod(size)
        try:
            hotcoco.mask.rle_from_string(counts, size[0], size[1])
        except (TypeError, ValueError):
            return False
        return True
    if not isinstance(value, list) or not value:
        return False
    return all(
        isinstance(ring, list) and len(ring) % 2 == 0 and all(map(is_number, ring)) and is_drawable(ring)
        for ring in value
    )


def mask_area(value: Any, size: tuple[int, int]) -> float | None:
    """Pixels of a mask; None where it is not one of an image of size (height, width)."""
    if value is None or not is_mask(value, size):
        return None
    runs: Any = value
    if not isinstance(value, dict):
        runs = coco_mask.merge(coco_mask.frPyObjects(value, *size))
    elif isinstance(value["counts"], list):
        runs = coco_mask.frPyObjects(value, *size)  # type: ignore[call-overload]
    return float(coco_mask.area(runs))
