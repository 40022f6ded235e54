"""Results files: a list of {image_id, category_id, bbox, score, segmentation?} -> checked arrays in canonical order."""

import codecs
import contextlib
import dataclasses
import gc
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import orjson

from bags.core.errors import UserError
from bags.core.files import read_bytes
from bags.data.json_files import NUMBERS, is_box, is_number, read_json
from bags.data.packing import LIMIT, implausible
from bags.evaluation.truth import Notes, Truth, check_mask, mask_sizes, ranks_of, shown, usable_mask

AT_ONCE = 2**20  # bytes parsed at once: Python objects of a whole file would take ten times its size
SAMPLED = 2**16  # boxes that are looked at for another format than x, y, width, height
BETWEEN = re.compile(rb"\}\s*,\s*(?=\{)")
IDS = ("image_id", "category_id")
Columns = tuple[np.ndarray, np.ndarray, np.ndarray, list | None]  # see `_columns`


@dataclass(frozen=True, eq=False)
class Results:
    """D detections by falling score; of equal scores by image, category, box (x, y, width, height) and mask.

    images, categories  int64 [D], ranks from 1 as in `Truth.content`
    boxes               float64 [D, 4] x, y, width, height (pixels); NaN where only a mask is given
    scores              float64 [D]
    masks               D segmentations (polygons or RLE), None where there is none; None where no detection has one
    positions           int64 [D] places in the file, from 0
    tied                share of detections whose score another detection of the same category has
    notes               sentences for the user
    """

    path: Path
    images: np.ndarray
    categories: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    masks: list | None
    positions: np.ndarray
    tied: float
    notes: list[str]

    def __len__(self) -> int:
        return len(self.scores)

    def lacks_masks(self) -> str | None:
        """Why masks cannot be scored, or None; an empty file lacks none."""
        bare = [mask is None for mask in self.masks or [None] * len(self)]
        if not any(bare):
            return None
        first = self.positions[bare].min()
        return f"{self.path}: {sum(bare)} of {len(bare)} detections have no segmentation (first: detection {first})"

    def check_masks(self, truth: Truth) -> None:
        """Raise UserError where a detection has no mask of its image's size."""
        if reason := self.lacks_masks():
            raise UserError(f"{reason}: masks cannot be scored")
        sizes = mask_sizes(truth)
        for k, image, mask in zip(self.positions, self.images.tolist(), self.masks or (), strict=True):
            check_mask(f"{self.path}: detection {k}", mask, sizes[image])

    def take(self, rows: np.ndarray) -> "Results":
        """Some detections: rows are ascending positions, so that the order stays."""
        return dataclasses.replace(
            self,
            images=self.images[rows],
            categories=self.categories[rows],
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            masks=None if self.masks is None else [self.masks[row] for row in rows.tolist()],
            positions=self.positions[rows],
        )

    def entries(self, masks: bool) -> list[dict]:
        """Detections as the official tools take them, with or without segmentations."""
        columns = zip(
            self.images.tolist(),
            self.categories.tolist(),
            self.boxes.tolist(),
            self.scores.tolist(),
            self.masks or itertools.repeat(None),
            strict=False,
        )
        detections = []
        for image, category, box, score, mask in columns:
            entry = {"image_id": image, "category_id": category, "score": score}
            if box[0] == box[0]:
                entry["bbox"] = box
            if mask is not None and (masks or box[0] != box[0]):
                entry["segmentation"] = mask
            detections.append(entry)
        return detections


def read_results(path: str | Path, truth: Truth) -> Results:
    """Read and check a results file. Raises UserError that names the first detection at fault."""
    path, parts, number = Path(path), [], 0
    images, categories = ranks_of(truth.image_ids), ranks_of(truth.category_ids)
    with _no_garbage_collection():
        for entries in _parts(path):
            parts.append(_columns(path, entries, number, images, categories))
            number += len(entries)
    ids, boxes, scores = (np.concatenate([part[k] for part in parts]) for k in range(3))
    masks: list | None = None
    if any(part[3] is not None for part in parts):
        masks = [mask for part in parts for mask in part[3] or itertools.repeat(None, len(part[2]))]
    sizes = mask_sizes(truth)
    for k in np.flatnonzero(np.isnan(boxes[:, 0])).tolist():  # the engines make boxes of these masks
        check_mask(f"{path}: detection {k}", masks and masks[k], sizes[int(ids[k, 0])])
    order, duplicates = canonical_order(ids, boxes, scores, masks)
    notes = Notes(path)
    if duplicates:
        notes.sentences.append(f"{duplicates} of {number} detections are exact duplicates of others")
    turned = np.flatnonzero((boxes[:, 2:] < 0).any(1))
    if len(turned):
        notes.sentences.append(f"{len(turned)} boxes have a negative width or height (first: detection {turned[0]})")
    flat = np.flatnonzero((boxes[:, 2:] == 0).any(1))
    if len(flat):
        words = "as boxes they count as false" + ", where the official lvis leaves them out" * truth.lvis
        notes.sentences.append(f"{len(flat)} boxes have no area (first: detection {flat[0]}): {words}")
    notes.sentences += _odd_boxes(boxes, ids[:, 0], sizes)
    if not number:
        notes.sentences.append("holds no detection, so every AP is 0")
    tied = _tied(ids[order, 1], scores[order])
    ids, boxes, scores = ids[order], boxes[order], scores[order]
    masks = masks and [masks[k] for k in order.tolist()]
    return Results(path, ids[:, 0], ids[:, 1], boxes, scores, masks, order, tied, notes.all())


