"""Clothing Co-Parsing: street photographs with a label for each pixel, as objects with masks.

Things worn in pairs or in any number are one object for each connected part, all others one object a photograph.
Masks are run lengths at the size of the prepared image.

Command:  python scripts/prepare_data.py ccp --source clothing-co-parsing --output data/ccp
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from bags.core.errors import UserError
from bags.data.images import read_image
from bags.data.matlab import read_matrix
from bags.data.prepared import Made, Origin, Split, image_folders, prepare, trained_categories

ORIGIN = Origin(
    "ccp", "bearpaw/clothing-co-parsing", "fe34fb77721a9973fbae92c05f7f12b664d10110", "annotations/pixel-level"
)
PHOTOGRAPHS = 1004
LONGEST_SIDE = 640
QUALITIES = (85, 72)  # the reference images were compressed twice
REACH = 2  # pixels; gaps of up to 2 * REACH within a part are closed
LEAST_PART = 30  # pixels of a part that is not the largest one of its label
SHARE_OF_SINGLE, SHARE_OF_MANY = 0.02, 0.15  # of the largest part; smaller parts are dropped
NO_OBJECTS = ("null", "skin")
IN_PARTS = (
    *("accessories", "bag", "boots", "bracelet", "earrings", "flats", "gloves", "heels", "loafers", "pumps", "purse"),
    *("sandals", "shoes", "sneakers", "socks", "stockings", "wallet", "wedges"),
)
# Numbers of the validation photographs. Photographs that resemble each other are in one split.
VAL = """
7 12 22 26 27 30 35 36 45 46 49 53 55 56 58 61 62 69 70 79 82 88 89 91 93 95 99 109 110 114 115 117 124 125
126 129 138 140 141 145 148 153 161 169 176 182 202 206 212 215 218 220 231 232 233 237 238 243 244 251 261
262 264 270 271 273 274 276 281 284 291 296 300 302 303 304 305 321 322 330 331 332 338 340 350 353 354 355
357 360 364 365 369 371 373 379 386 390 391 392 393 394 399 400 403 416 418 423 435 438 439 440 443 444 451
466 468 471 472 473 474 478 480 485 487 500 503 504 508 509 512 513 514 515 518 520 522 531 539 540 544 550
553 555 560 563 564 567 568 576 577 578 585 589 592 596 599 600 606 607 620 624 635 638 639 644 645 658 660
661 668 671 688 691 699 704 705 706 707 709 710 714 719 720 727 728 731 733 735 741 742 746 750 752 756 757
760 765 766 767 776 778 781 784 785 786 787 789 790 796 801 803 809 812 829 837 839 842 844 850 852 858 867
873 877 878 880 882 885 888 911 913 919 925 930 931 934 947 948 954 956 958 960 969 971 975 978 980 982 983
985 989 992 997 1000
"""


def prepare_ccp(source: Path, output: Path) -> Path:
    """Make the images and instances_{train,val}.json of Clothing Co-Parsing; see `prepare`."""
    return prepare(ORIGIN, source, output, _make, PHOTOGRAPHS)


def _make(source: Path, folder: Path) -> Made:
    """Convert all photographs with labels, in the order of their numbers. Ids begin at 1 in each split."""
    files = sorted((source / ORIGIN.mark).glob("*.mat"))
    if not files:
        raise UserError(f"{source / ORIGIN.mark}: expected the MAT-files of {ORIGIN.repository}")
    names = read_matrix(source / "label_list.mat", "label_list")
    if not isinstance(names, list):
        words = "label_list: expected a cell with the name of each label"
        raise UserError(f"{source / 'label_list.mat'}: {words}; fetch the checkout again")
    validation = set(map(int, VAL.split()))
    splits = {name: Split(str(source / ORIGIN.mark)) for name in ("train", "val")}
    image_folders(folder, tuple(splits))
    for path in tqdm(files, desc="ccp", unit="photograph"):
        if not re.fullmatch("[0-9]+", path.stem):
            raise UserError(f"{path}: expected a name such as 0001.mat; fetch the checkout again")
        labels = _labels(path, len(names))
        name = "val" if int(path.stem) in validation else "train"
        split, file_name = splits[name], f"{path.stem}.jpg"
        size = _photograph(source / "photos" / file_name, labels.shape, folder / name / file_name)
        image = {"id": len(split.images) + 1, "file_name": file_name, "width": size[0], "height": size[1]}
        split.images.append(image)
        for category, mask in objects_of(labels, names):
            entry = {"id": len(split.annotations) + 1, "image_id": image["id"], "category": category}
            split.annotations.append(entry | describe(mask, size))
    return Made(splits, trained_categories(splits["train"]), "ccp {split}", len(files))


def _labels(path: Path, number: int) -> np.ndarray:
    """The label of each pixel of a photograph. Raises UserError for anything but a matrix of 0 to below `number`."""
    labels = read_matrix(path, "groundtruth")
    matrix = isinstance(labels, np.ndarray) and labels.ndim == 2 and labels.size > 0
    if matrix and np.min(labels) >= 0 and np.max(labels) < number:
        return np.asarray(labels)
    words = f"expected a matrix of labels from 0 to {number - 1}, as label_list.mat has {number}"
    raise UserError(f"{path}: groundtruth: {words}; fetch the checkout again")


def _photograph(path: Path, shape: tuple[int, ...], output: Path) -> tuple[int, int]:
    """Write a photograph with LONGEST_SIDE pixels as its longer side. Returns its width and height."""
    image = read_image(path)
    if image.size != shape[::-1]:
        words = f"is {image.width} x {image.height}, its labels are {shape[1]} x {shape[0]}"
        raise UserError(f"{path}: {words}; fetch the checkout again")
    scale = LONGEST_SIDE / max(image.size)
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    image, first = image.resize(size, Image.Resampling.LANCZOS), io.BytesIO()
    image.save(first, "JPEG", quality=QUALITIES[0])
    with Image.open(first) as compressed:
        compressed.save(output, "JPEG", quality=QUALITIES[1], optimize=True)
    return size


def objects_of(labels: np.ndarray, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Category and mask, bool [H, W], of each object of a photograph, by label and by position of its first pixel.

    labels: integers [H, W], indices into `names`.
    """
    for label in np.unique(labels).tolist():
        category = names[label]
        if category in NO_OBJECTS:
            continue
        parts = connected_parts(labels == label)
        sizes = [int(part.sum()) for part in parts]
        share = SHARE_OF_MANY if category in IN_PARTS else SHARE_OF_SINGLE
        least = min(max(LEAST_PART, share * max(sizes)), max(sizes))
        kept = [part for part, size in zip(parts, sizes, strict=True) if size >= least]
        if category in IN_PARTS:
            yield from ((category, part) for part in kept)
        else:
            yield category, np.logical_or.reduce(kept)


