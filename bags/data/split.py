"""One annotation file divided into train and val, so that rare categories are in both.

Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011, On the Stratification of Multi-Label Data): of the
category with the fewest images that are still to be placed, each image goes to the file that lacks most of that
category. Two steps follow. `_Sides.cover` moves images for the categories that a file misses, and `_Sides.balance`
restores the share. Images that must stay together are one unit.

Command:  python scripts/prepare_data.py split mine.json --val 0.2
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bags.core.errors import UserError
from bags.core.files import write_text
from bags.data.index import AnnotationIndex
from bags.data.json_files import as_json, read_json, shown
from bags.data.packing import offsets, pack
from bags.data.statistics import frequency

TRAIN, VAL = 0, 1
TRIES = 2000  # moves that are tried for a category that a file misses
DEPTH = 6  # moves in a row, each of which mends what the one before it has broken


@dataclass(frozen=True, eq=False)
class Units:
    """U units of images that stay together, and the categories in them.

    sizes   int64 [U], images of each unit
    starts  int64 [U + 1]; the categories of unit u are labels[starts[u]:starts[u + 1]], one or more
    labels  int64 [P] in 0..C, ascending in each unit; 0 stands for images without objects
    images  int64 [P], how many images of the unit have the label
    """

    sizes: np.ndarray
    starts: np.ndarray
    labels: np.ndarray
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def owners(self) -> np.ndarray:
        """The unit of each of the P entries."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))


@dataclass(frozen=True)
class Division:
    """How a file was divided: pairs are (train, val), lists have C entries in label order.

    units: groups (images without a group key) in which each category occurs. Only objects that train are counted, see
    `AnnotationIndex.trained`.
    """

    images: tuple[int, int]
    objects: tuple[list[int], list[int]]  # [C] each
    units: list[int]  # [C]


def split_annotations(
    source: Path, outputs: tuple[Path, Path], share: float, group: str | None = None, seed: int = 0
) -> Division:
    """Write the images of `source`, with their annotations, to two files, (train, val).

    share: of the images in val, 0 to 1. group: a key of the images; those of equal value stay together. Both files
    keep all categories and other keys. Where the categories have counts, both files get those of train. The order of
    the images in the file does not matter. Raises UserError for what cannot be divided; then nothing is written.
    """
    _check_arguments(source, outputs, share, seed)
    index = AnnotationIndex(path=source, **pack(source))  # which refuses what training would refuse
    if not index.trained.any():
        raise UserError(
            f"{source}: has no object that can be trained on, so no categories to divide by; add annotations"
        )
    content = read_json(source)
    unit_of = _unit_of_image(source, content["images"], index.image_ids, group)
    units, what = _units(index, unit_of), f"group by {group!r}" if group else "image"
    if len(units) < 2:
        raise UserError(f"{source}: has one {what} only; expected two or more to divide")
    in_val = divide(units, share, seed)[unit_of]
    counts = [_counts(index, side) for side in (~in_val, in_val)]
    if not all(objects.any() for objects, _ in counts):
        words = f"each {what} with objects holds the only ones of a category, and none of these can be in val"
        raise UserError(f"{source}: {words}; add images of these categories")
    texts = [as_json(_part(content, side, *counts[TRAIN]), source) for side in (~in_val, in_val)]
    _write_both(outputs, texts)
    in_units = np.bincount(units.labels, minlength=len(index.category_ids) + 1)[1:]
    objects = counts[TRAIN][0].tolist(), counts[VAL][0].tolist()
    return Division((int((~in_val).sum()), int(in_val.sum())), objects, in_units.tolist())


def _check_arguments(source: Path, outputs: tuple[Path, Path], share: float, seed: int) -> None:
    if not 0 < share < 1:
        raise UserError(f"--val {share}: expected a share of the images above 0 and below 1, such as 0.2")
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed {seed}: expected 0 <= seed < 2**31")
    train, val = outputs
    if train.resolve() == val.resolve():
        raise UserError(f"--output-val {val}: is the file of --output-train, too; choose another name")
    for option, output in (("--output-train", train), ("--output-val", val)):
        if output.resolve() == source.resolve():
            raise UserError(f"{option} {output}: is the source; choose another name")
        if output.exists():
            raise UserError(f"{option} {output}: exists already: remove it, or choose another name")


