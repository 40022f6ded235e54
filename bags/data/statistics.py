"""How often each category occurs in training: what makes a tail a tail."""

import itertools
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bags.core.errors import UserError
from bags.data.index import AnnotationIndex


@dataclass(frozen=True)
class CategoryStats:
    """C categories in label order (label c + 1 is entry c), counted over the training annotations.

    instance_counts: objects; image_counts: images with at least one. Only objects that train are counted: see
    `AnnotationIndex.trained`.
    """

    category_ids: tuple[int, ...]  # [C]
    names: tuple[str, ...]  # [C]
    instance_counts: tuple[int, ...]  # [C]
    image_counts: tuple[int, ...]  # [C]

    @classmethod
    def from_index(cls, index: AnnotationIndex) -> "CategoryStats":
        """Count the objects of an index that train (see `AnnotationIndex.trained`)."""
        size, trained = len(index.category_ids) + 1, index.trained
        labels, owners = index.labels[trained], index.owners[trained]
        pairs = np.unique(owners * size + labels)
        return cls(
            tuple(index.category_ids.tolist()),
            tuple(index.category_names),
            tuple(np.bincount(labels, minlength=size)[1:].tolist()),
            tuple(np.bincount(pairs % size, minlength=size)[1:].tolist()),
        )

    def to_dict(self) -> dict:
        """Plain lists: what a checkpoint holds. `CategoryStats.from_dict` reads it back."""
        return {key: list(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: dict, source: object = "category statistics") -> "CategoryStats":
        """The inverse of `to_dict`. Raises UserError, naming `source`, for anything else."""
        keys = [field.name for field in fields(cls)]
        if set(content) != set(keys) or not all(isinstance(content[key], list | tuple) for key in keys):
            raise UserError(f"{source}: stats: expected lists named {', '.join(keys)}")
        for key in keys:
            _check_kind(content[key], key, f"{source}: stats: {key}")
        stats = cls(**{key: tuple(content[key]) for key in keys})
        ids = stats.category_ids
        if len({len(content[key]) for key in keys}) != 1:
            raise UserError(f"{source}: stats: ids, names and counts differ in number")
        if not ids or not all(a < b for a, b in itertools.pairwise(ids)):
            raise UserError(f"{source}: stats: category_ids: expected one or more rising numbers")
        return stats

    @property
    def num_categories(self) -> int:
        """C."""
        return len(self.category_ids)


def instance_counts_by_id(annotations: str | Path, largest: int) -> list[int]:
    """Training objects of labels that are category ids, such as those of torchvision's COCO detectors: [largest].

    Entry k counts the objects of id k + 1 that train; it is 0 for an id that the file does not have.
    annotations: a COCO or LVIS file. Raises UserError for ids that are not in 1..largest.
    """
    stats = CategoryStats.from_index(AnnotationIndex.open(annotations))
    wrong = [number for number in stats.category_ids if not 1 <= number <= largest]
    if wrong:
        raise UserError(f"{annotations}: category id {wrong[0]}: expected ids of 1 to {largest}, the detector's labels")
    known = dict(zip(stats.category_ids, stats.instance_counts, strict=True))
    return [known.get(number, 0) for number in range(1, largest + 1)]


def _check_kind(values: Sequence, key: str, where: str) -> None:
    """Raises UserError, which begins with `where`, for a value that a field of CategoryStats cannot have."""
    if key == "names":
        expected, usable = "texts", [type(value) is str for value in values]
    else:
        least = -(2**63) if key == "category_ids" else 0
        expected = "whole numbers" if least else "whole numbers of 0 or more"
        usable = [type(value) is int and least <= value < 2**63 for value in values]
    if not all(usable):
        position = usable.index(False)
        value = values[position]
        shown = "a number of 2^63 or more" if isinstance(value, int) and value >= 2**63 else reprlib.repr(value)[:100]
        raise UserError(f"{where}: expected {expected}, got {shown} at position {position}")


def disagreement(index: AnnotationIndex) -> str | None:
    """One line, where a file's own `instance_count` or `image_count` is not what its annotations add up to.

    Objects without a segmentation are counted, even where only masks are trained: they are in the file.
    """
    stats = CategoryStats.from_index(replace(index, for_masks=False))
    differing = [
        f"category {category['id']}: {name} {category[name]}, counted {counted}"
        for category, *counts in zip(index.categories, stats.instance_counts, stats.image_counts, strict=True)
        for name, counted in zip(("instance_count", "image_count"), counts, strict=True)
        if name in category and category[name] != counted
    ]
    if not differing:
        return None
    return f"{index.path}: {len(differing)} of its own counts differ from its annotations, which count ({differing[0]})"


def frequency(image_counts: Sequence[int]) -> np.ndarray:
    """LVIS's letters [C]: 'r' for at most 10 training images, 'c' for at most 100, else 'f'."""
    return np.array(["r", "c", "f"])[np.searchsorted([10, 100], np.asarray(image_counts), side="left")]


def instance_bin(instance_counts: Sequence[int], boundaries: Sequence[int]) -> np.ndarray:
    """0-based bin [C]: a category is in bin n if boundaries[n-1] <= count < boundaries[n]."""
    return np.searchsorted(np.asarray(boundaries), np.asarray(instance_counts), side="right")


class Training(NamedTuple):
    """Training counts of the categories by ascending id; None where they are unknown."""

    instances: Sequence[int] | None  # [C]
    images: Sequence[int] | None  # [C]
    letters: np.ndarray | None  # [C] of r, c, f
    bins: np.ndarray | None  # [C] in 0..num_bins - 1; 0 for the rarest
    num_bins: int

    def sets(self) -> dict[str, np.ndarray]:
        """Which categories [C] enter which mean."""
        members: dict[str, np.ndarray] = {}
        if self.letters is not None:
            members |= {f"AP{letter}": self.letters == letter for letter in "rcf"}
        if self.bins is not None:
            members |= {f"AP{n + 1}": self.bins == n for n in range(self.num_bins)}
            members["AP_tail"] = self.bins < self.num_bins // 2
            members["AP_head"] = self.bins >= self.num_bins // 2
        return members


def training_of(
    content: dict,
    instance_counts: Sequence[int] | None = None,
    image_counts: Sequence[int] | None = None,
    boundaries: Sequence[int] = (10, 100, 1000),
) -> Training:
    """Training counts as given, else as the ground truth tells them; content: of an annotation file."""
    categories = sorted(content["categories"], key=lambda c: c["id"])
    instances = _known(categories, "instance_count") if instance_counts is None else instance_counts
    images = _known(categories, "image_count") if image_counts is None else image_counts
    for name, counts in (("instance_counts", instances), ("image_counts", images)):
        if counts is not None and len(counts) != len(categories):
            raise UserError(f"{name}: {len(counts)} numbers for {len(categories)} categories of the ground truth")
    letters_given = _known(categories, "frequency") if image_counts is None else None
    letters = None if letters_given is None else np.asarray(letters_given)
    if letters is None and images is not None:
        letters = frequency(images)
    bins = None if instances is None else instance_bin(instances, boundaries)
    return Training(instances, images, letters, bins, len(boundaries) + 1)


def _known(categories: list[dict], key: str) -> list | None:
    """A field of all categories, or None."""
    return [category[key] for category in categories] if all(key in category for category in categories) else None