def connected_parts(mask: np.ndarray) -> list[np.ndarray]:
    """The parts of a mask, bool [H, W], by position of their first pixel after gaps are closed; diagonals connect."""
    window = tuple(
        slice(max(int(where[0]) - 2 * REACH, 0), int(where[-1]) + 2 * REACH + 1)
        for where in (np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0)))
    )
    owner = np.zeros(mask.shape, np.int32)
    owner[window] = _numbered(~_grown(~_grown(mask[window])))
    owner *= mask
    return [owner == part for part in np.unique(owner).tolist() if part]


def _numbered(mask: np.ndarray) -> np.ndarray:
    """The part of each pixel of a mask, bool [H, W], as int32: numbers that rise with the parts' first pixels; else 0.

    A run is a stretch of neighbours in a row. Runs of two rows belong together where they touch, also by a corner.
    """
    height, width = mask.shape
    stride = width + 2  # a blank column on each side, so that runs of two rows never touch
    flat = np.pad(mask, ((0, 0), (1, 1))).ravel().astype(np.int8)
    changes = np.diff(flat, prepend=np.int8(0), append=np.int8(0))
    starts, ends = np.flatnonzero(changes == 1), np.flatnonzero(changes == -1)  # ends are exclusive
    first = np.searchsorted(ends, starts - stride, "left")  # runs of the row above, from the one that ends behind
    last = np.searchsorted(starts, ends - stride, "right")  # the start of the run below
    roots = list(range(len(starts)))
    for run, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        for above in range(low, high):
            a, b = sorted((_root(roots, run), _root(roots, above)))
            roots[b] = a
    owner = np.zeros(height * stride, np.int32)  # 1 + root of the run of each pixel
    for run, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        owner[start:end] = 1 + _root(roots, run)
    return owner.reshape(height, stride)[:, 1:-1]


def _root(roots: list[int], run: int) -> int:
    """The first run of the part that a run is known to belong to."""
    while roots[run] != run:
        roots[run] = roots[roots[run]]
        run = roots[run]
    return run


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask with every pixel within REACH rows and columns of one of its pixels."""
    for axis in (0, 1):
        padded = np.pad(mask, [(REACH, REACH) if axis == k else (0, 0) for k in (0, 1)])
        length = mask.shape[axis]
        shifted = [padded.take(range(k, k + length), axis) for k in range(2 * REACH + 1)]
        mask = np.logical_or.reduce(shifted)
    return mask


def describe(mask: np.ndarray, size: tuple[int, int]) -> dict:
    """Box, area and run lengths of a mask, bool [H, W], in an image of another size (width, height).

    Box and area are those of the mask, scaled. The run lengths take the nearest pixel of the mask.
    """
    across, down = size[0] / mask.shape[1], size[1] / mask.shape[0]
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    left, top = int(columns[0]), int(rows[0])
    width, height = int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top
    scaled = Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    runs = coco_mask.encode(np.asfortranarray(np.asarray(scaled)))
    counts = runs["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {
        "bbox": [round(value, 2) for value in (left * across, top * down, width * across, height * down)],
        "area": round(int(mask.sum()) * across * down, 2),
        "iscrowd": 0,
        "segmentation": {"size": list(runs["size"]), "counts": text},
    }
