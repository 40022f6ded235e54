"""What the objects of the tail are taken for."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bags.analysis.examples import SAME, corners, overlap

NAMED = 3  # categories that an object's category is most often taken for


class Confusion(NamedTuple):
    """What the validation objects of one category are taken for; the first four numbers add up to `objects`."""

    objects: int
    right: int
    head: int  # taken for a category of the head
    tail: int  # taken for another category of the tail
    missed: int  # no detection lies on the object
    names: list[tuple[str, int]]  # other categories and how often, most frequent first


def confusions(
    index: Any, detections: Mapping[int, list[dict]], rows: Sequence[dict], tail_below: int
) -> dict[int, Confusion]:
    """Count what the objects of each category of the tail are taken for, by category id.

    The guess of an object is the detection of highest score, of any category, that has an IoU of SAME or more with it.
    Only annotated objects are looked at, so missing annotations, as in LVIS, do no harm. Crowd regions are left out.

    index: of the validation annotations. detections: `by_image`. rows: of categories.csv; a category belongs to the
    tail with fewer than tail_below training instances. Categories without objects are left out.
    """
    by_id = {row["id"]: row for row in rows}
    is_tail = {row["id"]: row["training_instances"] < tail_below for row in rows}
    guesses: dict[int, Counter] = {}
    ids, label_is_tail = index.category_ids, np.array([False, *(is_tail[k] for k in index.category_ids.tolist())])
    objects = np.flatnonzero(label_is_tail[index.labels] & ~index.crowd)
    for position in np.unique(index.owners[objects]).tolist():
        entries = detections.get(int(index.image_ids[position]), [])
        scores = np.array([entry["score"] for entry in entries])
        mine = objects[index.owners[objects] == position]
        on_object = overlap(corners(entries), np.asarray(index.boxes[mine], np.float32)) >= SAME
        for annotation, on in zip(mine, on_object.T, strict=True):
            best = int(np.where(on, scores, -np.inf).argmax()) if on.any() else None
            guess = entries[best]["category_id"] if best is not None else None
            guesses.setdefault(int(ids[index.labels[annotation] - 1]), Counter())[guess] += 1
    return {category: _confusion(category, guesses[category], by_id, is_tail) for category in sorted(guesses)}


def _confusion(category: int, guesses: Counter, by_id: dict[int, dict], is_tail: dict[int, bool]) -> Confusion:
    """Sum up the guesses of the objects of one category."""
    others = [(guess, number) for guess, number in guesses.items() if guess not in (category, None)]
    others.sort(key=lambda pair: (-pair[1], pair[0]))
    tail = sum(number for guess, number in others if is_tail[guess])
    return Confusion(
        objects=guesses.total(),
        right=guesses[category],
        head=sum(number for _, number in others) - tail,
        tail=tail,
        missed=guesses[None],
        names=[(by_id[guess]["name"], number) for guess, number in others[:NAMED]],
    )
