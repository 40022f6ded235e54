"""How often each category occurs in training: what makes a tail a tail."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from bags.data.index import AnnotationIndex
from bags.errors import UserError


@dataclass(frozen=True)
class CategoryStats:
    """C categories in label order (label c + 1 is entry c), counted over the training annotations.

    instance_counts: boxes; image_counts: images with at least one box; crowd regions do not count.
    """

    category_ids: tuple[int, ...]
    names: tuple[str, ...]
    instance_counts: tuple[int, ...]
    image_counts: tuple[int, ...]

    @classmethod
    def from_index(cls, index: AnnotationIndex) -> "CategoryStats":
        """Counts an index."""
        size = len(index.category_ids) + 1
        labels = index.labels[~index.crowd]
        owners = index.owners[~index.crowd]
        pairs = np.unique(owners * size + labels)
        return cls(
            tuple(index.category_ids.tolist()),
            tuple(index.category_names),
            tuple(np.bincount(labels, minlength=size)[1:].tolist()),
            tuple(np.bincount(pairs % size, minlength=size)[1:].tolist()),
        )

    def to_dict(self) -> dict:
        """Plain lists: what a checkpoint holds. `CategoryStats(**d)` reads it back."""
        return {key: list(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: dict, source: object = "category statistics") -> "CategoryStats":
        """The inverse of `to_dict`. Raises UserError, naming `source`, for anything else."""
        try:
            stats = cls(**{key: tuple(value) for key, value in content.items()})
        except TypeError as error:
            raise UserError(f"{source}: stats: not as `to_dict` writes them ({error})") from None
        if len({len(value) for value in asdict(stats).values()}) != 1:
            raise UserError(f"{source}: stats: ids, names and counts differ in number")
        return stats

    @property
    def num_categories(self) -> int:
        """C."""
        return len(self.category_ids)


def disagreement(index: AnnotationIndex, stats: CategoryStats) -> str | None:
    """One line, where a file's own `instance_count` or `image_count` is not what its annotations add up to."""
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