def _odd_boxes(boxes: np.ndarray, images: np.ndarray, sizes: dict[int, list[int]]) -> list[str]:
    """Sentences on boxes [D, 4] (x, y, width, height) that look like another format.

    images: [D] ranks, sizes: rank -> [height, width], 0 where the file gives none.
    """
    step = len(boxes) // SAMPLED + 1
    boxes, images = boxes[::step], images[::step]
    of_box = np.array([sizes[image][::-1] for image in images.tolist()], np.float64).reshape(-1, 2)
    known = ~np.isnan(boxes[:, 0]) & (of_box > 0).all(1)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    sample = " in a sample" * (step > 1)
    found = implausible(corners[known], of_box[known])
    return [f"{kind}? {seen}{sample}; expected x, y, width, height in pixels" for kind, seen in found.items()]


def results_of(path: Path, ids: np.ndarray, boxes: np.ndarray, scores: np.ndarray) -> Results:
    """Detections that are in memory, as if they had been read from `path`.

    ids: int64 [D, 2] ranks of image and category from 1 on; boxes: float64 [D, 4] x, y, width, height in pixels;
    scores: float64 [D].
    """
    order, _ = canonical_order(ids, boxes, scores)
    tied = _tied(ids[order, 1], scores[order])
    return Results(path, ids[order, 0], ids[order, 1], boxes[order], scores[order], None, order, tied, [])


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Parsed JSON has no reference cycles, and looking for them takes a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parts(path: Path) -> Iterator[list]:
    """The detections of a file, in lists that are parsed one after the other.

    The text is cut where one object follows another. A cut within a string or an object leaves a part that is not
    valid JSON, and the file is then parsed as a whole; if all parts are valid, together they are the list.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: expected a results file, found something that is not a regular file")
    try:
        text = read_bytes(path).removeprefix(codecs.BOM_UTF8).strip()
    except OSError:
        text = b""  # `read_json` says why
    start, end, done, cut = 1, len(text) - 1, 0, None
    while text.startswith(b"[") and text.endswith(b"]") and len(text) > 1:
        cut = BETWEEN.search(text, start + AT_ONCE, end)
        try:
            entries = orjson.loads(b"[" + text[start : cut.start() + 1 if cut else end] + b"]")
        except orjson.JSONDecodeError:
            break
        yield entries
        if cut is None:
            return
        start, done = cut.end(), done + len(entries)
    entries = read_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a list of detections, found {shown(entries)}")
    yield entries[done:]


def _columns(path: Path, entries: list, first: int, images: dict[int, int], categories: dict[int, int]) -> Columns:
    """(ranks [D, 2], boxes [D, 4], scores [D], masks or None where there are none) of a part of a file.

    first: position of its first detection in the file.
    """
    try:
        columns = _converted(entries, images, categories)
    except (KeyError, TypeError, AttributeError, OverflowError):
        columns = None
    if columns is None:
        for k, entry in enumerate(entries, start=first):
            _check_detection(f"{path}: detection {k}", entry, images, categories)
        raise UserError(f"{path}: detections {first} to {first + len(entries) - 1} cannot be read")
    return columns


def _converted(entries: list, images: dict[int, int], categories: dict[int, int]) -> Columns | None:
    """The columns; None, or one of the errors of `_columns`, where a detection is at fault."""
    if not set(map(type, entries)) <= {dict}:
        return None
    image_ids, category_ids, scores = (list(map(itemgetter(key), entries)) for key in (*IDS, "score"))
    masks = None
    if any("segmentation" in entry for entry in entries):
        masks = [usable_mask(entry.get("segmentation")) for entry in entries]
        masks = masks if any(mask is not None for mask in masks) else None
    boxes = [entry.get("bbox") for entry in entries]
    bare = [k for k, mask in enumerate(masks or ()) if mask is not None and not boxes[k]]
    for k in bare:
        boxes[k] = [0.0] * 4
    if not (set(map(type, image_ids + category_ids)) <= {int} and NUMBERS.issuperset(map(type, scores))):
        return None
    if not (set(map(type, boxes)) <= {list} and set(map(len, boxes)) <= {4}):
        return None
    coordinates = list(itertools.chain.from_iterable(boxes))
    if not NUMBERS.issuperset(map(type, coordinates)):
        return None
    ranks = [list(map(images.__getitem__, image_ids)), list(map(categories.__getitem__, category_ids))]
    box_array = np.array(coordinates, np.float64).reshape(-1, 4)
    score_array = np.array(scores, np.float64)
    if not (np.isfinite(score_array).all() and (np.abs(box_array) < LIMIT).all()):
        return None
    box_array[bare] = np.nan
    return np.array(ranks, np.int64).reshape(2, -1).T, box_array, score_array, masks


def _check_detection(where: str, entry: object, images: dict[int, int], categories: dict[int, int]) -> None:
    """Raise UserError where a detection is at fault."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object, got {shown(entry)}")
    for name in (*IDS, "score"):
        if name not in entry:
            raise UserError(f"{where}: no {name}: a detection has image_id, category_id, bbox and score")
    for name, known in zip(IDS, (images, categories), strict=True):
        if type(entry[name]) is not int:
            raise UserError(f"{where}: {name}: expected a whole number, got {shown(entry[name])}")
        if entry[name] not in known:
            raise UserError(
                f"{where}: {name} {shown(entry[name])} is not in the ground truth; is this its results file?"
            )
    score, box = entry["score"], entry.get("bbox")
    if not is_number(score) or not abs(score) < 1e308:
        raise UserError(f"{where}: score: expected a finite number, got {shown(score)}")
    if not box and usable_mask(entry.get("segmentation")) is not None:
        return
    if not is_box(box):
        raise UserError(f"{where}: bbox: expected [x, y, width, height], got {shown(box)}")
    if not all(abs(value) < LIMIT for value in box):
        raise UserError(f"{where}: bbox: expected finite numbers below {LIMIT:g} pixels, got {box!r:.80}")


