"""What is wrong with a dataset, before a GPU is booked.

`check_annotations` goes on where `AnnotationIndex.open` stops at the first defect, `check_images` looks
at the files, `check_splits` at train and val together. Each gives findings: a defect, how often it
occurs, examples by id, and what training will do about it.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bags.data.images import (
    MAX_PIXELS,
    ORIENTATION,
    MissingImage,
    TooManyPixels,
    UndefinedRange,
    check_pixels,
    image_path,
    leads_out,
    name_hint,
    open_image,
    read_image,
)
from bags.data.index import AnnotationIndex
from bags.data.packing import POLYGON_LIMIT, file_name_of, is_box, is_number, read_annotations, rle_fits
from bags.data.statistics import instance_bin
from bags.errors import UserError

EXAMPLES = 5
STOP, DROP, NOTE = "stops", "dropped", "note"
DEFECTS = {  # kind -> (level, what training does)
    "file": (STOP, "training refuses the file"),
    "bad id": (STOP, "training refuses the file: ids are whole numbers"),
    "duplicate id": (STOP, "training refuses the file"),
    "image size": (STOP, "training refuses the file: width and height are whole numbers above 0"),
    "file name": (STOP, "training refuses the file, or the image when it comes to it"),
    "dangling image_id": (STOP, "training refuses the file: there is no such image"),
    "dangling category_id": (STOP, "training refuses the file: there is no such category"),
    "bad box": (STOP, "training refuses the file: bbox is [x, y, width, height], finite"),
    "bad field": (STOP, "training refuses the file"),
    "bad segmentation": (STOP, "training refuses the file"),
    "empty box": (DROP, "the object is left out: no width or no height"),
    "box outside image": (DROP, "the object is left out"),
    "box across border": (NOTE, "the box is clipped to the image"),
    "polygon off the image": (NOTE, "none: what lies outside is not drawn"),
    "short polygon": (DROP, "the polygon, of fewer than three points, is left out"),
    "duplicated annotation": (NOTE, "the same object is learnt, and counted, more than once"),
    "duplicated file name": (NOTE, "the image is seen more than once"),
    "ids with gaps": (NOTE, "none: labels are 1..C by ascending id"),
    "image without objects": (NOTE, "not trained on, unless data.empty_images is true"),
    "category without instances": (NOTE, "its classifier learns to say no"),
    "empty group": (NOTE, "the group's softmax has nothing but `others`"),
    "counts disagree": (NOTE, "the annotations are counted; the file's own numbers are not used"),
    "missing image": (STOP, "training stops when it comes to it"),
    "unreadable image": (STOP, "training stops when it comes to it"),
    "too many pixels": (STOP, "training stops when it comes to it; data.max_pixels is the limit"),
    "pixels without a range": (STOP, "training stops when it comes to it: convert them to 8 or 16 bits, unsigned"),
    "size differs": (STOP, "training stops when it comes to it"),
    "EXIF rotation": (NOTE, "ignored, as COCO does; data.exif=true turns the image"),
    "train and val share images": (NOTE, "validation is too good"),
    "category lists differ": (STOP, "training refuses the pair"),
}


@dataclass
class Finding:
    """One kind of defect. level: "stops" training, makes it "dropped" the object, or is a "note"."""

    where: str
    kind: str
    level: str
    effect: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


class Findings:
    """Collects defects of one file."""

    def __init__(self, where: Path | str):
        self.where = str(where)
        self.by_kind: dict[str, Finding] = {}

    def add(self, kind: str, example: object) -> None:
        """Counts a defect; the first examples are kept."""
        level, effect = DEFECTS[kind]
        finding = self.by_kind.setdefault(kind, Finding(self.where, kind, level, effect))
        finding.count += 1
        if finding.count <= EXAMPLES:
            finding.examples.append(f"{example!s:.120}")

    def list(self) -> list[Finding]:
        """Worst first."""
        return sorted(self.by_kind.values(), key=lambda f: ([STOP, DROP, NOTE].index(f.level), -f.count))


def check_annotations(path: Path, boundaries: tuple[int, ...] | None = None, training: bool = True) -> list[Finding]:
    """Everything that can be seen in the JSON.

    boundaries: group borders. training: also what matters only where one trains on it: counts, groups,
    images without objects.
    """
    found = Findings(path)
    try:
        content = read_annotations(path)
    except UserError as error:
        found.add("file", error)
        return found.list()
    categories = _ids(content["categories"], "category", found)
    images = _ids(content["images"], "image", found)
    _ids(content["annotations"], "annotation", found)
    if categories and sorted(categories) != list(range(1, len(categories) + 1)):
        found.add("ids with gaps", f"{len(categories)} category ids from {min(categories)} to {max(categories)}")
    _check_images(path, images, found)
    seen: Counter[tuple] = Counter()
    instances: Counter[object] = Counter()
    in_images: set[tuple] = set()
    for annotation in content["annotations"]:
        _check_annotation(annotation, images, categories, found)
        if annotation.get("iscrowd", 0) in (0, 1) and not annotation.get("iscrowd", 0):
            instances[_hashable(annotation.get("category_id"))] += 1
            in_images.add((_hashable(annotation.get("image_id")), _hashable(annotation.get("category_id"))))
        key = tuple(_hashable(annotation.get(k)) for k in ("image_id", "category_id", "bbox"))
        seen[key] += 1
        if seen[key] == 2:
            found.add("duplicated annotation", f"annotation {annotation.get('id')}, image {annotation.get('image_id')}")
    with_objects = {image for image, _ in in_images}
    for image in images if training else ():
        if image not in with_objects:
            found.add("image without objects", f"image {image}")
    if training:
        _check_counts(categories, instances, Counter(category for _, category in in_images), boundaries, found)
    return found.list()


def _hashable(value: object) -> object:
    return repr(value) if isinstance(value, (list, dict)) else value


def _ids(entries: list[dict], kind: str, found: Findings) -> dict[int, dict]:
    """Entries by id, the usable ones."""
    known: dict[int, dict] = {}
    for entry in entries:
        value = entry.get("id")
        if type(value) is not int or abs(value) >= 2**63:
            found.add("bad id", f"{kind} id {value!r}")
        elif value in known:
            found.add("duplicate id", f"{kind} {value}")
        else:
            known[value] = entry
    return known


def _check_images(path: Path, images: dict[int, dict], found: Findings) -> None:
    names: Counter[str] = Counter()
    for key, image in images.items():
        size = image.get("width"), image.get("height")
        if not all(type(side) is int and 0 < side < 2**20 for side in size):
            found.add("image size", f"image {key}: {size[0]!r} x {size[1]!r}")
        try:
            name = file_name_of(path, image)
        except UserError as error:
            found.add("file name", error)
            continue
        if leads_out(name):
            found.add("file name", f"image {key}: {name} leads out of the image folder")
        names[name] += 1
        if names[name] == 2:
            found.add("duplicated file name", f"image {key}: {name}")


def _check_annotation(annotation: dict, images: dict, categories: dict, found: Findings) -> None:
    where = f"annotation {annotation.get('id')!s:.30}"
    image = annotation.get("image_id")
    image = images.get(image) if type(image) is int else None
    if image is None:
        found.add("dangling image_id", f"{where}: image {annotation.get('image_id')!r}")
    category = annotation.get("category_id")
    if type(category) is not int or category not in categories:
        found.add("dangling category_id", f"{where}: category {category!r}")
    if annotation.get("iscrowd", 0) not in (0, 1):
        found.add("bad field", f"{where}: iscrowd {annotation['iscrowd']!r}")
    area = annotation.get("area")
    if area is not None and not (is_number(area) and abs(area) < 1e18):
        found.add("bad field", f"{where}: area {area!r}")
    width, height = (image.get("width"), image.get("height")) if image else (None, None)
    size = (width, height) if type(width) is int and type(height) is int else None
    _check_box(annotation.get("bbox"), size, where, found)
    _check_segmentation(annotation.get("segmentation"), size, where, found)


def _check_box(box: object, size: tuple[int, int] | None, where: str, found: Findings) -> None:
    if not is_box(box) or not all(abs(value) < 1e9 for value in box):
        found.add("bad box", f"{where}: {box!r}")
        return
    x, y, width, height = box
    if width <= 0 or height <= 0:
        found.add("empty box", f"{where}: {box}")
    elif size:
        inside = [min(x + width, size[0]) - max(x, 0), min(y + height, size[1]) - max(y, 0)]
        if min(inside) < 1e-3:
            found.add("box outside image", f"{where}: {box} in {size[0]} x {size[1]}")
        elif x < -1 or y < -1 or x + width > size[0] + 1 or y + height > size[1] + 1:
            found.add("box across border", f"{where}: {box} in {size[0]} x {size[1]}")


def _check_segmentation(value: object, size: tuple[int, int] | None, where: str, found: Findings) -> None:
    if isinstance(value, list):
        for ring in value:
            valid = isinstance(ring, list) and len(ring) % 2 == 0 and all(map(is_number, ring))
            if not valid or (len(ring) >= 6 and not all(abs(v) < POLYGON_LIMIT for v in ring)):
                found.add("bad segmentation", f"{where}: polygon {ring!r}")
            elif len(ring) < 6:
                found.add("short polygon", f"{where}: {ring}")
            elif size and not (_meets(ring[::2], size[0]) and _meets(ring[1::2], size[1])):
                found.add("polygon off the image", f"{where}: {ring}")
    elif isinstance(value, dict):
        counts = value.get("counts")
        own = value.get("size")
        if not (isinstance(own, list) and all(type(side) is int for side in own)) or (size and own != [*size[::-1]]):
            image = f" in {size[0]} x {size[1]}" if size else ""
            found.add("bad segmentation", f"{where}: RLE of size {value.get('size')!r}{image}")
        elif isinstance(counts, list):
            if not all(type(c) is int and c >= 0 for c in counts) or (size and sum(counts) != math.prod(size)):
                found.add("bad segmentation", f"{where}: RLE counts do not add up to the image's pixels")
        elif not (isinstance(counts, str) and counts.isascii()):
            found.add("bad segmentation", f"{where}: RLE counts {counts!r:.60}")
        elif size and not rle_fits(counts.encode(), math.prod(size)):
            found.add("bad segmentation", f"{where}: RLE counts do not add up to the image's pixels")
    elif value is not None:
        found.add("bad segmentation", f"{where}: {value!r}")


def _meets(values: list[float], side: int) -> bool:
    return max(values) > 0 and min(values) < side


def _check_counts(categories, instances, in_images, boundaries, found: Findings) -> None:
    for key, category in categories.items():
        if not instances[key]:
            found.add("category without instances", f"category {key} '{category.get('name')}'")
        for name, counted in (("instance_count", instances[key]), ("image_count", in_images[key])):
            if name in category and category[name] != counted:
                found.add("counts disagree", f"category {key}: {name} {category[name]}, counted {counted}")
    if boundaries and categories:
        sizes = np.bincount(instance_bin([instances[c] for c in categories], boundaries), minlength=len(boundaries) + 1)
        for (low, high), size in zip(itertools.pairwise((0, *boundaries, math.inf)), sizes, strict=True):
            if not size:
                found.add("empty group", f"no category has {low} to {high} training instances")


def check_images(
    index: AnnotationIndex, folder: Path, decode: bool = False, exif: bool = False, max_pixels: int = MAX_PIXELS
) -> list[Finding]:
    """Every image file: its presence, format, size, range of pixels and EXIF orientation.

    decode: also all of its pixels. exif: as training does, turn it first. max_pixels: the limit of `data.max_pixels`.
    """
    found = Findings(folder)
    for position in tqdm(range(len(index)), desc=f"images of {index.path.name}", unit="image"):
        name, key = index.file_name(position), index.image_ids[position]
        try:
            path = image_path(folder, name)
            with open_image(path, max_pixels) as image:
                check_pixels(path, image, max_pixels)
                size, orientation = image.size, image.getexif().get(ORIENTATION, 1)  # decodes a PNG
            if decode:
                read_image(path, exif, max_pixels)
        except MissingImage:
            found.add("missing image", f"image {key}: {name}{name_hint(folder, name)}")
        except UserError as error:
            kinds: dict[type, str] = {TooManyPixels: "too many pixels", UndefinedRange: "pixels without a range"}
            leaves = "file name" if "leads out" in str(error) else "unreadable image"
            found.add(kinds.get(type(error), leaves), f"image {key}: {error}")
        else:
            height, width = index.image_sizes[position].tolist()
            if exif and orientation in (5, 6, 7, 8):
                size = size[::-1]
            if size != (width, height):
                found.add("size differs", f"image {key}: {name} has {size[0]} x {size[1]}, the JSON {width} x {height}")
            if orientation != 1 and not exif:
                found.add("EXIF rotation", f"image {key}: {name}, orientation {orientation}")
    return found.list()


def check_splits(train: AnnotationIndex, val: AnnotationIndex) -> list[Finding]:
    """What train and val have in common, and should or should not."""
    found = Findings(f"{train.path} and {val.path}")
    ours, theirs = (list(zip(i.category_ids.tolist(), i.category_names, strict=True)) for i in (train, val))
    for a, b in itertools.zip_longest(ours, theirs):
        if a != b:
            found.add("category lists differ", f"{a} in train, {b} in val")
    shared = _names(train) & _names(val)
    for name in sorted(shared):
        found.add("train and val share images", name)
    return found.list()


def _names(index: AnnotationIndex) -> set[str]:
    return {index.file_name(position) for position in range(len(index))}


def render(findings: Iterable[Finding]) -> str:
    """A text for people."""
    lines = []
    for f in findings:
        lines.append(f"[{f.level}] {f.where}: {f.kind}: {f.count}. {f.effect[0].upper()}{f.effect[1:]}.")
        lines += [f"    {example}" for example in f.examples]
        if f.count > len(f.examples):
            lines.append(f"    ... and {f.count - len(f.examples)} more")
    return "\n".join(lines)


def as_dicts(findings: Iterable[Finding]) -> list[dict]:
    """For machines."""
    return [asdict(finding) for finding in findings]
