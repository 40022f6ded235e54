"""Data that can be trained on and is still not what its author meant: boxes in other units, leaks, split images."""

import hashlib
from collections import defaultdict
from pathlib import Path

import numpy as np

from bags.core.errors import UserError
from bags.data.images import image_path
from bags.data.index import AnnotationIndex
from bags.data.packing import implausible


def implausible_boxes(index: AnnotationIndex) -> dict[str, str]:
    """What `implausible` finds in the boxes of an annotation file, without crowd regions."""
    boxes = index.boxes[~index.crowd].astype(np.float64)
    sizes = index.image_sizes[index.owners[~index.crowd]][:, ::-1].astype(np.float64)
    return implausible(boxes, sizes)


def split_images(index: AnnotationIndex) -> list[str]:
    """File names of several images that each have objects: for one entry, the others' objects are background."""
    with_objects: defaultdict[str, int] = defaultdict(int)
    for position in np.unique(index.owners[index.trained]).tolist():
        with_objects[index.file_name(position)] += 1
    return [name for name, number in with_objects.items() if number > 1]


def shared_images(
    train: AnnotationIndex, train_folder: Path, val: AnnotationIndex, val_folder: Path
) -> list[tuple[str, str]]:
    """(name in train, name in val) of images with equal content, whatever their names.

    Only files of equal size are read. A file that is missing is not compared.
    """
    ours, theirs = _by_size(train, train_folder), _by_size(val, val_folder)
    pairs = []
    for size in sorted(ours.keys() & theirs.keys()):
        digests: dict[bytes, str] = {}
        for name, path in ours[size]:
            digests.setdefault(_digest(path), name)
        pairs += [(digests[d], name) for name, path in theirs[size] if (d := _digest(path)) in digests]
    return pairs


def _by_size(index: AnnotationIndex, folder: Path) -> dict[int, list[tuple[str, Path]]]:
    """Size in bytes -> the (name, path) of the files of that size."""
    found: defaultdict[int, list[tuple[str, Path]]] = defaultdict(list)
    for name in dict.fromkeys(index.file_name(position) for position in range(len(index))):
        try:
            path = image_path(folder, name)
            if path.is_file():
                found[path.stat().st_size].append((name, path))
        except (UserError, OSError):  # `check_images` names it
            continue
    return found


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