def _unit_of_image(source: Path, images: list[dict], ids: np.ndarray, group: str | None) -> np.ndarray:
    """The unit (0..U-1, in the order of their smallest image ids) of each image in the order of the file, int64 [I]."""
    order, numbers = np.argsort(ids), np.empty(len(ids), np.int64)
    known: dict[tuple, int] = {}
    for position in order.tolist():
        value = ids[position] if group is None else images[position].get(group)
        if group is not None and type(value) not in (str, int, float, bool):
            found = "has none" if value is None else f"has {shown(value)}"
            words = f"expected a text or number as {group!r} (--group), {found}"
            raise UserError(f"{source}: image {ids[position]}: {words}")
        numbers[position] = known.setdefault((type(value), value), len(known))
    return numbers


def _units(index: AnnotationIndex, unit_of: np.ndarray) -> Units:
    """Count the categories of each unit. Images none of whose objects train have label 0."""
    size, trained = len(index.category_ids) + 1, index.trained
    pairs = np.unique(index.owners[trained] * size + index.labels[trained])
    empty = np.setdiff1d(np.arange(len(index)), pairs // size)
    owners, labels = np.concatenate([pairs // size, empty]), np.concatenate([pairs % size, np.zeros_like(empty)])
    keys, images = np.unique(unit_of[owners] * size + labels, return_counts=True)
    sizes = np.bincount(unit_of)
    return Units(sizes, offsets(np.bincount(keys // size, minlength=len(sizes))), keys % size, images)


def _counts(index: AnnotationIndex, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Objects that train, and images with one, of each category [C] in the chosen images (bool [I])."""
    size, kept = len(index.category_ids) + 1, index.trained & chosen[index.owners]
    pairs = np.unique(index.owners[kept] * size + index.labels[kept])
    return np.bincount(index.labels[kept], minlength=size)[1:], np.bincount(pairs % size, minlength=size)[1:]


def _part(content: dict, chosen: np.ndarray, objects: np.ndarray, images: np.ndarray) -> dict:
    """The chosen images (bool [I]) and their annotations; categories with the training counts of their own keys."""
    kept = [image for image, wanted in zip(content["images"], chosen.tolist(), strict=True) if wanted]
    ids = {image["id"] for image in kept}
    columns = {"instance_count": objects, "image_count": images, "frequency": frequency(images.tolist())}
    ranks = np.argsort(np.argsort([category["id"] for category in content["categories"]])).tolist()
    categories = [
        {key: columns[key][rank].item() if key in columns else value for key, value in category.items()}
        for category, rank in zip(content["categories"], ranks, strict=True)
    ]
    annotations = [annotation for annotation in content["annotations"] if annotation["image_id"] in ids]
    return content | {"images": kept, "annotations": annotations, "categories": categories}


def _write_both(outputs: tuple[Path, Path], texts: list[str]) -> None:
    """Write two files, or none."""
    for output in outputs:
        output.parent.mkdir(parents=True, exist_ok=True)
    try:
        for output, text in zip(outputs, texts, strict=True):
            write_text(output, text)
    except BaseException:
        outputs[0].unlink(missing_ok=True)
        raise


# --------------------------------------------------------------------------- the division


def divide(units: Units, share: float, seed: int = 0) -> np.ndarray:
    """Which units go to val, bool [U]: about `share` (0 to 1) of the images, and each category on both sides.

    Units that hold the only images of a category stay in train.
    """
    rng = np.random.RandomState(seed)
    sides = _Sides(units, share, rng.permutation(len(units)))
    sides.stratify(rng)
    sides.cover()
    sides.balance()
    return np.array(sides.side) == VAL


class _Sides:
    """A division while it is made. order: of the units [U], in which equal ones are taken."""

    def __init__(self, units: Units, share: float, order: np.ndarray):
        self.units, self.share = units, share
        size = int(units.labels.max()) + 1
        starts, labels = units.starts.tolist(), units.labels.tolist()
        images = units.images.tolist()
        self.labels = [labels[a:b] for a, b in itertools.pairwise(starts)]
        self.images = [images[a:b] for a, b in itertools.pairwise(starts)]  # of the unit, with each of its labels
        self.sizes = units.sizes.tolist()
        self.by_label: list[list[int]] = [[] for _ in range(size)]
        for unit in order.tolist():
            for label in self.labels[unit]:
                self.by_label[label].append(unit)
        self.side = [TRAIN] * len(units)
        self.there = [[len(of_label) for of_label in self.by_label], [0] * size]  # units of each label on each side
        self.divisible = [label > 0 and len(of_label) > 1 for label, of_label in enumerate(self.by_label)]
        self.pinned = [not all(self.divisible[label] or not label for label in of_unit) for of_unit in self.labels]
        self.tries = 0

    def move(self, unit: int) -> None:
        """Change the side of a unit."""
        old = self.side[unit]
        self.side[unit] = 1 - old
        for label in self.labels[unit]:
            self.there[old][label] -= 1
            self.there[1 - old][label] += 1

    def stratify(self, rng: np.random.RandomState) -> None:
        """Place all units, those of the rarest category first. Of each divisible category val wants a unit at least."""
        wanted: list[list[float]] = [[], []]
        numbers: list[list[int]] = [[] for _ in self.by_label]  # images of each label in each of its units
        for of_unit, images in zip(self.labels, self.images, strict=True):
            for label, number in zip(of_unit, images, strict=True):
                numbers[label].append(number)
        for label, of_label in enumerate(numbers):
            everything = sum(of_label)
            part = self.share * everything
            if label:
                part = min(max(part, min(of_label)), everything - min(of_label)) if self.divisible[label] else 0
            wanted[VAL].append(part)
            wanted[TRAIN].append(everything - part)
        total = sum(self.sizes)
        room = [(1 - self.share) * total, self.share * total]
        left, placed = [len(of_label) for of_label in self.by_label], [False] * len(self.units)

        def place(unit: int, side: int) -> None:
            """Put a unit on a side, which then wants less."""
            placed[unit] = True
            if side != self.side[unit]:
                self.move(unit)
            room[side] -= self.sizes[unit]
            for label, weight in zip(self.labels[unit], self.images[unit], strict=True):
                wanted[side][label] -= weight
                left[label] -= 1

        for unit in range(len(self.units)):
            if self.pinned[unit]:
                place(unit, TRAIN)
        while waiting := [label for label, number in enumerate(left) if number]:
            rarest = min(waiting, key=left.__getitem__)
            for unit in (unit for unit in self.by_label[rarest] if not placed[unit]):
                lack = [(wanted[side][rarest], room[side]) for side in (TRAIN, VAL)]
                place(unit, int(lack[VAL] > lack[TRAIN] if lack[VAL] != lack[TRAIN] else rng.randint(2)))

    def cover(self) -> None:
        """Bring every divisible category to both sides, as far as a few moves can."""
        missing = [
            (len(of_label), label, side)
            for label, of_label in enumerate(self.by_label)
            for side in (TRAIN, VAL)
            if self.divisible[label] and not self.there[side][label]
        ]
        for _, label, side in sorted(missing):
            self.tries = TRIES
            if not self.there[side][label]:
                self._bring(label, side, [])

    def _bring(self, label: int, side: int, moved: list[int]) -> bool:
        """Move a unit of a category to a side, then mend what the other side has lost; or leave all as it was.

        moved: the units that were moved before, which stay where they are.
        """
        before = len(moved)
        if before < DEPTH:
            candidates = [unit for unit in self.by_label[label] if unit not in moved and not self.pinned[unit]]
            for unit in sorted(candidates, key=lambda unit: len(self._lost(unit))):
                self.tries -= 1
                if self.tries < 0:
                    break
                lost = self._lost(unit)
                self.move(unit)
                moved.append(unit)
                if all(self.there[1 - side][other] or self._bring(other, 1 - side, moved) for other in lost):
                    return True
                for other in moved[before:]:
                    self.move(other)
                del moved[before:]
        return False

    def _lost(self, unit: int) -> list[int]:
        """The divisible categories that would leave a side with a unit."""
        there = self.there[self.side[unit]]
        return [label for label in self.labels[unit] if there[label] == 1 and self.divisible[label]]

    def balance(self) -> None:
        """Bring the share of images in val to the wanted one, as far as no category leaves a side.

        Each time the unit moves that brings the categories' own shares nearest to it.
        """
        units, divisible, pinned = self.units, np.array(self.divisible), np.array(self.pinned)
        totals = np.bincount(units.labels, units.images, len(divisible))
        while True:
            side = np.array(self.side)
            excess = float(units.sizes[side == VAL].sum() - self.share * units.sizes.sum())
            giving, sign = (VAL, 1) if excess > 0 else (TRAIN, -1)
            lone = divisible[units.labels] & (np.array(self.there[giving])[units.labels] == 1)
            stuck = pinned | (np.bincount(units.owners, lone, len(units)) > 0)
            movable = np.flatnonzero(~stuck & (side == giving) & (units.sizes < 2 * abs(excess)))
            if not len(movable):
                return
            in_val = np.bincount(units.labels, units.images * (side[units.owners] == VAL), len(divisible))
            surplus = sign * (in_val - self.share * totals)
            costs = (units.images**2 - 2 * units.images * surplus[units.labels]) / totals[units.labels]
            cost = np.bincount(units.owners, costs, len(units)) / units.sizes
            self.move(int(movable[cost[movable].argmin()]))
