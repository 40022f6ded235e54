"""Defects of a dataset, found before a GPU is booked.

`check_annotations` goes on where `AnnotationIndex.open` stops at the first defect, `check_images` looks
at the files, `check_splits` at train and val together. Each gives findings: a defect, how often it
occurs, examples by id, and what training will do about it.
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bags.core.errors import UserError
from bags.core.progress import Progress
from bags.data.findings import ONE_FILE, STOP, Finding, Findings
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
from bags.data.index import AnnotationIndex, inside_image
from bags.data.json_files import is_box, is_empty_rle, is_number, is_side, read_annotations, shown
from bags.data.packing import UNDRAWABLE, category_name, file_name_of, is_drawable, rle_fits
from bags.data.plausibility import implausible_boxes, shared_images, split_images
from bags.data.statistics import instance_bin


def why_nothing_trains(index: AnnotationIndex) -> str | None:
    """Why no object of an index trains, or None if one does (see `AnnotationIndex.trained`)."""
    number = len(index.labels)
    if not number:
        return "`annotations` is empty: there is nothing to train on"
    if index.trained.any():
        return None
    reasons = _left_out(index)
    return f"none of {number} objects trains: {', '.join(f'{count} {why}' for why, count in reasons.items())}"


def what_does_not_train(index: AnnotationIndex) -> str | None:
    """One sentence about the objects that do not train; None where all of them do."""
    reasons = _left_out(index)
    if not reasons:
        return None
    listed = ", ".join(f"{count} {why}" for why, count in reasons.items())
    return f"{index.path}: {sum(reasons.values())} of {len(index.labels)} objects are not trained on: {listed}"


def _left_out(index: AnnotationIndex) -> dict[str, int]:
    """Reason -> number of objects that do not train for it; each object has one reason."""
    outside = ~inside_image(index.boxes, index.image_sizes[index.owners])[1] & ~index.crowd
    bare = ~index.crowd & ~outside & ~index.has_segmentation if index.for_masks else np.zeros(len(outside), bool)
    counts = {
        "are crowd regions (iscrowd 1)": index.crowd,
        "have boxes without area in the image": outside,
        "have no segmentation, which masks need": bare,
    }
    return {why: int(which.sum()) for why, which in counts.items() if which.any()}


def check_annotations(
    path: Path, boundaries: tuple[int, ...] | None = None, training: bool = True, masks: bool = False
) -> list[Finding]:
    """Everything that can be seen in the JSON.

    boundaries: group borders. training: also what matters only where one trains on it: counts, groups,
    images without objects. masks: whether masks are learnt.
    """
    findings = Findings(path)
    try:
        repeated: list[str] = []
        content = read_annotations(path, repeated)
    except UserError as error:
        findings.add("file", error)
        return findings.list()
    for place in repeated:
        findings.add("key given twice", place)
    categories = _ids(content["categories"], "category", findings)
    images = _ids(content["images"], "image", findings)
    _ids(content["annotations"], "annotation", findings)
    if categories and sorted(categories) != list(range(1, len(categories) + 1)):
        findings.add("ids with gaps", f"{len(categories)} category ids from {min(categories)} to {max(categories)}")
    for name, number in Counter(category_name(category) for category in categories.values()).items():
        if number > 1:
            findings.add("categories of one name", f"{number} categories are named '{name}'")
    _check_images(path, images, findings)
    copies: Counter[tuple] = Counter()
    instances: Counter[object] = Counter()
    in_images: set[tuple] = set()
    for annotation in content["annotations"]:
        trains = _check_annotation(annotation, images, categories, masks, findings)
        if trains:
            instances[_hashable(annotation.get("category_id"))] += 1
            in_images.add((_hashable(annotation.get("image_id")), _hashable(annotation.get("category_id"))))
        key = tuple(_hashable(annotation.get(k)) for k in ("image_id", "category_id", "bbox"))
        copies[key] += 1
        if copies[key] == 2:
            findings.add(
                "duplicated annotation", f"annotation {annotation.get('id')}, image {annotation.get('image_id')}"
            )
    with_objects = {image for image, _ in in_images}
    for image in images if training else ():
        if image not in with_objects:
            findings.add("image without objects", f"image {image}")
    if training:
        _check_counts(categories, instances, Counter(category for _, category in in_images), boundaries, findings)
    stops = any(finding.level == STOP for finding in findings.list())
    if not stops:
        _check_plausibility(_index(path, masks), training, findings)
    if not stops and not training and (reason := why_nothing_scores(content["annotations"])):
        findings.add("nothing to evaluate on", reason)
    return findings.list()


def _check_plausibility(index: AnnotationIndex, training: bool, findings: Findings) -> None:
    """Add findings that only the index as a whole shows."""
    if training and (reason := why_nothing_trains(index)):
        findings.add("nothing to train on", reason)
    for kind, seen in implausible_boxes(index).items():
        findings.add(kind, seen)
    for name in split_images(index) if training else ():
        findings.add("annotations split over entries", name)


def _index(path: Path, masks: bool) -> AnnotationIndex:
    return replace(AnnotationIndex.open(path), for_masks=masks)


def why_nothing_scores(annotations: list[dict]) -> str | None:
    """Why there would be no AP, or None."""
    if not annotations:
        return "`annotations` is empty: there is nothing to evaluate on"
    if all(annotation.get("iscrowd", 0) for annotation in annotations):
        return f"all {len(annotations)} objects are crowd regions (iscrowd 1), which are not scored: no AP exists"
    return None


def _hashable(value: object) -> object:
    return repr(value) if isinstance(value, (list, dict)) else value


def _ids(entries: list[dict], kind: str, findings: Findings) -> dict[int, dict]:
    """Entries by id, the usable ones."""
    known: dict[int, dict] = {}
    for entry in entries:
        value = entry.get("id")
        if type(value) is not int or abs(value) >= 2**63:
            findings.add("bad id", f"{kind} id {value!r}")
        elif value in known:
            findings.add("duplicate id", f"{kind} {value}")
        else:
            known[value] = entry
    return known


def _check_images(path: Path, images: dict[int, dict], findings: Findings) -> None:
    names: Counter[str] = Counter()
    for key, image in images.items():
        size = image.get("width"), image.get("height")
        if not all(map(is_side, size)):
            findings.add("image size", f"image {key}: {size[0]!r} x {size[1]!r}")
        try:
            name = file_name_of(path, image)
        except UserError as error:
            findings.add("file name", error)
            continue
        if leads_out(name):
            findings.add("file name", f"image {key}: {name} leads out of the image folder")
        names[name] += 1
        if names[name] == 2:
            findings.add("duplicated file name", f"image {key}: {name}")


def _check_annotation(annotation: dict, images: dict, categories: dict, masks: bool, findings: Findings) -> bool:
    """Add an annotation's defects; return whether the object trains."""
    where = f"annotation {annotation.get('id')!s:.30}"
    image = annotation.get("image_id")
    image = images.get(image) if type(image) is int else None
    for name, known in (("image_id", images), ("category_id", categories)):
        value = annotation.get(name)
        if type(value) is not int:
            findings.add("bad field", f"{where}: {name}: expected a whole number, got {shown(value)}")
        elif value not in known:
            findings.add(f"dangling {name}", f"{where}: {name} {value}")
    crowd, area = annotation.get("iscrowd", 0), annotation.get("area")
    if crowd not in (0, 1):
        findings.add("bad field", f"{where}: iscrowd: expected 0 or 1, got {shown(crowd)}")
    if area is not None and not (is_number(area) and 0 < area < 1e10):
        findings.add("impossible area", f"{where}: area {shown(area)}")
    width, height = (image.get("width"), image.get("height")) if image else (None, None)
    size = (width, height) if is_side(width) and is_side(height) else None
    inside = _check_box(annotation.get("bbox"), size, where, findings)
    segmentation = annotation.get("segmentation")
    _check_segmentation(segmentation, size, where, findings)
    if crowd == 1:
        findings.add("crowd region", where)
    bare = masks and crowd == 0 and not _draws(segmentation)
    if bare:
        findings.add("no segmentation", where)
    return crowd == 0 and inside and not bare