def canonical_order(
    ids: np.ndarray, boxes: np.ndarray, scores: np.ndarray, masks: list | None = None
) -> tuple[np.ndarray, int]:
    """(order, number of exact duplicates): by falling score, then image, category, box and mask.

    ids: int64 [D, 2] image and category; boxes float64 [D, 4]; scores float64 [D]; masks: D segmentations, if any.
    Engines keep the order of detections with equal scores, so this order decides between them.
    """
    order = np.argsort(-scores, kind="stable")
    tied = _repeated(scores[order])
    rows = order[tied]
    keys = np.column_stack([np.nan_to_num(boxes[rows])[:, ::-1], ids[rows, ::-1], -scores[rows]])
    rows = rows[np.lexsort(keys.T)]
    order[tied] = rows
    keys = np.column_stack([np.nan_to_num(boxes[rows]), ids[rows], scores[rows]])
    same = (keys[1:] == keys[:-1]).all(1)
    if masks is None or not same.any():
        return order, int(same.sum())
    duplicates = 0
    starts = np.flatnonzero(np.insert(~same, 0, True))
    for start, stop in itertools.pairwise([*starts.tolist(), len(rows)]):
        texts = {row: repr(masks[row]) for row in rows[start:stop].tolist()}
        order[tied[start:stop]] = sorted(texts, key=texts.__getitem__)
        duplicates += len(texts) - len(set(texts.values()))
    return order, duplicates


def _repeated(values: np.ndarray) -> np.ndarray:
    """Positions of the values [D], which are sorted, that occur more than once."""
    equal = values[1:] == values[:-1]
    return np.flatnonzero(np.append(equal, False) | np.insert(equal, 0, False))[: len(values)]


def _tied(categories: np.ndarray, scores: np.ndarray) -> float:
    """Share of detections, in falling order of scores, whose score another one of the same category has."""
    rows = _repeated(scores)
    pairs = np.column_stack([categories[rows], np.unique(scores[rows], return_inverse=True)[1]])
    numbers = np.unique(pairs, axis=0, return_counts=True)[1]
    return float(numbers[numbers > 1].sum() / max(len(scores), 1))