def _draws(segmentation: object) -> bool:
    """Whether a segmentation is a mask: an RLE, or polygons, one of which has three points or more."""
    if isinstance(segmentation, list):
        return any(isinstance(ring, list) and len(ring) >= 6 for ring in segmentation)
    return isinstance(segmentation, dict) and not is_empty_rle(segmentation)


def _check_box(box: object, size: tuple[int, int] | None, where: str, findings: Findings) -> bool:
    """Add a box's defects; return whether something of it lies in the image."""
    if not is_box(box) or not all(abs(value) < 1e9 for value in box):
        findings.add("bad box", f"{where}: {box!r}")
        return False
    x, y, width, height = box
    if width <= 0 or height <= 0:
        findings.add("empty box", f"{where}: {box}")
        return False
    if size:
        corners = np.array([[x, y, x + width, y + height]]).astype(np.float32)
        if not inside_image(corners, np.array(size[::-1]))[1][0]:
            findings.add("box outside image", f"{where}: {box} in {size[0]} x {size[1]}")
            return False
        if x < -1 or y < -1 or x + width > size[0] + 1 or y + height > size[1] + 1:
            findings.add("box across border", f"{where}: {box} in {size[0]} x {size[1]}")
    return True


def _check_segmentation(value: object, size: tuple[int, int] | None, where: str, findings: Findings) -> None:
    if isinstance(value, list):
        for ring in value:
            valid = isinstance(ring, list) and len(ring) % 2 == 0 and all(map(is_number, ring))
            if not valid or (len(ring) >= 6 and not is_drawable(ring)):
                words = UNDRAWABLE if valid else "expected polygons [x, y, ...]"
                findings.add("bad segmentation", f"{where}: segmentation: {words}, got {ring!r:.80}")
            elif len(ring) < 6:
                findings.add("short polygon", f"{where}: {ring}")
            elif size and not (_meets(ring[::2], size[0]) and _meets(ring[1::2], size[1])):
                findings.add("polygon off the image", f"{where}: {ring}")
    elif isinstance(value, dict) and not is_empty_rle(value):
        counts = value.get("counts")
        sides = value.get("size")
        whole = isinstance(sides, list) and all(type(side) is int for side in sides)
        if not whole or (size and sides != [*size[::-1]]):
            image = f" in {size[0]} x {size[1]}" if size else ""
            findings.add("bad segmentation", f"{where}: RLE of size {sides!r}{image}")
        elif isinstance(counts, list):
            if not all(type(c) is int and c >= 0 for c in counts) or (size and sum(counts) != math.prod(size)):
                findings.add("bad segmentation", f"{where}: RLE counts do not add up to the image's pixels")
        elif not (isinstance(counts, str) and counts.isascii()):
            findings.add("bad segmentation", f"{where}: RLE counts {counts!r:.60}")
        elif size and not rle_fits(counts.encode(), math.prod(size)):
            findings.add("bad segmentation", f"{where}: RLE counts do not add up to the image's pixels")
    elif value is not None and not is_empty_rle(value):
        findings.add("bad segmentation", f"{where}: {value!r}")


def _meets(values: list[float], side: int) -> bool:
    return max(values) > 0 and min(values) < side


def _check_counts(
    categories: Mapping[int, dict],
    instances: Mapping[object, int],
    in_images: Mapping[object, int],
    boundaries: Sequence[int] | None,
    findings: Findings,
) -> None:
    for key, category in categories.items():
        if not instances[key]:
            findings.add("category without instances", f"category {key} '{category.get('name')}'")
        for name, counted in (("instance_count", instances[key]), ("image_count", in_images[key])):
            if name in category and category[name] != counted:
                findings.add("counts disagree", f"category {key}: {name} {category[name]}, counted {counted}")
    if boundaries and categories:
        sizes = np.bincount(instance_bin([instances[c] for c in categories], boundaries), minlength=len(boundaries) + 1)
        for (low, high), size in zip(itertools.pairwise((0, *boundaries, math.inf)), sizes, strict=True):
            if not size:
                findings.add("empty group", f"no category has {low} to {high} training instances")


def missing_folder(folder: Path) -> list[Finding]:
    """The finding that an image folder is not there."""
    findings = Findings(folder)
    findings.add("no such image folder", "set data.root, data.*_images or --images")
    return findings.list()


def missing_validation(path: Path) -> list[Finding]:
    """The finding that a validation file is not there."""
    findings = Findings(path)
    findings.add("file", f"no such file. {ONE_FILE}")
    return findings.list()


def check_images(
    index: AnnotationIndex, folder: Path, decode: bool = False, exif: bool = False, max_pixels: int = MAX_PIXELS
) -> list[Finding]:
    """Every image file: its presence, format, size, range of pixels and EXIF orientation.

    decode: also all of its pixels. exif: as training does, turn it first. max_pixels: the limit of `data.max_pixels`.
    """
    findings = Findings(folder)
    for position in Progress(range(len(index)), desc=f"images of {index.path.name}", unit="image"):
        name, key = index.file_name(position), index.image_ids[position]
        try:
            path = image_path(folder, name)
            with open_image(path, max_pixels) as image:
                check_pixels(path, image, max_pixels)
                size, orientation = image.size, image.getexif().get(ORIENTATION, 1)  # decodes a PNG
            if decode:
                read_image(path, exif, max_pixels)
        except MissingImage:
            findings.add("missing image", f"image {key}: {name}{name_hint(folder, name)}")
        except UserError as error:
            kinds: dict[type, str] = {TooManyPixels: "too many pixels", UndefinedRange: "pixels without a range"}
            leaves = "file name" if "leads out" in str(error) else "unreadable image"
            findings.add(kinds.get(type(error), leaves), f"image {key}: {error}")
        else:
            height, width = index.image_sizes[position].tolist()
            if exif and orientation in (5, 6, 7, 8):
                size = size[::-1]
            if size != (width, height):
                findings.add(
                    "size differs", f"image {key}: {name} has {size[0]} x {size[1]}, the JSON {width} x {height}"
                )
            if orientation != 1 and not exif:
                findings.add("EXIF rotation", f"image {key}: {name}, orientation {orientation}")
    return findings.list()


def check_splits(train: AnnotationIndex, val: AnnotationIndex, train_folder: Path, val_folder: Path) -> list[Finding]:
    """Compare train and val: categories must be equal, images (by their content) must differ."""
    findings = Findings(f"{train.path} and {val.path}")
    ours, theirs = (list(zip(i.category_ids.tolist(), i.category_names, strict=True)) for i in (train, val))
    for a, b in itertools.zip_longest(ours, theirs):
        if a != b:
            findings.add("category lists differ", f"{a} in train, {b} in val")
    for ours_name, theirs_name in shared_images(train, train_folder, val, val_folder):
        same = ours_name == theirs_name
        findings.add("train and val share images", ours_name if same else f"{ours_name} is {theirs_name} in val")
    return findings.list()
